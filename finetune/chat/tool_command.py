"""The user's own program that executes a call: JSON on its stdin, the result on its stdout. Never a shell."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Any

from finetune.errors import UserError

MAX_RESULT_CHARACTERS = 100_000
MAX_OUTPUT_BYTES, MAX_STDERR_BYTES = 1_000_000, 100_000_000
KEPT_STDERR_BYTES = 10_000


@dataclass(frozen=True)
class ToolCommand:
    """A program with its arguments, and the seconds it may take for one call."""

    argv: tuple[str, ...]
    timeout: float = 60.0

    def __call__(self, call: dict[str, Any]) -> str:
        """The result of {"name", "arguments"}; a failure is a result as well, {"error": …}, and never an exception."""
        line = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False) + "\n"
        # Files instead of pipes: a child of the program may keep a pipe open after the program has ended.
        with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            sent.write(line.encode("utf-8", "replace"))
            sent.seek(0)
            try:
                process = subprocess.Popen(self.argv, stdin=sent, stdout=out, stderr=err, start_new_session=True)
            except OSError as error:
                return failure(f"cannot start the tool's program: {error.strerror or error}")
            try:
                if problem := self._wait(process, out, err):
                    return failure(problem)
            finally:
                if process.poll() is None:
                    _kill(process)
            result = _tail(out, MAX_OUTPUT_BYTES)
            if process.returncode:
                lines = _tail(err, KEPT_STDERR_BYTES).splitlines() or result.splitlines()
                last = f": {lines[-1]}" if lines else ""
                return failure(f"the tool's program ended with status {process.returncode}{last}")
        if len(result) > MAX_RESULT_CHARACTERS:
            return failure(f"the result has {len(result):,} characters; the limit is {MAX_RESULT_CHARACTERS:,}")
        return result or failure("the tool's program wrote nothing")

    def _wait(self, process: subprocess.Popen, out: IO[bytes], err: IO[bytes]) -> str | None:
        """Wait until the program ends; returns a problem when it takes too long or writes too much."""
        end, running = time.monotonic() + self.timeout, True
        while running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                running = False
            if os.fstat(out.fileno()).st_size > MAX_OUTPUT_BYTES:
                return f"the result has more than {MAX_OUTPUT_BYTES:,} bytes; the tool's program was stopped"
            if os.fstat(err.fileno()).st_size > MAX_STDERR_BYTES:
                return f"the tool's program wrote more than {MAX_STDERR_BYTES:,} bytes to stderr and was killed"
            if running and time.monotonic() > end:
                return f"the tool's program took longer than {self.timeout:g} s and was killed"
        return None


def parse_tool_command(text: str | None, timeout: float = 60.0) -> ToolCommand | None:
    """The program and arguments of `--tool_command`, split as a shell would; on Windows a backslash is literal.

    Raises UserError for an unclosed quotation mark or a program that cannot be found.
    """
    if text is None:
        return None
    try:
        argv = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise UserError(f"--tool_command {text}: {error}; close the quotation mark") from error
    if os.name == "nt":
        argv = [word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word for word in argv]
    if not argv:
        raise UserError("--tool_command is empty; name a program")
    if shutil.which(argv[0]) is None:
        raise UserError(f"--tool_command {text}: cannot run {argv[0]}; give its full path or check its permissions")
    return ToolCommand(tuple(argv), timeout)


def failure(text: str) -> str:
    """A tool result that says what went wrong, for the model and for the user."""
    return json.dumps({"error": text}, ensure_ascii=False)


def _tail(file: IO[bytes], size: int) -> str:
    """The last `size` bytes of a file as text."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - size))
    return file.read(size).decode("utf-8", "replace").strip()


def _kill(process: subprocess.Popen) -> None:
    """Kill the program and its children."""
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
    except psutil.NoSuchProcess:
        family = [process]
    if hasattr(os, "killpg"):  # also children whose parent has ended
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
