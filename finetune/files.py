"""Atomic writes of files and folders, file locks, JSON Lines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.errors import NO_SPACE, UserError, no_room

if TYPE_CHECKING:
    from filelock import FileLock


def current_umask() -> int:
    """The process's umask, which the system only tells when it is set."""
    value = os.umask(0)
    os.umask(value)
    return value


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
        os.chmod(temporary, 0o666 & ~current_umask())
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


@contextlib.contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it is renamed to `target` on success and deleted on an error.

    replace  True: an existing `target` is deleted once the new folder is in its place. False: a `target` that another
             process has made meanwhile is kept, and this one is discarded.

    Files and folders get the permissions of the umask. Raises UserError when the folder above cannot be written to or
    the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}; choose another folder") from error
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            mode = 0o777 if path.is_dir() or path.stat().st_mode & 0o100 else 0o666
            path.chmod(mode & ~current_umask())
        old = temporary.with_suffix(".old")
        if replace and target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except BaseException as error:  # Ctrl-C too
            if old.exists():
                old.rename(target)
            if replace or not isinstance(error, OSError) or not target.is_dir():
                raise
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not no_room(error):
            raise
        raise UserError(f"{target}: the disk is full; free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def acquire_lock(path: Path, busy: str, *, timeout: float = 0) -> FileLock | None:
    """The file lock at `path`, held by this process; None on a file system without locks.

    timeout  seconds to wait, -1 for ever. Raises UserError(busy) when another process still holds it then.
    """
    import filelock  # `--doctor` runs where nothing is installed

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout as error:
        raise UserError(busy) from error
    except (OSError, NotImplementedError) as error:  # some network file systems
        if getattr(error, "filename", None):
            raise
        return None
    return lock


def release_lock(lock: FileLock | None) -> None:
    """Release a lock of `acquire_lock` and delete its file."""
    if lock is not None:
        with contextlib.suppress(OSError):  # Windows: another process has opened it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
