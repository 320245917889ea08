"""Rows of a suite whose data the user brings: found, read and made into items, with errors that name file and row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, Item
from finetune.reading.normalize import normalize_row
from finetune.reading.row_files import RowError, Unreadable, json_lines
from formats.base import call_of

Row = dict[str, Any]


def existing(folder: str, inner: Sequence[str], pattern: str, suite: str, source: str) -> list[Path]:
    """The files of `pattern` in the folder, or in the first of its folders `inner` that has any; or the file itself.

    source  where to get the data, for the UserError when there is none
    """
    root = Path(folder).expanduser()
    if not folder:
        raise UserError(f"--suite {suite} needs a folder: {suite}:FOLDER; get it with: {source}")
    if root.is_file() and root.match(pattern):
        return [root]
    for place in (root, *(root / name for name in inner)):
        if place.is_dir() and (files := sorted(place.glob(pattern))):
            return files
    raise UserError(f"--suite {suite}:{folder}: no {pattern} there; get the data with: {source}")


def read_items(
    path: Path, suite: str, make: Callable[[int, Row], Iterator[Item]], *, limit: int | None = None
) -> list[Item]:
    """The items that `make(row number, row)` yields for the first `limit` rows of a JSON Lines file.

    Raises UserError with file and row for a row that `make` cannot read.
    """
    return items_of_rows(((str(path), *row) for row in json_lines(path)), suite, make, limit=limit)


def read_answers(path: Path, suite: str) -> dict[str, Any]:
    """`ground_truth` of each row of a JSON Lines file, by `id`."""
    answers = {}

    def keep(number: int, row: Row) -> Iterator[Item]:
        answers[row["id"]] = row["ground_truth"]
        yield from ()

    read_items(path, suite, keep)
    return answers


def items_of_rows(
    rows: Iterator[tuple[str, int, Any]],
    suite: str,
    make: Callable[[int, Row], Iterator[Item]],
    *,
    limit: int | None = None,
) -> list[Item]:
    """As `read_items`, of rows (source, number, row)."""
    items = []
    for source, number, row in islice(rows, limit):
        try:
            if not isinstance(row, dict):
                raise RowError(row.reason if isinstance(row, Unreadable) else "is not a JSON object")
            items += make(number, row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{source} row {number}: not a row of {suite} ({reason}); use its own file") from error
    return items


def make_item(source: str, row: int, kind: str, messages: list[Any], tools: Any, answer: Any, **more: Any) -> Item:
    """The item of an answer; `messages`, `tools` and `answer` in any spelling that data sets have.

    answer  the expected message; None: its wording is free
    Raises RowError.
    """
    conversation = normalize_row({"messages": [*messages, answer] if answer else messages, "tools": tools})
    before, last = conversation["messages"], {}
    if answer:
        *before, last = before
    calls = [call_of(call) for call in last.get("tool_calls") or []]
    if bool(calls) != (kind == CALL) and (answer or kind == CALL):
        raise RowError("its answer has no call" if kind == CALL else "its answer has a call, which is not expected")
    text = None if calls else last.get("content") or None
    return Item(source, row, len(before), kind, before, conversation["tools"], calls, text, **more)
