"""Where rows come from: JSONL, JSON, CSV and Parquet files (plain or gzip), folders of splits, and the Hub.

A source is named by one string, the spec:

    rows.jsonl   rows.json.gz   rows.csv   rows.parquet      a file
    data/processed   data/processed@validation               a folder with one file per split (train by default)
    org/name   org/name:config   org/name:config@split       a dataset on the Hugging Face Hub
    rows.jsonl*0.5   org/name*3                              ... with a weight: a seeded half, every row three times
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@*]+))?(@(?P<split>[^*]+))?", re.ASCII)


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row's place when its text is no JSON object, so that no row is ever lost silently."""

    reason: str
    text: str


@dataclass(frozen=True)
class Spec:
    """One parsed source: `path` for a file or folder, `hub` for a dataset's id; exactly one of them is set."""

    text: str
    weight: float = 1.0
    path: Path | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None


def parse_spec(text: str | Path) -> Spec:
    """Take a spec apart. Raises UserError for a file that is not there or a weight that is no positive number."""
    text = str(text)
    body, weight = text, 1.0
    if not Path(text).exists() and "*" in text:
        body, _, number = text.rpartition("*")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not 0 < weight <= 1000:
            raise UserError(f"{text}: the weight {number!r} is no number above 0; write for example rows.jsonl*0.5")
    if Path(body).exists():
        return Spec(text, weight, path=Path(body))
    folder, _, split = body.rpartition("@")
    if folder and Path(folder).is_dir():
        return Spec(text, weight, path=Path(folder), split=split)
    match = _HUB.fullmatch(body)
    name = match["name"] if match else body
    looks_local = data_suffix(Path(name)) is not None or body.startswith((".", "/", "~")) or "\\" in body
    if match is None or looks_local or "/" not in body:
        raise UserError(
            f"{body}: there is no such file or folder; give a path to {', '.join(SUFFIXES)} (also .gz), "
            "or a Hub dataset as org/name:config@split"
        )
    return Spec(text, weight, hub=match["name"], config=match["config"], split=match["split"])


def read_rows(spec: str | Path | Spec) -> Iterator[tuple[str, int, dict[str, Any] | Unreadable]]:
    """Yield (source, row number from 1, row) in the order of the file; what is no JSON object comes as Unreadable.

    In JSON Lines the row number is the line number (blank lines are no rows), elsewhere it counts records.
    Key order and number types survive; Parquet's null padding of structs is removed, JSON text inside is left alone.
    """
    spec = spec if isinstance(spec, Spec) else parse_spec(spec)
    if spec.hub:
        yield from _hub_rows(spec)
        return
    path = split_file(spec.path, spec.split) if spec.path.is_dir() else spec.path
    suffix = data_suffix(path)
    try:
        if suffix in (".jsonl", ".ndjson"):
            rows = _json_lines(path)
        elif suffix == ".json":
            rows = _json_document(path)
        elif suffix in (".csv", ".tsv"):
            rows = _csv_records(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            rows = _parquet_records(path)
        else:
            raise UserError(f"{path}: unknown kind of file; rename it to one of {', '.join(SUFFIXES)} (also .gz)")
        answers = _bfcl_answers(path)
        for number, row in rows:
            if answers and isinstance(row, dict) and "ground_truth" not in row and row.get("id") in answers:
                row = row | {"ground_truth": answers[row["id"]]}
            yield str(path), number, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its name and rights") from error


def data_suffix(path: Path) -> str | None:
    """The suffix that names the kind of file, with `.gz` looked through; None when it is not a known one."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def split_file(folder: Path, split: str | None) -> Path:
    """The one data file of a split inside a folder written by prepare_data.py (or laid out like it)."""
    wanted = split or "train"
    found = sorted(p for p in folder.iterdir() if p.is_file() and data_suffix(p) and p.name.split(".")[0] == wanted)
    if len(found) == 1:
        return found[0]
    what = "no file" if not found else f"several files ({', '.join(p.name for p in found)})"
    raise UserError(f"{folder}: holds {what} for the split {wanted!r}; name the file itself, or folder@split")


def _bfcl_answers(path: Path) -> dict[str, Any]:
    """id -> ground truth from `possible_answer/` beside a BFCL question file, which is how BFCL ships them."""
    beside = path.parent / "possible_answer" / path.name
    if not path.name.startswith("BFCL_") or not beside.is_file():
        return {}
    rows = (row for _, row in _json_lines(beside) if isinstance(row, dict))
    return {row["id"]: row["ground_truth"] for row in rows if "id" in row and "ground_truth" in row}


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return row


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def strict_json(text: str) -> Any:
    """json.loads that refuses what JSON forbids and Python lets pass: doubled keys, NaN, Infinity.

    Raises ValueError (RecursionError for absurd nesting is turned into one).
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
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


def _json_lines(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, read_json_row(line.rstrip(b"\r\n"))


def _json_document(path: Path) -> Iterator[tuple[int, dict | Unreadable]]:
    """A JSON array of rows, an object holding one, a single row, or (as BFCL does) JSON Lines under the name .json."""
    with _open(path) as file:
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
            yield from _json_lines(path)
            return
        raise UserError(f"{path}: is not JSON: {_reason(error)}; mend it, or convert it to JSON Lines") from error
    if isinstance(rows, dict):
        inner = [value for key, value in rows.items() if key in ("data", "rows", "train", "examples")]
        rows = inner[0] if len(inner) == 1 and isinstance(inner[0], list) else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {json_type(rows)}; give an array of rows or JSON Lines")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            text = json.dumps(row, ensure_ascii=False)
            yield number, Unreadable(f"is a JSON {json_type(row)}, not an object", text)


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict | Unreadable]]:
    """Rows of a CSV file with a header; an empty cell is an absent column, every other cell is text."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
        reader = csv.reader(lines, delimiter=delimiter)
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


def _parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = pyarrow.BufferReader(_open(path).read()) if path.name.lower().endswith(".gz") else path
        with parquet.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for row in arrow_rows(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: is no Parquet file ({str(error).splitlines()[0]}); fetch it again") from error


def arrow_rows(batch) -> Iterator[dict]:
    """Rows of a pyarrow RecordBatch or Table as dicts, without what Arrow invented.

    Arrow gives every struct of a column the union of all keys and fills the rest with nulls, so a null field of a
    struct is padding (or cannot be told from it) and is left out. Nulls inside lists, maps and JSON text are data.
    """
    types = {field.name: field.type for field in batch.schema}
    for row in batch.to_pylist():
        yield {name: _unpad(value, types[name]) for name, value in row.items() if value is not None}


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
        return {str(name): _unpad(inner, kind.item_type) for name, inner in value}
    if getattr(kind, "extension_name", None) == "arrow.json":
        return strict_json(value)
    return value


def _hub_rows(spec: Spec) -> Iterator[tuple[str, int, dict]]:
    import datasets

    split = spec.split or "train"
    try:
        dataset = datasets.load_dataset(spec.hub, spec.config, split=split)
    except Exception as error:  # the library raises a dozen kinds: no network, no such id, gated, unknown split ...
        lines = str(error).splitlines()
        raise UserError(
            f"{spec.text}: the Hub dataset could not be loaded ({type(error).__name__}: {lines[0] if lines else ''}); "
            "check the id, config and split (org/name:config@split), the network, and HF_TOKEN if it is gated"
        ) from error
    number = 0
    for batch in dataset.with_format("arrow").iter(batch_size=512):
        for row in arrow_rows(batch):
            number += 1
            yield spec.text, number, row
