"""The user's own program that carries out a call: JSON on its stdin, its stdout is the result. Never a shell."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

from finetune.errors import UserError

LONGEST_RESULT = 100_000  # characters of a result that go back into the conversation
MOST_BYTES, ERROR_BYTES = 1_000_000, 10_000  # read from a program's stdout; kept of its stderr


@dataclass(frozen=True)
class ToolCommand:
    """A program (argv list) and the seconds it may take for one call."""

    argv: tuple[str, ...]
    timeout: float = 60.0

    def __call__(self, call: dict[str, Any]) -> str:
        """The result of {"name", "arguments"}; every failure is a result too, {"error": …}, and never an exception."""
        sent = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False) + "\n"
        try:
            process = subprocess.Popen(
                self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            return failure(f"the tool's program cannot be started: {error.strerror or error}")
        out, err = bytearray(), bytearray()
        threads = [
            threading.Thread(target=work, args=words, daemon=True)
            for work, *words in (
                (_write, process.stdin, sent.encode("utf-8", "replace")),
                (_read, process, process.stdout, out),
                (_read_end, process.stderr, err),
            )
        ]
        started = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            process.wait(self.timeout)
            for thread in threads:  # a child may hold the pipes open
                thread.join(max(0.0, started + self.timeout - time.monotonic()))
                if thread.is_alive():
                    raise subprocess.TimeoutExpired(self.argv, self.timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return failure(f"the tool's program took longer than {self.timeout:g} s and was ended")
        except BaseException:  # Ctrl-C: leave nothing running
            _end(process)
            raise
        if len(out) > MOST_BYTES:
            return failure(f"the result has more than {MOST_BYTES:,} bytes; the tool's program was ended")
        if process.returncode:
            said = (_lines(err) or _lines(out) or [""])[-1]
            return failure(f"the tool's program ended with status {process.returncode}" + (f": {said}" if said else ""))
        result = out.decode("utf-8", "replace").strip()
        if len(result) > LONGEST_RESULT:
            return failure(f"the result has {len(result):,} characters; {LONGEST_RESULT:,} are taken")
        return result or failure("the tool's program wrote nothing")


def parse_tool_command(text: str | None, timeout: float = 60.0) -> ToolCommand | None:
    """The command of `--tool_command`: a program and its arguments, split as a shell would and not run by one.

    On Windows backslashes are parts of paths. Raises UserError when the quotes do not match, or what is named
    is no program.
    """
    if text is None:
        return None
    try:
        argv = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise UserError(f"--tool_command {text}: {error}; quote a path with spaces on both sides") from error
    if os.name == "nt":
        argv = [word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word for word in argv]
    if not argv:
        raise UserError("--tool_command is empty; name a program")
    if shutil.which(argv[0]) is None:
        raise UserError(
            f"--tool_command {text}: no program {argv[0]} can be run; give its whole path, or check its rights"
        )
    return ToolCommand(tuple(argv), timeout)


def failure(text: str) -> str:
    """A tool result that says what went wrong, for the model and for the person."""
    return json.dumps({"error": text}, ensure_ascii=False)


def _write(pipe: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError), pipe:  # a program need not read what it is sent
        pipe.write(data)


def _read(process: subprocess.Popen, pipe: IO[bytes], into: bytearray) -> None:
    """All that the program writes; one that does not stop is ended before it fills the memory."""
    with pipe:
        while block := pipe.read1(1 << 16):
            into += block
            if len(into) > MOST_BYTES:
                _end(process)
                return


def _read_end(pipe: IO[bytes], into: bytearray) -> None:
    """Only the end of what the program writes is kept."""
    with pipe:
        while block := pipe.read1(1 << 16):
            into += block
            del into[:-ERROR_BYTES]


def _lines(said: bytearray) -> list[str]:
    return said.decode("utf-8", "replace").strip().splitlines()


def _end(process: subprocess.Popen) -> None:
    """Kill the program and whatever it started; a child that holds the pipes open would keep us waiting."""
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
