"""Limits for files of rows: the length of one line, and how far a small gzip file may expand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from finetune.errors import UserError

MAX_ROW_BYTES = 64 * 1024 * 1024
SHOWN_BYTES = 1000  # of a longer line
# JSON and CSV text compresses 5 to 50 times; the format's maximum is about 1000.
MAX_GZIP_RATIO, MIN_GZIP_BYTES = 200, 256 * 1024 * 1024
_CHUNK = 1024 * 1024


def limited_lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """(line, False) for each line of the file; (its first bytes, True) for one longer than `MAX_ROW_BYTES`."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        is_cut = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
        if is_cut:
            line = line[:SHOWN_BYTES]
            while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                pass
        yield line, is_cut


def read_all(file: IO[bytes], path: Path) -> bytes:
    """The complete content. Raises UserError for a gzip file that expands beyond any text's ratio."""
    if not path.name.lower().endswith(".gz"):
        return file.read()
    limit = max(MIN_GZIP_BYTES, MAX_GZIP_RATIO * path.stat().st_size)
    content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: expands to more than {MAX_GZIP_RATIO} times its size; decompress it, and check it")
    return content
