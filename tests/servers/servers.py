"""Starts vLLM and llama.cpp's server on an export, as context managers that yield a URL."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_LIMIT_S = 900
# For a small model on a CPU; the rest of the command is serve.sh's own.
VLLM_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "2048")
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


class StartError(Exception):
    """A server that ended before it answered; the message is the end of its log."""


@contextlib.contextmanager
def vllm_server(export: Path, venv: Path) -> Iterator[str]:
    """`sh serve.sh` of an export with the vLLM of a virtual environment."""
    port = _free_port()
    log = export / "server.log"
    path = os.pathsep.join([str((venv / "bin").absolute()), os.environ.get("PATH", "")])
    command = ["sh", str(export / "serve.sh"), "--port", str(port), *VLLM_FLAGS]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **VLLM_VARIABLES, "PATH": path},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise StartError("\n".join(lines[-8:]))
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise StartError(f"no answer within {START_LIMIT_S} s; see {log}")
