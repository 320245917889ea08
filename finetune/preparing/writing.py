"""Writes a prepared data set: splits, rejected rows, card and charts, all of them or none."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.files import json_lines, write_together
from finetune.preparing.preparation import Prepared, PrepareOptions, reason_kind
from finetune.preparing.splits import SPLITS
from finetune.reading.load_result import Rejected

# The files that `write_prepared` may write.
WRITTEN = (*(f"{name}.jsonl" for name in SPLITS), "rejected.jsonl", "dataset_card.md", "lengths.png", "tools.png")


def write_prepared(
    result: Prepared, folder: str | Path, options: PrepareOptions, command: str, *, overwrite: bool = False
) -> None:
    """Write all files or none; with `overwrite` also remove an old rejected.jsonl. Raises UserError."""
    from finetune.preparing.dataset_card import card, draw_lengths, draw_tools

    folder = Path(folder)
    refuse_to_replace(folder, overwrite=overwrite)
    files = {f"{name}.jsonl": json_lines(conversations).encode() for name, conversations in result.splits.items()}
    if result.rejected:
        files["rejected.jsonl"] = _rejected_lines(result.rejected)
    files["lengths.png"] = draw_lengths(result, options.encoding.max_seq_length)
    files["tools.png"] = draw_tools(result)
    files["dataset_card.md"] = card(result, options, command).encode(errors="backslashreplace")
    write_together({folder / name: data for name, data in files.items()})
    if not result.rejected:
        (folder / "rejected.jsonl").unlink(missing_ok=True)


def write_rejected(rejected: list[Rejected], folder: str | Path) -> Path:
    """Write rejected.jsonl alone, for a data set of which no row is left. Raises UserError."""
    path = Path(folder, "rejected.jsonl")
    write_together({path: _rejected_lines(rejected)})
    return path


def _rejected_lines(rejected: list[Rejected]) -> bytes:
    return json_lines(row.as_json() | {"kind": reason_kind(row)} for row in rejected).encode()


def refuse_to_replace(folder: str | Path, *, overwrite: bool) -> None:
    """UserError when the folder holds a prepared data set and `overwrite` is off.

    New training rows beside old validation rows could leak, so no file of an earlier run may remain.
    """
    existing = [path for name in WRITTEN if (path := Path(folder, name)).exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is already there; choose another --output, or add --overwrite")
