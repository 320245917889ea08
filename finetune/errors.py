"""Errors that a user can cause end in one line and exit status 2; a traceback is for bugs only."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune import packages
from finetune.progress import printable, protect_rich, without_passwords
from formats import FormatError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of a path that the user gave. A disk or a network that fails is not one: a sweep tries such a run again.
_BAD_PATH = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL,
)  # fmt: skip


class UserError(Exception):
    """What is wrong, where (file and row), what to do; shown to the user as one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is treated like Ctrl-C but for the exit status."""


@contextlib.contextmanager
def user_errors(what: str, advice: str) -> Iterator[None]:
    """A system error inside the block becomes a UserError, `what: reason; advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}; {advice}") from error


def require(purpose: str, *modules: str) -> None:
    """Raise UserError when packages are missing that `purpose` (such as "--web") needs; imports nothing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        names = " and ".join(packages.PACKAGE_OF.get(module, module) for module in missing)
        absent = f"which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(f"{purpose} needs {names}, {absent}; run: {packages.install_command(*missing)}")


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a script's `main`: errors that a user can cause become one `error: …` line on stderr.

    UserError, FormatError, a missing package and system errors of a path: exit status 2. A full disk or memory: 1, so
    that a sweep tries the run again. Ctrl-C: 130; SIGTERM: 143. A closed pipe (`| head`): no message and the status of
    `main`.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        code = 0
        protect_rich()
        for name in ("stdout", "stderr"):  # None where the caller has closed it (>&-)
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
            stream = getattr(sys, name)
            if os.name != "nt" and isinstance(stream, io.TextIOWrapper) and stream.isatty():
                raw = io.BufferedWriter(_Terminal(stream.fileno(), "wb", closefd=False))
                setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))
        for stream in (sys.stdout, sys.stderr):
            # A pipe on Windows and the C locale cannot encode every letter; that must not fail a finished run.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            packages.apply_dotenv()
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()  # an error of Python's own flush at exit could not be caught
            return code
        except (UserError, FormatError) as error:
            full = error.__cause__ is not None and no_room(error.__cause__)
            return _report(str(error), code=1 if full else 2)
        except ModuleNotFoundError as error:
            if packages.is_own(error.name):
                raise
            return _report(packages.missing_message(str(error.name)))
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            return 143 if isinstance(error, Terminated) else 130
        except BrokenPipeError:
            _discard_stdout()
            return code
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
            return _report(f"out of memory ({reason}); what helps is in docs/memory.md", code=1)
        except OSError as error:
            if error.errno in NO_SPACE:
                if error.filename is None:
                    _discard_stdout()
                return _report(f"{error.filename or 'a file'}: {error.strerror}; free some space and retry", code=1)
            if error.filename is None or error.errno not in _BAD_PATH:
                raise
            return _report(f"{error.filename}: {error.strerror or error}; check its name and permissions")
        except BaseException as error:  # not an Exception: a Rust library panics, such as at a pattern of a tokenizer
            if type(error).__name__ != "PanicException":
                raise
            return _report(f"a library failed ({error}); a tokenizer or another file of the model may be damaged")

    return wrapped


class _Terminal(io.FileIO):
    """A terminal that may be closed while the command works, which must not end it: what it writes then is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that Python's flush at exit cannot fail again."""
    with contextlib.suppress(OSError, ValueError):  # a test's stdout has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(reason: str, code: int = 2) -> int:
    print(f"error: {printable(without_passwords(' '.join(reason.split())))}", file=sys.stderr)
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error has a class of its own; PyTorch's CPU allocator and C++ raise a plain RuntimeError."""
    own = "out of memory|can't allocate memory|std::bad_alloc"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and re.search(own, str(error)) is not None)
    )


def no_room(error: BaseException) -> str | None:
    """The system's words for a full disk or quota where the error means one; safetensors and torch have their own.

    "unexpected pos" is torch.save's, after a write that was cut short; it does not say why.
    """
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return os.strerror(error.errno)
    own = r"os error (27|28|122)\b|No space left|file write failed|File too large|unexpected pos \d+ vs"
    if not (found := re.search(own, str(error))):
        return None
    return os.strerror(int(found[1])) if found[1] else "No space left on device or in a quota"
