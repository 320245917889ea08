"""One attempt at one run, on the machine where Ray placed it: start train_lora.py, watch its log, stop it when told.

Nothing here knows Ray: `call(method, *arguments)` reaches the sweep's Coordinator, wherever that is.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.packages import ROOT
from finetune.runs.experiment import CONFIG, LOG, folder_status, list_checkpoints
from finetune.runs.run_log import COLUMNS, read_rows
from finetune.sweep.file_sync import FileSync, Workspace, open_workspace
from finetune.sweep.processes import end_tree, running_tree, start
from finetune.sweep.runs import FAILED, FINISHED, INTERRUPTED, REFUSED, STOPPED, archive_broken, now

REPORTED_COLUMNS = ("step", "epoch", "loss", "eval_loss")
MAX_LINES = 12
MAX_LINE_LENGTH = 500
MAX_LOG_BYTES = 16_384  # of the end of a log, where the last lines are looked for
SECONDS_TO_END = 5.0  # for a process that is told to end and needs no time for a checkpoint
OUT_OF_MEMORY, KILLED, HUNG, PREEMPTED = "out of memory", "killed", "hung", "preempted"
EXIT_OUTCOMES = {
    0: FINISHED, 2: REFUSED,
    -9: KILLED, 137: KILLED,  # by the kernel when memory ran out, or by a user
    -2: PREEMPTED, -15: PREEMPTED, 130: PREEMPTED, 143: PREEMPTED,  # SIGINT or SIGTERM from outside the sweep
}  # fmt: skip
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|MemoryError|ALLOC_FAILED", re.IGNORECASE)
# torchrun ends with status 1 whatever its processes ended with, and prints theirs after their own last lines.
_ELASTIC = "torch/distributed/elastic/"
_TORCHRUN_FAILURE = re.compile(_ELASTIC + r".*failed \(exitcode: (-?\d+)\)")
_ANSI_COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

Call = Callable[..., Any]


def run_attempt(task: dict[str, Any], call: Call) -> dict[str, Any]:
    """Run the task's process to its end; returns the attempt as sweep.json records it.

    task: the fields of SweepOptions, and name, arguments, root, folder, cwd, sweep_id, machine, token, inputs,
    processes, cpus, gpus, number.
    """
    attempt = {
        "number": task["number"], "node": socket.gethostname(), "device": device_name(task), "started": now(),
    }  # fmt: skip
    try:
        end = _run(task, call, attempt)
    except UserError as error:
        end = {"outcome": REFUSED, "step": None, "lines": [str(error)]}
    except OSError as error:
        end = {"outcome": FAILED, "step": None, "lines": [f"{type(error).__name__}: {error}"]}
    return attempt | end | {"ended": now()}


def _run(task: dict[str, Any], call: Call, attempt: dict[str, Any]) -> dict[str, Any]:
    workspace = open_workspace(task)
    attempt["transport"] = "shared folder" if workspace.shared else "Ray"
    if call("report", {"run": task["name"], **attempt})[0]:
        return {"outcome": INTERRUPTED, "step": None, "lines": []}
    sync = FileSync(workspace, task["name"], call)
    sync.fetch(task["inputs"])
    folder = workspace.folder / task["name"]
    if folder_status(folder) == FINISHED:  # by an attempt that was lost before it could report
        sync.clear()
        return outcome_of(0, [], "") | {"step": last_step(folder)}
    command = program(task, workspace) + run_arguments(task, workspace, folder)
    log = workspace.folder / "logs" / f"{task['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"=== attempt {task['number']} on {attempt['node']}, {attempt['started']}\n".encode())
        file.flush()
        begin = file.tell()
        process = start(command, workspace.cwd, file, task)
        try:
            stopped = watch(process, folder / LOG, log, task, attempt, call, sync)
        finally:
            if process.poll() != 0:  # what a finished run has left running, an upload say, may take its time
                end_tree(process, SECONDS_TO_END)
    sync.send_changed(ended=True)
    code, lines = last_lines(process.returncode, log, begin)
    end = outcome_of(code, lines, stopped)
    if code and not stopped and not lines:
        end["lines"] = [f"ended without output, with exit status {code}"]
    if end["outcome"] == HUNG:
        end["lines"].append(f"neither logged nor printed for {task['hang_minutes']:g} minutes (--hang_minutes)")
    if end["outcome"] == FINISHED and (status := folder_status(folder)) != FINISHED:
        reason = f"ended with exit status 0, but {folder / CONFIG} says {status or 'nothing'} instead of {FINISHED}"
        end = {"outcome": FAILED, "exit_code": 0, "lines": [*lines, reason]}
    end["step"] = last_step(folder)
    if not running_tree(process):  # an upload may still read the files
        sync.clear()
    return end


def program(task: dict[str, Any], workspace: Workspace) -> list[str]:
    """--command, or train_lora.py, through torchrun where a run has several GPUs."""
    if task["command"]:
        return list(task["command"])
    # On a cluster Ray brings a copy of the code; the checkout itself, where it is visible, also knows its commit.
    root = Path(task["root"])
    script = str((root if workspace.shared and (root / "train_lora.py").is_file() else ROOT) / "train_lora.py")
    if task["processes"] > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={task['processes']}"]
        return [sys.executable, *torchrun, script]
    return [sys.executable, script]


def run_arguments(task: dict[str, Any], workspace: Workspace, folder: Path) -> list[str]:
    """`--resume FOLDER` where the run has a checkpoint; else its flags, after archiving what an attempt has left."""
    if folder.is_dir():
        if list_checkpoints(folder):
            return ["--resume", workspace.argument(folder), *(["--force"] if task["force"] else [])]
        archive_broken(folder)
    return [*task["arguments"], "--experiments_dir", workspace.argument(workspace.folder), "--name", task["name"]]


def watch(
    process: subprocess.Popen,
    log: Path,
    output: Path,
    task: dict[str, Any],
    attempt: dict[str, Any],
    call: Call,
    sync: FileSync,
) -> str:
    """Report new rows of the run's `log` every task["interval"] seconds until it ends; returns why it was stopped.

    A run hangs, and is stopped, when neither `log` nor `output` grows for task["hang_minutes"] (0: never).
    """
    stopped, hurry, deadline, seen, log_size = "", False, math.inf, 0, -1
    last_growth, total_size = time.monotonic(), -1
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=task["interval"])
        ended = process.returncode is not None
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):
            if log.stat().st_size != log_size:
                log_size = log.stat().st_size
                rows = new_rows(log, seen)
                seen = rows[-1]["step"] if rows else seen
        reason = ""
        if rows or not ended:  # every report describes the attempt: a restarted coordinator has forgotten the first
            reason, hurry = call("report", {"run": task["name"], **attempt, "rows": rows})
        if ended:
            if stopped and process.returncode and not hurry:  # a trainer behind a shell script saves a checkpoint too
                end_tree(process, task["patience"])
            return stopped
        with contextlib.suppress(OSError):  # the output may have been deleted
            if (size := log_size + output.stat().st_size) != total_size:
                last_growth, total_size = time.monotonic(), size
        if task["hang_minutes"] and time.monotonic() - last_growth > task["hang_minutes"] * 60:
            reason = reason or HUNG
        if reason and not stopped:
            stopped, deadline = reason, time.monotonic() + task["patience"]
            process.terminate()  # train_lora.py finishes its step and saves a checkpoint
        sync.send_changed()
        if stopped and (hurry or time.monotonic() > deadline):
            end_tree(process, 0)


def new_rows(log: Path, after: int) -> list[dict[str, Any]]:
    """REPORTED_COLUMNS of the rows of training_log.csv after step `after`; rows with damaged numbers are skipped."""
    rows = []
    for row in read_rows(log):
        cells = dict(zip(COLUMNS, row, strict=True))
        if int(cells["step"]) > after:
            with contextlib.suppress(ValueError):
                numbers = {name: float(cells[name]) for name in REPORTED_COLUMNS if cells[name]}
                rows.append(numbers | {"step": int(cells["step"])})
    return rows


def outcome_of(code: int, lines: list[str], stopped: str) -> dict[str, Any]:
    """outcome, exit_code, lines of an ended process. `stopped`: why the sweep stopped it, or ""."""
    kind = EXIT_OUTCOMES.get(code, FAILED)
    if code and stopped:
        kind = stopped
    elif code and any(_OUT_OF_MEMORY.search(line) for line in lines):
        kind = OUT_OF_MEMORY
    return {"outcome": kind, "exit_code": code, "lines": [] if kind in (FINISHED, STOPPED) else lines}


def last_lines(code: int, log: Path, begin: int) -> tuple[int, list[str]]:
    """Exit code and last log lines of the attempt that begins at byte `begin`, without colours.

    Of torchrun: those of its first failed process.
    """
    text = ""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - MAX_LOG_BYTES))
        text = _ANSI_COLOR.sub("", file.read().decode("utf-8", "replace"))
    lines = [line.rstrip()[:MAX_LINE_LENGTH] for line in text.splitlines() if line.strip()]
    if code == 1:
        for number, line in enumerate(lines):
            if match := _TORCHRUN_FAILURE.search(line):
                code, lines = int(match[1]), [before for before in lines[:number] if _ELASTIC not in before]
                break
    return code, lines[-MAX_LINES:]


def last_step(folder: Path) -> int | None:
    """The newest checkpoint's step, or the last logged step of a finished run if that is higher; None without any."""
    if not folder.is_dir():
        return None
    steps = [int(path.name.rpartition("-")[2]) for path in list_checkpoints(folder)]
    if folder_status(folder) == FINISHED:
        with contextlib.suppress(OSError):
            steps += [int(row[0]) for row in read_rows(folder / LOG)[-1:]]
    return max(steps, default=None)


def device_name(task: dict[str, Any]) -> str:
    if task["gpus"]:
        return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '?')}"
    return f"{task['cpus']:g} CPU"
