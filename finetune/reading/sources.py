"""Where rows come from: JSONL, JSON, CSV and Parquet files (plain or gzip), folders of splits, and the Hub.

A source is named by one string, the spec:

    rows.jsonl   rows.json.gz   rows.csv   rows.parquet      a file
    data/processed   data/processed@validation               a folder with one file per split (train by default)
    org/name   org/name:config   org/name:config@split       a dataset on the Hugging Face Hub
    rows.jsonl*0.5   org/name*3                              ... with a weight: a seeded half, every row three times
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.reading.row_files import Unreadable, arrow_rows, csv_records, json_document, json_lines, parquet_records

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@*]+))?(@(?P<split>[^*]+))?", re.ASCII)


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
    if scheme := re.match(r"\w[\w+.-]*(?=://)", body):
        # What stands behind the scheme may hold a password: it is not repeated.
        raise UserError(
            f"{scheme[0]}://…: a URL is no source of rows; download the file, write a Hub dataset as org/name, "
            "and read a database with prepare_data.py --sql"
        )
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
    path = _file_of(spec)
    suffix = data_suffix(path)
    try:
        if suffix in (".jsonl", ".ndjson"):
            rows = json_lines(path)
        elif suffix == ".json":
            rows = json_document(path)
        elif suffix in (".csv", ".tsv"):
            rows = csv_records(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            rows = parquet_records(path)
        else:
            raise UserError(f"{path}: unknown kind of file; rename it to one of {', '.join(SUFFIXES)} (also .gz)")
        answers = _bfcl_answers(path)
        for number, row in rows:
            if answers and isinstance(row, dict) and "ground_truth" not in row and str(row.get("id")) in answers:
                row = row | {"ground_truth": answers[str(row["id"])]}
            yield str(path), number, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its name and rights") from error


def _file_of(spec: Spec) -> Path:
    return split_file(spec.path, spec.split) if spec.path.is_dir() else spec.path


def files_of(spec: Spec) -> list[Path] | None:
    """Every file that `read_rows` opens for a source; None for a Hub dataset."""
    if spec.hub:
        return None
    path = _file_of(spec)
    answers = _answers_beside(path)
    return [path] if answers is None else [path, answers]


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


def _answers_beside(path: Path) -> Path | None:
    beside = path.parent / "possible_answer" / path.name
    return beside if path.name.startswith("BFCL_") and beside.is_file() else None


def refuse_same_file(sources: Iterable[str | Path | Spec], target: str | Path) -> None:
    """Raise UserError when writing `target` would replace a file that is read."""
    target = Path(target)
    for source in sources:
        spec = source if isinstance(source, Spec) else parse_spec(source)
        if target.exists() and any(path.exists() and target.samefile(path) for path in files_of(spec) or ()):
            raise UserError(f"{target} is the file that is read; name another one for the output")


def _bfcl_answers(path: Path) -> dict[str, Any]:
    """id -> ground truth from `possible_answer/` beside a BFCL question file, which is how BFCL ships them."""
    beside = _answers_beside(path)
    if beside is None:
        return {}
    rows = (row for _, row in json_lines(beside) if isinstance(row, dict))
    return {str(row["id"]): row["ground_truth"] for row in rows if "id" in row and "ground_truth" in row}


def _hub_rows(spec: Spec) -> Iterator[tuple[str, int, dict | Unreadable]]:
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
