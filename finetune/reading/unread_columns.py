"""What to do about rows whose columns are not known: a CSV file without a header, messages under another name."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError

NO_SHAPE = "has no messages (its columns"  # how the reason of a row begins whose columns are not known
_ROLE_KEYS = ("role", "from")
MAX_SHOWN = 200


def with_hint(reason: str, row: Any) -> str:
    """The reason, and how to map a column that holds messages if the row has one."""
    if not reason.startswith(NO_SHAPE) or not isinstance(row, dict):
        return reason
    column = next((column for column, value in row.items() if _holds_messages(value)), None)
    if column is None:
        return reason
    return f"{reason}; the column {column!r} holds messages: prepare_data.py --map {column}=messages"


def refuse_csv_header(source: str, reason: str, row: Any) -> None:
    """Raise UserError for a CSV file none of whose columns is known: its first line may not be a header."""
    name = source.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")) or not reason.startswith(NO_SHAPE) or not isinstance(row, dict):
        return
    columns = ", ".join(map(repr, row))[:MAX_SHOWN]
    raise UserError(
        f"{source}: its first line is taken as the header and holds {columns}, which are not known columns; add a "
        "header line such as question,answer, or name the columns with prepare_data.py --map COLUMN=FIELD"
    )


def _holds_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and any(isinstance(one.get(key), str) for key in _ROLE_KEYS) for one in value)
    )
