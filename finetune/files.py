"""Atomic writes of files and folders, file locks, JSON Lines, and the YAML and JSON files that a user writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.errors import NO_SPACE, UserError, no_room, user_errors
from formats.safe_yaml import load_yaml

if TYPE_CHECKING:
    from filelock import FileLock


def current_umask() -> int:
    """The process's umask; the system returns it only when it is set."""
    value = os.umask(0)
    os.umask(value)
    return value


def require_run_folder(folder: Path) -> None:
    """UserError when a run's folder has been deleted or renamed, or its disk is gone, while the run writes there."""
    if not folder.is_dir():
        raise UserError(f"the run's folder {folder} has disappeared; nothing more can be saved")


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk; folders cannot be synced on Windows."""
    with contextlib.suppress(OSError):  # some network file systems cannot
        if not path.is_dir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        elif os.name != "nt":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` that replaces it on success; readers never see a partial file.

    It is on the disk before it is renamed: otherwise a power failure could leave an empty file in its place.
    After an error `path` is as it was, and folders created for it are removed again. A device or a pipe (/dev/null,
    /dev/stdout) is written to, never replaced. Raises UserError when the folder is not writable or the disk is full.
    """
    path = Path(path)
    with user_errors(f"cannot write {path}", "choose a writable folder"):
        if path.exists() and not path.is_file() and not path.is_dir():
            file, temporary = path.open("wb"), None
        else:
            path = Path(os.path.realpath(path)) if path.is_symlink() else path  # the link itself stays
            created = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            file = os.fdopen(handle, "wb")
    if temporary is None:
        with file:
            yield file
        return
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes 0600 files
        with user_errors(f"cannot write {path}", "choose another file"):
            os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: another process has written into it
            for folder in created:
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free some space or choose another folder"
            ) from error
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_path(paths: Iterable[Path]) -> Path:
    """The first of the paths at which there is nothing."""
    return next(path for path in paths if not path.exists())


def write_bytes_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` as `open_atomic` does; returns the path."""
    with open_atomic(path) as file:
        file.write(data)
    return Path(path)


def write_together(files: dict[Path, bytes]) -> None:
    """Write several files as `open_atomic` does; none replaces its path before all are written."""
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            file = stack.enter_context(open_atomic(path))
            file.write(data)
            file.flush()


def write_to_cache(path: str | Path, data: bytes) -> None:
    """`write_bytes_atomic` into the cache folder; a UserError says how to choose another one."""
    try:
        write_bytes_atomic(path, data)
    except UserError as error:
        raise UserError(f"{error} with SANDWICH_CACHE=FOLDER") from error


def write_text_atomic(path: str | Path, text: str) -> Path:
    """`write_bytes_atomic` for UTF-8 text with "\\n" line ends on every system.

    Lone surrogates (Python's form of a file name that is not UTF-8) are written as escapes.
    """
    return write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON atomically."""
    return write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON Lines, not escaped to ASCII; lone surrogates, which UTF-8 cannot hold, become escapes.

    Values that JSON does not have (dates and NaN of a Parquet file or a database) are written as text.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        line = json.dumps(_nan_as_text(row), ensure_ascii=False, default=str)
    return line.encode("utf-8", errors="backslashreplace").decode("utf-8") + "\n"


def _nan_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_nan_as_text(inner) for inner in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines, atomically; returns the path."""
    return write_text_atomic(path, json_lines(rows))


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(map(json_line, rows))


@contextlib.contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it is renamed to `target` on success and deleted on an error.

    replace  True: an existing `target` is deleted once the new folder is in its place. False: a `target` that another
             process has created meanwhile is kept, and this one is discarded.

    Files and folders get the permissions of the umask. Raises UserError when the parent folder is not writable or the
    disk is full.
    """
    with user_errors(f"cannot write to {target.parent}", "choose another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            mode = 0o777 if path.is_dir() or path.stat().st_mode & 0o100 else 0o666
            path.chmod(mode & ~current_umask())
            sync(path)
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
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not (reason := no_room(error)):
            raise
        raise UserError(f"cannot write {target}: {reason}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def acquire_lock(path: Path, busy: str, *, timeout: float = 0) -> FileLock | None:
    """The file lock at `path`, held by this process; None on a file system without locks.

    timeout  seconds to wait, -1: without limit. Raises UserError(busy) when another process still holds it then.
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


def read_text(path: str | Path, what: str) -> str:
    """UTF-8 text of a file, without a byte order mark; UserError, naming `what` it is and the file, if that fails."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}; check its name and permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_shown(path: Path) -> str:
    """Text of a file that somebody else may have written, whatever its bytes; OSError also for a pipe or a device."""
    if path.exists() and not path.is_file() and not path.is_dir():  # reading it may never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_text(encoding="utf-8-sig", errors="replace")


def read_data(kind: str, path: str | Path) -> Any:
    """The content of a YAML or JSON file; UserError, naming `kind` and the file, when it cannot be read."""
    path = Path(path)
    is_json, content = path.suffix.lower() == ".json", read_text(path, kind)
    try:
        return json.loads(content, object_pairs_hook=_without_duplicates) if is_json else load_yaml(content)
    except ImportError:
        raise
    except Exception as error:
        raise UserError(f"{kind} {path} is not valid {'JSON' if is_json else 'YAML'}: {error}") from error


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"duplicate key {key!r}; keep one of them")
        mapping[key] = value
    return mapping
