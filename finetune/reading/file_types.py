"""The type of a file whose name does not tell it, by its first bytes."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.reading.row_files import UTF_8_MARK, open_plain

_GIT_LFS = b"version https://git-lfs"


def type_by_content(path: Path) -> str:
    """`.parquet`, `.arrow` or `.json`. Raises UserError that says what the file holds and what to do."""
    with path.open("rb") as file:
        begin = file.read(4096)
    if begin.startswith(b"\x1f\x8b"):
        if not path.name.lower().endswith(".gz"):
            raise UserError(f"{path}: is a gzip file; add .gz to its name")
        with open_plain(path) as file:
            begin = file.read(4096)
    if begin.startswith(b"PAR1"):
        return ".parquet"
    if begin.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ".arrow"
    if begin.removeprefix(UTF_8_MARK).lstrip()[:1] in (b"{", b"["):
        return ".json"
    refuse_other_types(path, begin)
    raise UserError(f"{path}: its type is not known; save the rows as .jsonl, .json, .csv, .tsv or .parquet (also .gz)")


def refuse_other_types(path: Path, begin: bytes) -> None:
    """Raise UserError for a file that holds something else than its name may say."""
    if begin.startswith(_GIT_LFS):
        raise UserError(f"{path}: is a pointer of Git LFS, not the data; run git lfs pull in its folder")
    if begin.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in begin + path.read_bytes()[-65536:]:
        raise UserError(f"{path}: is an Excel workbook; save its sheet as CSV (UTF-8)")
    if begin.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"{path}: is an old Excel workbook; save its sheet as CSV (UTF-8)")
    if begin.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: is a zip archive; unpack it and name the file in it")
    if begin.startswith(b"SQLite format 3"):
        raise UserError(f"{path}: is an SQLite database; read it with prepare_data.py --sql sqlite:///{path}")
