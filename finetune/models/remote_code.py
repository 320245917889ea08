"""References to Python code in the files of a model: removed from everything that is saved, copied or exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# `auto_map` names classes in a repository's own Python files; PEFT's `auto_mapping` a module to import.
CODE_KEYS = ("auto_map", "auto_mapping")


def forget_code(*objects: Any) -> None:
    """Remove the references from a loaded tokenizer, config or model config, so that no later save writes them."""
    for one in objects:
        inside = getattr(one, "init_kwargs", None)
        if isinstance(inside, dict):
            inside.pop("auto_map", None)
        for name in ("auto_map", "_auto_map"):
            if name in vars(one):
                delattr(one, name)
        if getattr(one, "_auto_class", None) is not None:
            one._auto_class = None  # else save_pretrained copies the class's source file


def has_own_code(model: Any) -> bool:
    """Whether the classes of a loaded model or its config come from a repository, not from Transformers."""
    modules = (type(one).__module__ for one in (model, model.config))
    return any(name.startswith("transformers_modules.") for name in modules)


def strip_code(folder: Path) -> None:
    """Remove the references from every JSON file of a model folder, and Python files beside them."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json"):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # not read as a config by anyone
                continue
            if (stripped := _without_code(config)) != config:
                path.write_text(json.dumps(stripped, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.glob("*.py"):
        path.unlink()


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(inner) for key, inner in value.items() if key not in CODE_KEYS or not inner}
    return [_without_code(inner) for inner in value] if isinstance(value, list) else value
