"""Failures a user can cause end in one line and exit code 2; a traceback is for bugs only."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from formats import FormatError


class UserError(Exception):
    """What is wrong, where (file and row), what to do; shown to the user as one line."""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a script's `main`: UserError and FormatError become `error: …` on stderr and exit status 2.

    So does what the system says of a file (a name that is too long, a folder one may not look into). A full disk is one
    line too, with exit status 1: it is no refusal, and a sweep tries the run again. Ctrl-C becomes
    exit status 130 and a closed pipe (`| head`) a quiet exit, both without a traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        code = 0
        for name in ("stdout", "stderr"):  # closed by whoever started us (>&-): Python has None in their place
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            # A pipe on Windows and the C locale know few letters; what they lack must not end a run that went well.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()  # or Python does it when nobody can catch what comes of it
            return code
        except (UserError, FormatError) as error:
            full = error.__cause__ is not None and no_room(error.__cause__)
            return _failed(str(error), code=1 if full else 2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            _leave_stdout()
            return code
        except OSError as error:
            if error.errno in _NO_ROOM:
                if error.filename is None:
                    _leave_stdout()
                return _failed(f"{error.filename or 'a file'}: {error.strerror}; make room and start again", code=1)
            if error.filename is None or error.errno not in _NAMED_WRONGLY:
                raise
            return _failed(f"{error.filename}: {error.strerror or error}; check its name and rights")

    return wrapped


def _leave_stdout() -> None:
    """Python flushes stdout once more at exit; point it at nothing so that flush cannot fail again."""
    with contextlib.suppress(OSError, ValueError):  # a test's stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(reason: str, code: int = 2) -> int:
    reason = re.sub(r"(?<=://)[^/\s@]*@", "***@", reason)  # a password in a URL
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return code


def no_room(error: BaseException) -> bool:
    """Whether a disk or a quota was full; the libraries that write weights have errors of their own for that."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return bool(re.search(r"os error (27|28|122)\b|No space left|file write failed|File too large", str(error)))


# What comes of the name that a user gave; a disk or a network that fails is no refusal, and a sweep tries it again.
_NAMED_WRONGLY = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL,
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
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
