"""Readers of single files: JSON Lines, JSON, CSV and Parquet, plain or gzip, each yielding (row number, row)."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from formats.calls import MAX_JSON_DEPTH, STRICT, json_depth


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row's place when its text is no JSON object, so that no row is ever lost silently."""

    reason: str
    text: str


UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks


def open_plain(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def strict_json(text: str) -> Any:
    """json.loads that refuses what JSON forbids and Python lets pass: doubled keys, NaN, Infinity, 1e999.

    Raises ValueError (RecursionError for absurd nesting is turned into one).
    """
    try:
        return STRICT.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_row(line: bytes | str) -> dict[str, Any] | Unreadable:
    """One line of JSON Lines as a dict, or Unreadable with the reason."""
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 text (byte {error.start})", line.decode("utf-8", "replace"))
    try:
        row = strict_json(text)
    except ValueError as error:
        return Unreadable(f"is not JSON: {_reason(error)}", text)
    if not isinstance(row, dict):
        return Unreadable(f"is a JSON {json_type(row)}, not an object", text)
    if text.count("{") + text.count("[") > MAX_JSON_DEPTH and json_depth(row) > MAX_JSON_DEPTH:
        return Unreadable(f"is nested deeper than {MAX_JSON_DEPTH} levels", text)
    return row


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type, for messages."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return {str: "string", int: "number", float: "number", list: "array", dict: "object"}.get(
        type(value), type(value).__name__
    )


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.pos + 1}"
    return str(error)


def json_lines(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    with open_plain(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith(UTF_16):  # as a whole, not in this row: what is not UTF-8 would be each of them
                    raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, read_json_row(line.rstrip(b"\r\n"))


def json_document(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """A JSON array of rows, an object holding one, a single row, or (as BFCL does) JSON Lines under the name .json."""
    with open_plain(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        rows = strict_json(text)
    except ValueError as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if isinstance(read_json_row(first), dict):
            yield from json_lines(path)
            return
        raise UserError(f"{path}: is not JSON: {_reason(error)}; mend it, or convert it to JSON Lines") from error
    if isinstance(rows, dict):
        others = [
            key for key, value in rows.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        named = [key for key in others if key in ("data", "rows", "train", "examples")]
        if named and set(others) - set(named[:1]):
            raise UserError(
                f"{path}: holds several lists of objects ({', '.join(dict.fromkeys(named + others))}); "
                "write the rows of each into a file of its own"
            )
        rows = rows[named[0]] if named else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {json_type(rows)}; give an array of rows or JSON Lines")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            text = json.dumps(row, ensure_ascii=False)
            yield number, Unreadable(f"is a JSON {json_type(row)}, not an object", text)


def csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a CSV file with a header; an empty cell is an absent column, every other cell is text."""
    csv.field_size_limit(2**31 - 1)
    with open_plain(path) as file:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)  # else an open quote swallows the rows behind it
        try:
            header = next(reader, None)
            if not header or len(set(header)) != len(header):
                raise UserError(f"{path}: the first line must name each column once, it is {header}; add a header")
            for number, cells in enumerate(reader, start=1):
                if not cells:
                    continue
                if len(cells) > len(header):
                    yield number, Unreadable(f"has {len(cells)} cells under {len(header)} columns", str(cells))
                else:
                    yield number, {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text (line {reader.line_num + 1}); save it as UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} is no CSV ({error}); quote its cells") from error


def parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = pyarrow.BufferReader(open_plain(path).read()) if path.name.lower().endswith(".gz") else path
        with parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{path}: names a column twice ({', '.join(names)}); rename one of them")
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for row in arrow_rows(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: is no Parquet file ({str(error).splitlines()[0]}); fetch it again") from error
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: holds values that cannot be read ({reason}); convert it to JSON Lines") from error


def arrow_rows(batch) -> Iterator[dict | Unreadable]:
    """Rows of a pyarrow RecordBatch or Table as dicts, without what Arrow invented; Unreadable where a cell is broken.

    Arrow gives every struct of a column the union of all keys and fills the rest with nulls, so a null field of a
    struct is padding (or cannot be told from it) and is left out. Nulls inside lists, maps and JSON text are data.
    """
    types = {field.name: field.type for field in batch.schema}
    for row in batch.to_pylist():
        try:
            yield {name: _unpad(value, types[name]) for name, value in row.items() if value is not None}
        except ValueError as error:
            yield Unreadable(f"holds a cell that cannot be read: {error}", json.dumps(row, default=str))


def _unpad(value: Any, kind) -> Any:
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {name: _unpad(inner, fields[name]) for name, inner in value.items() if inner is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_unpad(inner, kind.value_type) for inner in value]
    if types.is_map(kind):
        names = [str(name) for name, _ in value]
        if len(set(names)) < len(names):
            raise ValueError(f"a map names a key twice ({', '.join(names)[:200]})")
        return {str(name): _unpad(inner, kind.item_type) for name, inner in value}
    if getattr(kind, "extension_name", None) == "arrow.json":
        return strict_json(value)
    return value
