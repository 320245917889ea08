"""The output folder: one evaluation at a time, and no scores beside others that they cannot be compared with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import user_errors
from finetune.evaluation.items import Item
from finetune.files import acquire_lock, free_path, release_lock

FILE_PREFIXES = {"base": "base_model", "tuned": "finetuned_model"}


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock; a new folder that stays empty is removed at the end.

    Raises UserError when the folder is not writable or another process is evaluating into it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    busy = f"another evaluation is writing to {folder}; wait for it, or choose another folder with --output"
    try:
        with user_errors(f"cannot write to {folder}", "choose a folder with --output"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(folder / ".lock", busy)
        try:
            yield
        finally:
            release_lock(lock)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


def adapter_of(side: str, model: Any) -> contextlib.AbstractContextManager[Any]:
    """A block in which the model is that of the side: its adapter is switched on or off."""
    is_off = side == "base" and hasattr(model, "disable_adapter")
    return model.disable_adapter() if is_off else contextlib.nullcontext()


def describe_items(items: Sequence[Item]) -> dict[str, Any]:
    """Sources of the items and a hash of them, for the metrics files."""
    keys = "".join(item.fingerprint() for item in items)
    return {
        "sources": list(dict.fromkeys(item.source for item in items)),
        "items_sha256": hashlib.sha256(keys.encode()).hexdigest(),
    }


def archive(path: Path) -> Path:
    """Rename a file to `<stem>.before_<time><suffix>`, never over another one; returns the new path."""
    earlier = f"{path.stem}.before_{time.strftime('%Y%m%d_%H%M%S')}"
    numbers = ("", *(f"_{number}" for number in range(2, 10_000)))
    return path.replace(free_path(path.with_name(f"{earlier}{number}{path.suffix}") for number in numbers))


def archive_incomparable_scores(folder: Path, metrics: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """After one model was scored alone: archive the other's scores unless items and settings are the same.

    `comparison.json` is deleted: one of the two scores it compares has been replaced.
    """
    if len(metrics) != 1:
        return
    ((side, scored),) = metrics.items()
    (folder / "comparison.json").unlink(missing_ok=True)
    (other,) = FILE_PREFIXES.keys() - {side}
    path = folder / f"{FILE_PREFIXES[other]}_metrics.json"
    if not path.is_file():
        return
    try:
        known = _comparable_settings(json.loads(path.read_text(encoding="utf-8")))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # written by an older version or by another program
        known = None
    if known != _comparable_settings(scored):
        say(f"{path.name} held scores of other rows or settings; it is now {archive(path).name}")


def _comparable_settings(metrics: dict[str, Any]) -> dict[str, Any]:
    may_differ = ("adapter_sha256", "batch_size")
    settings = {key: value for key, value in metrics["settings"].items() if key not in may_differ}
    return {"items": metrics["data"]["items_sha256"], **settings}
