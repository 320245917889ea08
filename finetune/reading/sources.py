"""Where rows come from: JSONL, JSON, CSV, Parquet and Arrow files (plain or gzip), folders of splits, and the Hub.

A source is named by one string, the spec:

    rows.jsonl   rows.json.gz   rows.csv   rows.parquet      a file
    data/processed   data/processed@validation               a folder with one file per split (train by default), a
    hub_clone:config@split                                   clone of a Hub dataset, or what save_to_disk wrote
    org/name   org/name:config   org/name:config@split       a dataset on the Hugging Face Hub
    rows.jsonl*0.5   org/name*3                              with a weight: a random half, every row three times
"""

from __future__ import annotations

import difflib
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.reading.file_types import refuse_other_types, type_by_content
from finetune.reading.folders import files_of_split
from finetune.reading.row_files import (
    Unreadable,
    arrow_records,
    arrow_rows,
    csv_records,
    json_document,
    json_lines,
    parquet_records,
)
from finetune.reading.session_logs import read_sessions

MAX_WEIGHT = 1000
READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict | Unreadable]]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": partial(csv_records, delimiter=","),
    ".tsv": partial(csv_records, delimiter="\t"),
    ".parquet": parquet_records,
    ".arrow": arrow_records,
}
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
    """Parse a spec. Raises UserError for a file that does not exist or a weight that is not a positive number."""
    text = str(text)
    body, weight = text, 1.0
    if not Path(text).exists() and "*" in text:
        body, _, number = text.rpartition("*")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not 0 < weight <= MAX_WEIGHT:
            raise UserError(
                f"{text}: the weight {number!r} must be > 0 and <= {MAX_WEIGHT}; write for example rows.jsonl*0.5"
            )
    if Path(body).exists():
        return Spec(text, weight, path=Path(body))
    if scheme := re.match(r"\w[\w+.-]*(?=://)", body):
        # The rest of the URL may hold a password: it is not shown.
        raise UserError(
            f"{scheme[0]}://…: URLs cannot be read; download the file, write a Hub dataset as org/name, "
            "and read a database with prepare_data.py --sql"
        )
    place, _, split = body.rpartition("@") if "@" in body else (body, "", "")
    if Path(place).is_dir():
        return Spec(text, weight, path=Path(place), split=split or None)
    folder, _, config = place.rpartition(":")
    if folder and Path(folder).is_dir():
        return Spec(text, weight, path=Path(folder), config=config, split=split or None)
    match = _HUB.fullmatch(body)
    is_file_name = (
        data_suffix(Path(match["name"] if match else body)) or body.startswith((".", "/", "~")) or "\\" in body
    )
    if match is None or is_file_name or "/" not in body:
        raise UserError(
            f"{body}: there is no such file or folder; give a path to {', '.join(READERS)} (also .gz), "
            "or a Hub dataset as org/name:config@split"
        )
    if (parent := Path(match["name"]).parent).is_dir():
        close = difflib.get_close_matches(Path(match["name"]).name, [path.name for path in parent.iterdir()], n=1)
        advice = f"did you mean {parent / close[0]}?" if close else "check the path"
        raise UserError(f"{body}: the folder {parent} has no such file or folder; {advice}")
    return Spec(text, weight, hub=match["name"], config=match["config"], split=match["split"])


def read_rows(spec: str | Path | Spec) -> Iterator[tuple[str, int, dict[str, Any] | Unreadable]]:
    """Yield (source, row number from 1, row) in the order of the file; a row that is not a JSON object as Unreadable.

    In JSON Lines the row number is the line number, elsewhere it counts records. Key order and number types are
    preserved; Parquet's null padding of structs is removed. Raises UserError.
    """
    spec = spec if isinstance(spec, Spec) else parse_spec(spec)
    if spec.hub:
        yield from _hub_rows(spec)
        return
    for path in _files_of(spec):
        yield from _rows_of_file(path)


def _rows_of_file(path: Path) -> Iterator[tuple[str, int, dict[str, Any] | Unreadable]]:
    try:
        suffix = _type_of(path)
        answers = _bfcl_answers(path)
        for number, row in read_sessions(READERS[suffix](path)):
            if answers and isinstance(row, dict) and "ground_truth" not in row and str(row.get("id")) in answers:
                row = row | {"ground_truth": answers[str(row["id"])]}
            yield str(path), number, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}); download it again") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check its name and permissions"
        ) from error


def _type_of(path: Path) -> str:
    """The suffix in READERS for a file; for an unknown one its content decides. Raises UserError."""
    if (suffix := data_suffix(path)) is None:
        return type_by_content(path)
    with path.open("rb") as file:
        refuse_other_types(path, file.read(64))
    return suffix


def files_of(spec: Spec) -> list[Path] | None:
    """Every file that `read_rows` opens for a source; None for a Hub dataset."""
    if spec.hub:
        return None
    paths = _files_of(spec)
    return [*paths, *filter(None, map(_answers_file, paths))]


def data_suffix(path: Path) -> str | None:
    """The suffix that tells the type of file, ignoring `.gz`; None when it is unknown."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def refuse_same_file(sources: Iterable[str | Path | Spec], target: str | Path) -> None:
    """Raise UserError when writing `target` would replace a file that is read."""
    target = Path(target)
    for source in sources:
        spec = source if isinstance(source, Spec) else parse_spec(source)
        if target.exists() and any(path.exists() and target.samefile(path) for path in files_of(spec) or ()):
            raise UserError(f"{target} is the file that is read; choose another output")


def _files_of(spec: Spec) -> list[Path]:
    """The file itself, or the files of a split in a folder (`train` by default)."""
    if not spec.path.is_dir():
        if not spec.path.is_file():  # rows are read more than once; a pipe without a writer never ends
            raise UserError(f"{spec.path}: not a regular file (a pipe or a device); save the rows in a file")
        return [spec.path]
    return files_of_split(spec.path, spec.split or "train", lambda path: data_suffix(path) is not None, spec.config)


def _answers_file(path: Path) -> Path | None:
    """The file in `possible_answer/` that BFCL ships for a question file."""
    answers = path.parent / "possible_answer" / path.name
    return answers if path.name.startswith("BFCL_") and answers.is_file() else None


def _bfcl_answers(path: Path) -> dict[str, Any]:
    """id -> ground truth for a BFCL question file; {} for other files."""
    answers = _answers_file(path)
    rows = (row for _, row in json_lines(answers) if isinstance(row, dict)) if answers else ()
    return {str(row["id"]): row["ground_truth"] for row in rows if "id" in row and "ground_truth" in row}


def _hub_rows(spec: Spec) -> Iterator[tuple[str, int, dict | Unreadable]]:
    import datasets

    try:
        dataset = datasets.load_dataset(spec.hub, spec.config, split=spec.split or "train")
    except Exception as error:  # the library raises many types: no network, no such id, gated, unknown split ...
        lines = str(error).splitlines()
        raise UserError(
            f"{spec.text}: the Hub dataset could not be loaded ({type(error).__name__}: {lines[0] if lines else ''}); "
            "check the id, config and split (org/name:config@split), the network, and HF_TOKEN if it is gated"
        ) from error
    batches = dataset.with_format("arrow").iter(batch_size=512)
    for number, row in enumerate((row for batch in batches for row in arrow_rows(batch)), start=1):
        yield spec.text, number, row
