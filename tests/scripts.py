"""Runs the scripts as a user does, each in a process of its own with its own arguments, environment and folder.

A start takes some 20 s of imports. So on Linux these processes are forked from one that has imported Unsloth, and with
it torch, transformers, trl and peft, but nothing else of this project; `fresh=True` starts a new interpreter, for
tests that are about starting.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "160"}
_parent: _ParentProcess | None = None


def run_script(
    script: str,
    *arguments: object,
    given: str = "",
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """The script's end, with its stdout and stderr as text. Raises subprocess.TimeoutExpired, the process then dead."""
    global _parent  # noqa: PLW0603
    words = [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, **QUIET, **(env or {})}
    if fresh or not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *words], input=given, cwd=cwd, env=environment, timeout=timeout, capture_output=True,
            text=True, encoding="utf-8", check=False,
        )  # fmt: skip
    if _parent is None:
        _parent = _ParentProcess()
    return _parent.run(words, given, cwd, environment, timeout)


class _ParentProcess:
    """The process that all others are forked from, one after another; it ends when this one does."""

    def __init__(self):
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        words = [sys.executable, "-m", "tests.scripts", str(theirs_in), str(theirs_out)]
        self.process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **QUIET}, stdin=subprocess.DEVNULL,
                                        pass_fds=(theirs_in, theirs_out))  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.answers = os.fdopen(self.ours_in, encoding="utf-8")

    def run(self, words, given, cwd, environment, timeout) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            files["stdin"].write_text(given, encoding="utf-8")
            wanted = {
                "words": words,
                "cwd": str(cwd),
                "env": environment,
                "files": {k: str(v) for k, v in files.items()},
            }
            os.write(self.ours_out, json.dumps(wanted).encode() + b"\n")
            pid = int(self.answers.readline())
            late = not select.select([self.ours_in], [], [], timeout)[0]
            if late:
                os.kill(pid, 9)
            code = int(self.answers.readline())
            said = {name: files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")}
        if late:
            raise subprocess.TimeoutExpired(words, timeout, said["stdout"], said["stderr"])
        return subprocess.CompletedProcess(words, code, said["stdout"], said["stderr"])


def _fork_scripts(requests: int, answers: int) -> dict | None:
    """Fork for each request and answer with the process's id and exit status; returns the request in the child."""
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            wanted = json.loads(line)
            pid = os.fork()
            if not pid:
                os.close(answers)
                return wanted
            os.write(answers, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(answers, f"{code}\n".encode())
    return None


def _become(wanted: dict) -> str:
    """Give this process the arguments, environment, folder and files of the request; returns the script's path."""
    flags = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(wanted["files"][name], flags[name], 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    script, *_ = sys.argv = wanted["words"]
    sys.path[0] = str(Path(script).parent)
    return script


if __name__ == "__main__":
    import runpy

    from finetune.models.loading import import_unsloth

    import_unsloth()
    import sklearn.metrics  # noqa: F401  no script is tried for what it imports when, so the slow ones are all here
    from trl import SFTTrainer  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] in ("finetune", "formats", "tests")]:
        del sys.modules[name]  # the script imports its own, in its own order
    request = _fork_scripts(*map(int, sys.argv[1:]))
    if request is not None:
        runpy.run_path(_become(request), run_name="__main__")
