"""A prepared data set on disk: splits, rejected rows, card and pictures, all of them or none."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.files import json_lines, write_together
from finetune.preparing.preparation import Options, Prepared
from finetune.preparing.splits import SPLITS

# What `write_prepared` puts into its folder.
WRITTEN = (*(f"{name}.jsonl" for name in SPLITS), "rejected.jsonl", "dataset_card.md", "lengths.png", "tools.png")


def write_prepared(
    result: Prepared, folder: str | Path, options: Options, command: str, *, overwrite: bool = False
) -> None:
    """Write one file per split, rejected.jsonl, the dataset card and its pictures: all of them or none.

    New training rows beside the validation rows of an earlier run would leak into each other. Raises UserError.
    """
    from finetune.preparing.dataset_card import card, draw_lengths, draw_tools

    folder = Path(folder)
    refuse_to_replace(folder, overwrite=overwrite)
    files = {f"{name}.jsonl": json_lines(conversations).encode() for name, conversations in result.splits.items()}
    if result.rejected:
        files["rejected.jsonl"] = json_lines(row.as_json() for row in result.rejected).encode()
    files["lengths.png"] = draw_lengths(result, options.max_seq_length)
    files["tools.png"] = draw_tools(result)
    files["dataset_card.md"] = card(result, options, command).encode(errors="backslashreplace")
    write_together({folder / name: data for name, data in files.items()})
    if not result.rejected:
        (folder / "rejected.jsonl").unlink(missing_ok=True)  # of an earlier run: its rows are no rows of this one


def refuse_to_replace(folder: str | Path, *, overwrite: bool) -> None:
    """UserError when the folder holds a prepared data set that may not be replaced; asked before anything slow."""
    existing = [path for name in WRITTEN if (path := Path(folder, name)).exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is already there; choose another --output, or say --overwrite")
