"""Failures a user can cause end in one line and exit code 2; a traceback is for bugs only."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

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
            if error.errno in NO_SPACE:
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
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    return bool(re.search(r"os error (27|28|122)\b|No space left|file write failed|File too large", str(error)))


# What comes of the name that a user gave; a disk or a network that fails is no refusal, and a sweep tries it again.
_NAMED_WRONGLY = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL,
)  # fmt: skip
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
