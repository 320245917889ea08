"""Everything besides the row that affects an answer; answers with different settings are never mixed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.models.bundled import NAME
from finetune.runs.find import Run


def answer_settings(run: Run, side: str, model: Any, fmt: Any, decoding: Any) -> dict[str, Any]:
    """Names and hashes as plain values, for the metrics file and for the hash in every line of results."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tuned = side == "tuned" and run.adapter is not None
    return {
        "base_model": run.base_name,
        "base_model_revision": getattr(inner.config, "_commit_hash", None),
        "base_sha256": _folder_hash(Path(run.base_name)),
        "load_in_4bit": bool(getattr(inner, "is_loaded_in_4bit", False)),
        "adapter_sha256": adapter_hash(run.adapter) if tuned else None,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "format": fmt.name,
        "template_sha256": hashlib.sha256(fmt.template.encode()).hexdigest(),
        "template_kwargs": dict(fmt.template_kwargs),
    } | (_decoding_settings(decoding) if decoding else {})


def _decoding_settings(decoding: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed if decoding.temperature else None,
    }


def _folder_hash(folder: Path) -> str | None:
    """SHA-256 of a local model's config and weights, which may be rebuilt under the same name.

    None for the bundled model and for one from the Hub, which its revision identifies.
    """
    if str(folder).lower() == NAME or not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return _hash(*(folder / name for name in ["config.json", *names]))


def adapter_hash(folder: Path) -> str:
    """SHA-256 of the adapter's weights and its config, without the location of the base model."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)
    return _hash(folder / "adapter_model.safetensors", json.dumps(config, sort_keys=True).encode())


def _hash(*parts: Path | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
        else:
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
