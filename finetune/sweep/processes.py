"""A run's process: starting it, and ending it with everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from finetune.errors import user_errors


def start(arguments: Sequence[str], cwd: Path, output: BinaryIO, task: dict[str, Any]) -> subprocess.Popen:
    """The run's process, in a session of its own so that a Ctrl-C at the sweep's terminal does not reach it.

    task: see `run_attempt`. Raises UserError when the program cannot be started.
    """
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    env["PYTHONUNBUFFERED"] = "1"
    if not task["gpus"]:
        env["OMP_NUM_THREADS"] = str(max(1, int(task["cpus"])))
    with user_errors(f"cannot start {arguments[0]}", "check --command"):
        return subprocess.Popen(
            list(arguments), cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
            preexec_fn=_end_with_worker(task["processes"] > 1),  # noqa: PLW1509 (system calls only, no Python locks)
        )  # fmt: skip


def _end_with_worker(torchrun: bool) -> Callable[[], None] | None:
    """For Linux: the process ends with the Ray worker, so that nothing writes to the run after a node is lost."""
    if not sys.platform.startswith("linux"):
        return None  # on Windows, Ray's own job object does this
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    # SIGTERM lets torchrun end its own processes, which would survive its SIGKILL.
    number = int(signal.SIGTERM if torchrun else signal.SIGKILL)
    pr_set_pdeathsig = 1

    def before_exec() -> None:
        prctl(pr_set_pdeathsig, number)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block SIGINT

    return before_exec


def running_tree(process: subprocess.Popen) -> set[psutil.Process]:
    """The running processes that this one has started, and itself: its descendants and its group (POSIX).

    torchrun gives its processes groups of their own; those of a shell script outlive it in its group.
    """
    tree: set[psutil.Process] = set()
    if process.poll() is None:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            tree = {parent, *parent.children(recursive=True)}
    if os.name == "posix":
        for one in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getpgid(one.pid) == process.pid:
                    tree.add(one)
    return {one for one in tree if _is_running(one)}


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_tree(process: subprocess.Popen, seconds: float) -> None:
    """SIGTERM to the process and all that it has started, SIGKILL to those that still run after `seconds`."""
    tree = running_tree(process)
    for one in tree:
        with contextlib.suppress(psutil.Error):
            one.terminate()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_is_running, tree)):
        time.sleep(0.1)
    for one in tree | running_tree(process):
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()
