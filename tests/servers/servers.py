"""Starts vLLM and llama.cpp's server on an export, as context managers that yield a URL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

START_LIMIT_S = 300
# For a small model on a CPU; the rest of the command is serve.sh's own.
# Under a grammar with free white space a model that has not learned it writes tabs until its tokens end.
VLLM_FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "2048",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
# A `vllm` that prints the folder it was started in and its arguments, so that serve.sh itself says what is served.
PRINTER = """#!/bin/sh
printf '%s\\0' "$PWD" "$@"
"""


class StartError(Exception):
    """A server that ended before it answered; the message is the end of its log."""


class Vllm:
    """The vLLM of a virtual environment, imported once (see preloaded.py); close it after the last server."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv

    @cached_property
    def process(self) -> subprocess.Popen:
        """Started with the first server."""
        return subprocess.Popen(
            [self.venv.absolute() / "bin" / "python", Path(__file__).with_name("preloaded.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, **VLLM_VARIABLES},
        )  # fmt: skip

    def close(self) -> None:
        if "process" in vars(self):
            self.process.stdin.close()
            self.process.wait()

    @contextlib.contextmanager
    def server(self, export: Path) -> Iterator[str]:
        """`sh serve.sh` of an export."""
        port, log = _free_port(), export.absolute() / "server.log"
        with tempfile.TemporaryDirectory() as folder:
            printer = Path(folder, "vllm")
            printer.write_text(PRINTER, encoding="utf-8")
            printer.chmod(0o755)
            command = ["sh", str(export / "serve.sh"), "--port", str(port), *VLLM_FLAGS]
            path = os.pathsep.join([folder, os.environ.get("PATH", "")])
            printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout
        at, *arguments = printed.split("\0")[:-1]
        request = {"arguments": arguments, "folder": at, "log": str(log)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise StartError("the process that imports vLLM has ended")
        pid, url = int(answer), f"http://127.0.0.1:{port}"
        try:
            _wait(url, pid, log)
            yield url
        finally:
            _end(pid)


@contextlib.contextmanager
def llama_cpp_server(export: Path) -> Iterator[str]:
    """llama.cpp's server (xllamacpp) on the first GGUF file of an export, with --jinja."""
    from finetune.export.llama_check import llama_server

    with llama_server(next(export.glob("*.gguf")), context=2048) as server:
        yield server.listening_address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _runs(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _end(group: int) -> None:
    for number, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        deadline = time.monotonic() + patience_s
        while _runs(group) and time.monotonic() < deadline:
            time.sleep(0.1)


def _wait(url: str, group: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if not _runs(group):
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise StartError("\n".join(lines[-8:]))
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise StartError(f"no answer within {START_LIMIT_S} s; see {log}")
