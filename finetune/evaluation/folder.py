"""The folder that scores go to: one evaluation at a time, and nothing of an earlier one beside what it contradicts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import Item
from finetune.files import acquire_lock, release_lock

NAMES = {"base": "base_model", "tuned": "finetuned_model"}  # how the files of a side begin


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder, made where there is none and taken away again when nothing was written into it.

    Raises UserError when it cannot be written into, so that this is known before the work.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; name another folder with --output"
            ) from error
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder; UserError when another process is evaluating into it."""
    busy = f"another evaluation is writing to {folder}; wait for it, or choose another folder with --output"
    lock = acquire_lock(folder / ".lock", busy)
    try:
        yield
    finally:
        release_lock(lock)


def data_of(items: Sequence[Item]) -> dict[str, Any]:
    """What was asked, for the metrics files: sources and a hash over the items."""
    keys = "".join(item.fingerprint() for item in items)
    return {
        "sources": list(dict.fromkeys(item.source for item in items)),
        "items_sha256": hashlib.sha256(keys.encode()).hexdigest(),
    }


def free_name(path: Path) -> Path:
    """A name for an earlier file, which is moved and never overwritten: `<stem>.before_<time>`."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    for number in range(1, 10_000):
        name = path.with_name(f"{path.stem}.before_{stamp}{f'_{number}' if number > 1 else ''}{path.suffix}")
        if not name.exists():
            return name
    raise UserError(f"{path.parent}: too many earlier results of this second; clear the folder")


def set_strangers_aside(folder: Path, metrics: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """When one side was scored alone: the other side's scores stay only if they are of the same items and decoding.

    Others would be read as a comparison. `comparison.json` goes in any case: what it compared is no longer there.
    """
    if len(metrics) != 1:
        return
    ((side, scored),) = metrics.items()
    (folder / "comparison.json").unlink(missing_ok=True)
    (other,) = NAMES.keys() - {side}
    path = folder / f"{NAMES[other]}_metrics.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            known = _asked(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError):  # of an older version, or not ours
            known = None
        if known != _asked(scored):
            aside = free_name(path)
            path.replace(aside)
            say(f"{path.name} held scores of other rows or settings; it is now {aside.name}")


def _asked(metrics: dict[str, Any]) -> dict[str, Any]:
    own = ("adapter_sha256", "batch_size")  # what may differ between two sides that can be compared
    settings = {key: value for key, value in metrics["settings"].items() if key not in own}
    return {"items": metrics["data"]["items_sha256"], **settings}
