"""Readers of single files: JSON Lines, JSON, CSV and Parquet, plain or gzip, each yielding (row number, row)."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError
from finetune.reading.size_limits import MAX_ROW_BYTES, limited_lines, read_all
from formats.calls import MAX_JSON_DEPTH, STRICT, json_depth, skip_space

ROW_LISTS = ("data", "rows", "train", "examples")  # keys under which a JSON document may hold its rows
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values that hold nothing
UTF_8_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_JSON_TYPES = {str: "string", int: "number", float: "number", list: "array", dict: "object", bool: "boolean"}


class RowError(ValueError):
    """Why a row cannot be used; the caller adds file and row number."""


@dataclass(frozen=True)
class Unreadable:
    """Takes a row's place when its text is not a JSON object, so that the row is still counted and reported."""

    reason: str
    text: str


def open_plain(path: Path) -> IO[bytes]:
    """The file opened for reading, decompressed if its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def strict_json(text: str) -> Any:
    """json.loads that also rejects duplicate keys, NaN, Infinity and numbers too large for a float.

    Raises ValueError, also for nesting that is too deep.
    """
    try:
        return STRICT.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def decode_json(value: Any, name: str, *, times: int = 1) -> Any:
    """`value` with JSON text decoded, up to `times` times if it was encoded repeatedly; blank text becomes None.

    Raises RowError that begins with `name`.
    """
    for _ in range(times):
        if not isinstance(value, str):
            break
        try:
            value = strict_json(value) if value.strip() else None
        except ValueError as error:
            raise RowError(f"{name}: not valid JSON ({error})") from error
    return value


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type, for messages."""
    return "null" if value is None else _JSON_TYPES.get(type(value), type(value).__name__)


def as_text(value: Any) -> str:
    """Text unchanged; anything else as JSON that is not ASCII-escaped, as chat templates write it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds a value that JSON cannot represent ({error})") from error


def json_stream(text: str, where: str) -> list[Any]:
    """JSON values separated by white space or commas; a list is replaced by its items."""
    values, position = [], 0
    while position < len(text):
        if text[position] in " \t\r\n,":
            position += 1
            continue
        try:
            value, position = STRICT.raw_decode(text, position)
        except ValueError as error:
            raise RowError(f"{where} holds functions that are not valid JSON ({error})") from error
        values += value if isinstance(value, list) else [value]
    return values


def read_json_row(line: bytes) -> dict[str, Any] | Unreadable:
    """One line of JSON Lines as a dict, or Unreadable with the reason."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 text (byte {error.start})", line.decode("utf-8", "replace"))
    try:
        row = strict_json(text)
    except ValueError as error:
        return Unreadable(f"is not JSON: {_reason(error)}", text)
    row = messages_row(row)
    if not isinstance(row, dict):
        return Unreadable(f"is a JSON {json_type(row)}, not an object", text)
    if text.count("{") + text.count("[") > MAX_JSON_DEPTH and json_depth(row) > MAX_JSON_DEPTH:
        return Unreadable(f"is nested deeper than {MAX_JSON_DEPTH} levels", text)
    return row


def messages_row(row: Any) -> Any:
    """A row that is a bare list of messages (XTuner) or of questions and answers as a row with `messages`."""
    if not isinstance(row, list) or not row:
        return row
    if is_list_of_two(row):
        return {"messages": [row]}
    is_list = all(is_list_of_two(m) or (isinstance(m, dict) and ("role" in m or "from" in m)) for m in row)
    return {"messages": row} if is_list else row


def is_list_of_two(value: Any) -> bool:
    """Whether a value is a list of two texts, a question and its answer."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _reason(error: ValueError) -> str:
    return f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def json_lines(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a JSON Lines file, numbered by line; blank lines are skipped.

    Objects that go over several lines are read too if the complete file consists of them.
    """
    with open_plain(path) as file:
        first = True
        for number, (line, is_cut) in enumerate(limited_lines(file), start=1):
            if is_cut:
                yield number, Unreadable(f"is longer than {MAX_ROW_BYTES:,} bytes", line.decode("utf-8", "replace"))
                continue
            if number == 1:
                if line.startswith(UTF_16_MARKS):
                    raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
                line = line.removeprefix(UTF_8_MARK)
            if not line.strip():
                continue
            row = read_json_row(line.rstrip(b"\r\n"))
            if first and isinstance(row, Unreadable) and path.is_file():
                if (rows := _pretty_printed(path)) is not None:
                    yield from rows
                    return
                if line.strip() in (b"{", b"[", b"[{") and file.read(1):
                    raise UserError(
                        f"{path}: an object goes over several lines, but the file is not valid JSON; fix it, or write "
                        "one object a line"
                    )
            first = False
            yield number, row


def _pretty_printed(path: Path) -> list[tuple[int, dict | Unreadable]] | None:
    """(line on which it begins, object) of a file of JSON objects over several lines; None for any other file."""
    with open_plain(path) as file:
        raw = read_all(file, path).removeprefix(UTF_8_MARK)
    rows: list[tuple[int, dict | Unreadable]] = []
    try:
        text = raw.decode("utf-8")
        at, line = skip_space(text, 0), 1 + text.count("\n", 0, skip_space(text, 0))
        while at < len(text):
            _, end = STRICT.raw_decode(text, at)
            part = text[at:end]
            if not rows and part.startswith("[") and not text[end:].strip() and "\n" in part.strip():
                items = strict_json(part)  # an array over several lines, named .jsonl
                return [(number, _as_row(item)) for number, item in enumerate(items, start=1)]
            rows.append((line, read_json_row(part.encode())))
            start, at = at, skip_space(text, end)
            line += text.count("\n", start, at)
    except (ValueError, RecursionError):
        return None
    return rows if all(isinstance(row, dict) for _, row in rows) else None


def _as_row(item: Any) -> dict | Unreadable:
    if isinstance(item, dict):
        return item
    return Unreadable(f"is a JSON {json_type(item)}, not an object", json.dumps(item, ensure_ascii=False))


def json_document(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """A JSON array of rows, an object that holds one, a single row, or JSON Lines named .json (as BFCL's files are)."""
    with open_plain(path) as file:
        raw = read_all(file, path).removeprefix(UTF_8_MARK)
    try:
        rows = strict_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        first_line = next((line for line in raw.split(b"\n") if line.strip()), b"")
        if isinstance(read_json_row(first_line), dict):
            yield from json_lines(path)
            return
        raise UserError(f"{path}: is not JSON: {_reason(error)}; fix it, or convert it to JSON Lines") from error
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        named = [key for key in lists if key in ROW_LISTS]
        if named and len(lists) > 1:
            raise UserError(f"{path}: holds several lists of objects ({', '.join(lists)}); write one file for each")
        rows = rows[named[0]] if named else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {json_type(rows)}; give an array of rows or JSON Lines")
    for number, row in enumerate(map(messages_row, rows), start=1):
        yield number, _as_row(row)


def csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a CSV file with a header; an empty cell is an absent column, every other cell is text.

    A header that is one cell with `delimiter`, but several with a semicolon or a tab, is read with that one.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = _delimiter(path, delimiter)
    with open_plain(path) as file:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(_lines(file, path)))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)  # not strict, an open quote swallows later rows
        try:
            header = next(reader, None)
            if not header or len(set(header)) != len(header):
                raise UserError(
                    f"{path}: the first line must name each column once, it is {header or 'empty'}; add a header"
                )
            for number, cells in enumerate(reader, start=1):
                if len(cells) > len(header):
                    yield number, Unreadable(f"has {len(cells)} cells under {len(header)} columns", str(cells))
                elif cells:
                    yield number, {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text (line {reader.line_num + 1}); save it as UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} is not valid CSV ({error}); quote its cells") from error


def _delimiter(path: Path, usual: str) -> str:
    """The delimiter under which the first two lines have the same number of cells, several of them."""
    if not path.is_file():
        return usual
    with open_plain(path) as file:
        lines = [line.decode("utf-8-sig", "replace") for line in (file.readline(65536), file.readline(65536))]
    for delimiter in (usual, *(one for one in (",", ";", "\t") if one != usual)):
        try:
            cells = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
        except csv.Error:
            continue
        if cells and cells[0] > 1 and len(set(cells)) == 1:
            return delimiter
    return usual


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    for number, (line, is_cut) in enumerate(limited_lines(file), start=1):
        if is_cut:
            raise UserError(f"{path}: line {number} is longer than {MAX_ROW_BYTES:,} bytes; split or remove it")
        yield line


def arrow_records(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of an Arrow file, in the stream format (that of the `datasets` library) or in the file format."""
    from pyarrow import ipc

    def batches(source):
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
        found = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        return reader.schema, map(valid, found)

    def valid(batch):
        batch.validate(full=True)  # damaged offsets would be read from anywhere in memory
        return batch

    return _records_of_batches(path, batches, "an Arrow file")


def parquet_records(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a Parquet file, read in batches."""
    from pyarrow import parquet

    def batches(source):
        file = parquet.ParquetFile(source)
        return file.schema_arrow, file.iter_batches(batch_size=512)

    return _records_of_batches(path, batches, "a Parquet file")


def _records_of_batches(path: Path, batches, what: str) -> Iterator[tuple[int, dict | Unreadable]]:
    """Numbered rows; `batches` gives (schema, record batches) of an open file. Raises UserError."""
    import pyarrow

    try:
        if path.name.lower().endswith(".gz"):
            with open_plain(path) as plain:
                source = pyarrow.BufferReader(read_all(plain, path))
        else:
            source = pyarrow.OSFile(str(path))
        with source:
            schema, found = batches(source)
            if len(set(schema.names)) < len(schema.names):
                raise UserError(f"{path}: duplicate column name ({', '.join(schema.names)}); rename one of them")
            yield from enumerate((row for batch in found for row in arrow_rows(batch)), start=1)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file system's; Arrow's own have no number
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not {what} ({reason}); download or save it again") from error
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: holds values that cannot be read ({reason}); convert it to JSON Lines") from error


def arrow_rows(batch) -> Iterator[dict | Unreadable]:
    """Rows of a pyarrow RecordBatch or Table as dicts, without Arrow's padding; Unreadable where a cell is broken.

    Arrow gives every struct of a column the union of all keys and pads with nulls, so null fields of a struct are
    dropped. Nulls inside lists, maps and JSON text are data.
    """
    types = {field.name: field.type for field in batch.schema}
    for row in batch.to_pylist():
        try:
            yield {name: _without_padding(value, types[name]) for name, value in row.items() if value is not None}
        except ValueError as error:
            yield Unreadable(f"holds a cell that cannot be read: {error}", json.dumps(row, default=str))


def _without_padding(value: Any, kind) -> Any:
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_struct(kind):
        inner_types = {field.name: field.type for field in kind}
        return {name: _without_padding(inner, inner_types[name]) for name, inner in value.items() if inner is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_without_padding(inner, kind.value_type) for inner in value]
    if types.is_map(kind):
        names = [str(name) for name, _ in value]
        if len(set(names)) < len(names):
            raise ValueError(f"duplicate key in a map ({', '.join(names)[:200]})")
        return {str(name): _without_padding(inner, kind.item_type) for name, inner in value}
    if getattr(kind, "extension_name", None) == "arrow.json":
        return strict_json(value)
    return value
