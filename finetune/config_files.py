"""YAML and JSON files that a user writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError


def read_data(kind: str, path: str | Path) -> Any:
    """The content of a YAML or JSON file; UserError, naming `kind` and the file, when it cannot be read."""
    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    try:
        content = path.read_text(encoding="utf-8-sig")
        return json.loads(content, object_pairs_hook=_without_duplicates) if is_json else _parse_yaml(content)
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except Exception as error:
        raise UserError(f"{kind} {path} is not valid {'JSON' if is_json else 'YAML'}: {error}") from error


def _parse_yaml(content: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            _without_duplicates([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return yaml.load(content, Loader)


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"duplicate key {key!r}; keep one of them")
        mapping[key] = value
    return mapping
