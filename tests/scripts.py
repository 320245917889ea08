"""Runs the scripts as a user does, each in a process of its own with its own arguments, environment and folder.

Imports take about 20 s. So on Linux these processes are forked from one that has imported Unsloth, and with it torch,
transformers, trl and peft, but nothing else of this project; `fresh=True` starts a new interpreter, for tests of the
start itself.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "160"}
_parent: ParentProcess | None = None


def run_script(
    script: str,
    *arguments: object,
    given: str = "",
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """The completed process, with stdout and stderr as text. Kills it and raises TimeoutExpired after `timeout` s."""
    command = [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, **QUIET, **(env or {})}
    if fresh or not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *command], input=given, cwd=cwd, env=environment, timeout=timeout, capture_output=True,
            text=True, encoding="utf-8", check=False,
        )  # fmt: skip
    return first_parent().run(command, given, cwd, environment, timeout)


def first_parent() -> ParentProcess:
    """The process that `run_script` uses; one child at a time."""
    global _parent  # noqa: PLW0603
    if _parent is None:
        _parent = ParentProcess()
    return _parent


class ParentProcess:
    """The process that the others are forked from, one after another; it ends with the tests."""

    def __init__(self):
        child_in, self.requests_fd = os.pipe()
        self.answers_fd, child_out = os.pipe()
        command = [sys.executable, "-m", "tests.scripts", str(child_in), str(child_out)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **QUIET}, stdin=subprocess.DEVNULL,
                                        pass_fds=(child_in, child_out))  # fmt: skip
        os.close(child_in)
        os.close(child_out)
        self.answers = os.fdopen(self.answers_fd, encoding="utf-8")

    def run(self, command, given, cwd, environment, timeout) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            files["stdin"].write_text(given, encoding="utf-8")
            pid = self.start(command, files, cwd, environment)
            code = self.wait(timeout)
            if timed_out := code is None:
                os.kill(pid, 9)
                code = self.wait()
            output = {name: files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")}
        if timed_out:
            raise subprocess.TimeoutExpired(command, timeout, output["stdout"], output["stderr"])
        return subprocess.CompletedProcess(command, code, output["stdout"], output["stderr"])

    def start(self, command, files, cwd, environment) -> int:
        """The id of a new process, whose stdin, stdout and stderr are `files`."""
        request = {
            "command": command,
            "cwd": str(cwd),
            "env": environment,
            "files": {name: str(path) for name, path in files.items()},
        }
        os.write(self.requests_fd, json.dumps(request).encode() + b"\n")
        return int(self.answers.readline())

    def wait(self, timeout=None) -> int | None:
        """The exit status of the process; None if it still runs after `timeout` s."""
        return int(self.answers.readline()) if select.select([self.answers_fd], [], [], timeout)[0] else None


def _fork_scripts(requests: int, answers: int) -> dict | None:
    """Fork for each request and answer with the process's id and exit status; returns the request in the child."""
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                os.close(answers)
                return request
            os.write(answers, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(answers, f"{code}\n".encode())
    return None


def _apply(request: dict) -> str:
    """Give this process the arguments, environment, folder and files of the request; returns the script's path."""
    flags = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(request["files"][name], flags[name], 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    script, *_ = sys.argv = request["command"]
    sys.path[0] = str(Path(script).parent)
    folders = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path += folders
    for custom in (Path(folder) / "sitecustomize.py" for folder in folders):  # as an interpreter does
        if custom.is_file():
            runpy.run_path(str(custom))
    return script


def run_forked(command: list[str], output: Path) -> int:
    """The id of a fork of this process that runs a script; it must have imported nothing of this project."""
    if pid := os.fork():
        return pid
    try:
        files = {"stdin": os.devnull, "stdout": str(output), "stderr": str(output)}
        _forget_project()
        request = {"command": command, "env": {**os.environ, **QUIET}, "cwd": str(ROOT), "files": files}
        runpy.run_path(_apply(request), run_name="__main__")
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code or 0)
    os._exit(1)


def _forget_project() -> None:
    """The script imports its own modules of this project, in its own order."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("finetune", "formats", "tests")]:
        del sys.modules[name]


if __name__ == "__main__":
    from finetune.models.loading import import_unsloth

    import_unsloth()
    import sklearn.metrics  # noqa: F401  slow to import, and no test is about when it is imported
    from trl import SFTTrainer  # noqa: F401

    _forget_project()
    request = _fork_scripts(*map(int, sys.argv[1:]))
    if request is not None:
        runpy.run_path(_apply(request), run_name="__main__")
