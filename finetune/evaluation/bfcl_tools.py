"""The process in which BFCL's simulated tools run and its checker of several turns judges: `main` below.

One JSON object on each line of stdin, one answer on each line of stdout. Model answers decide the arguments of the
calls, so once the tools are imported the process can open no connection, start no program and write no file.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from typing import Any

from finetune.errors import UserError
from finetune.packages import ROOT, install_command

SECONDS_TO_START = 120
MAX_MEMORY_BYTES = 2 * 1024**3
REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "ctypes.",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "shutil.", "pty.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "winreg.",
)  # fmt: skip


class ToolsFailed(Exception):
    """A request took too long, or the process ended; the next request starts a new one."""


class ToolProcess:
    """The parent's side: starts the process when it is needed; `seconds` is the limit of one request."""

    def __init__(self, seconds: float = 30.0):
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ToolProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises ToolsFailed."""
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=self.seconds)
        except queue.Empty:
            self._stop()
            raise ToolsFailed(f"the calls took longer than {self.seconds:g} s") from None
        except OSError as error:
            line = str(error)
        if not line.startswith("{"):
            self._stop()
            raise ToolsFailed("the process of the tools ended")
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        """Start the process and wait until its tools are imported. Raises UserError with its last line of stderr."""
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP", "LANG") if name in os.environ}
        self._folder, stderr = tempfile.TemporaryDirectory(), tempfile.TemporaryFile()  # noqa: SIM115  closed below
        self._process = process = subprocess.Popen(
            [sys.executable, "-B", "-c", "from finetune.evaluation.bfcl_tools import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
            cwd=self._folder.name, env=kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            start_new_session=True,
        )  # fmt: skip
        self._answers = answers = queue.Queue[str]()

        def read() -> None:
            assert process.stdout is not None
            with contextlib.suppress(ValueError, OSError):  # closed by the parent
                for line in process.stdout:
                    answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        with stderr, contextlib.suppress(queue.Empty):
            if answers.get(timeout=SECONDS_TO_START).startswith("{"):
                return process
            stderr.seek(0)
            reason = (stderr.read().decode("utf-8", "replace").strip().splitlines() or ["it ended"])[-1]
            self._stop()
            raise UserError(f"BFCL's simulated tools cannot be started: {reason}; {install_command('bfcl_eval')}")
        self._stop()
        raise UserError(f"BFCL's simulated tools did not start within {SECONDS_TO_START} s; run the command again")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # unsent input
                    stream.close()  # type: ignore[union-attr]
            self._folder.cleanup()
            self._process = None


def main() -> None:
    """Answer requests until stdin ends.

    {"row", "done", "calls"}: execute `calls` (Python expressions) after `done`, the earlier calls of the same row ->
    {"results"}. {"row", "turns", "truth"}: BFCL's verdict -> {"valid", "error"}.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # a tool may print

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    tools = _Tools()
    _restrict()
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        answer(tools.check(**request) if "truth" in request else tools.execute(**request))


class _Tools:
    """BFCL keeps the state of a row's tools in global variables of its module, named after model and row."""

    def __init__(self) -> None:
        import importlib

        from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

        for name, module in CLASS_FILE_PATH_MAPPING.items():
            if not name.startswith(("WebSearch", "Memory")):  # of other categories; they need more packages
                importlib.import_module(module)
        self.utils, self.checker = multi_turn_utils, multi_turn_checker
        self.executed: dict[str, int] = {}

    def execute(self, row: dict[str, Any], done: list[str], calls: list[str]) -> dict[str, Any]:
        name = row["id"]
        if self.executed.get(name) != len(done):
            self._forget(name)
            self._run(row, done)
        self.executed[name] = len(done) + len(calls)
        return {"results": self._run(row, calls)}

    def _run(self, row: dict[str, Any], calls: list[str]) -> list[str]:
        return self.utils.execute_multi_turn_func_call(
            calls, row["initial_config"], row["involved_classes"], "run", row["id"],
            long_context="long_context" in row["id"],
        )[0]  # fmt: skip

    def check(self, row: dict[str, Any], turns: list[list[list[str]]], truth: list[list[str]]) -> dict[str, Any]:
        try:
            result = self.checker.multi_turn_checker(turns, truth, row, row["id"].rsplit("_", 1)[0], "check")
        except Exception as error:  # an assertion of the checker, or an object that cannot be compared
            result = {"valid": False, "error_type": f"{type(error).__name__}: {error}"}
        self._forget(row["id"])
        return {"valid": bool(result["valid"]), "error": result.get("error_type")}

    def _forget(self, name: str) -> None:
        self.executed.pop(name, None)
        row = re.sub(r"[-./:]", "_", name)
        for key in [key for key in vars(self.utils) if f"_{row}_" in key and key.endswith("_instance")]:
            del vars(self.utils)[key]


def _restrict() -> None:
    """Let this process use no more than MAX_MEMORY_BYTES, and nothing outside itself but reading files."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes or event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"{event} is refused in the process of simulated tools")

    sys.addaudithook(refuse)
