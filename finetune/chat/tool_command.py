"""The user's own program that carries out a call: JSON on its stdin, its stdout is the result. Never a shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

LONGEST_RESULT = 100_000  # characters of a result that go back into the conversation


@dataclass(frozen=True)
class ToolCommand:
    """A program (argv list) and the seconds it may take for one call."""

    argv: tuple[str, ...]
    timeout: float = 60.0

    def __call__(self, call: dict[str, Any]) -> str:
        """The result of {"name", "arguments"}; every failure is a result too, {"error": …}, and never an exception."""
        import psutil

        sent = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        try:
            process = psutil.Popen(
                list(self.argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            return failure(f"the tool's program cannot be started: {error.strerror or error}")
        try:
            out, err = process.communicate(sent + "\n", timeout=self.timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return failure(f"the tool's program took longer than {self.timeout:g} s and was ended")
        except BaseException:  # Ctrl-C: leave nothing running
            _end(process)
            raise
        if process.returncode:
            said = (err.strip().splitlines() or out.strip().splitlines() or [""])[-1]
            return failure(f"the tool's program ended with status {process.returncode}" + (f": {said}" if said else ""))
        result = out.strip()
        if len(result) > LONGEST_RESULT:
            return failure(f"the result has {len(result):,} characters; {LONGEST_RESULT:,} are taken")
        return result or failure("the tool's program wrote nothing")


def parse_tool_command(text: str | None, timeout: float = 60.0) -> ToolCommand | None:
    """The command of `--tool-command`: a program and its arguments, split as a shell would and not run by one.

    On Windows backslashes are parts of paths. Raises UserError when the quotes do not match or nothing is named.
    """
    if text is None:
        return None
    try:
        argv = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise UserError(f"--tool-command {text}: {error}; quote a path with spaces on both sides") from error
    if os.name == "nt":
        argv = [word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word for word in argv]
    if not argv:
        raise UserError("--tool-command is empty; name a program")
    return ToolCommand(tuple(argv), timeout)


def failure(text: str) -> str:
    """A tool result that says what went wrong, for the model and for the person."""
    return json.dumps({"error": text}, ensure_ascii=False)


def _end(process: Any) -> None:
    """Kill the program and whatever it started; a child that holds the pipes open would keep us waiting."""
    import psutil

    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        family = [process]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    for pipe in (process.stdin, process.stdout, process.stderr):
        try:
            pipe.close()
        except OSError:  # unsent input of a program that is gone
            continue
    process.wait()
