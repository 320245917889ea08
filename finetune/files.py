"""Writing files so that a reader never sees half of one, and JSON Lines."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import NO_SPACE, UserError


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one that something else was put into stays, and so do those above it
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when all is written, so that a reader never sees half of it.

    Raises UserError when the folder cannot be written to or is full; after any error `path` is as it was, and so are
    the folders above it. A device or a pipe (/dev/null, /dev/stdout) is written to, never replaced.
    """
    path = Path(path)
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
        if special:
            handle = os.open(path, os.O_WRONLY)
        else:
            path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link stays one
            missing = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose a folder you may write to") from error
    if special:
        with os.fdopen(handle, "wb") as file:
            yield file
        return
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes 0600 files; give the result the permissions an ordinary open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; name a file you may replace") from error
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        _remove_empty(missing)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise UserError(f"cannot write {path}: {error.strerror}; make room or name another folder") from error
        raise


def write_bytes_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` as `open_atomic` does; returns the path."""
    with open_atomic(path) as file:
        file.write(data)
    return Path(path)


def write_together(files: dict[Path, bytes]) -> None:
    """Write several files as `open_atomic` does, none of them in its place before all are written."""
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            file = stack.enter_context(open_atomic(path))
            file.write(data)
            file.flush()


def write_to_cache(path: str | Path, data: bytes) -> None:
    """`write_bytes_atomic` into a folder that the user never named; UserError says how another one is named."""
    try:
        write_bytes_atomic(path, data)
    except UserError as error:
        raise UserError(f"{error} with SANDWICH_CACHE=FOLDER") from error


def write_text_atomic(path: str | Path, text: str) -> Path:
    """`write_bytes_atomic` for UTF-8 text with "\\n" line ends on every system.

    A path that is no text stands in a string as half surrogate pairs, which UTF-8 cannot hold: they become escapes.
    """
    return write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON Lines, readable in any language; half a surrogate pair, which UTF-8 cannot hold, as an escape.

    Values that JSON has no word for (dates and NaN of a Parquet file or a database) are written as text.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    except ValueError:
        row = _without_nan(row)
        line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, default=str) + "\n"
    return line


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines in UTF-8, aside first and renamed into place."""
    return write_text_atomic(path, json_lines(rows))


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(map(json_line, rows))
