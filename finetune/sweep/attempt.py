"""One attempt at one run, on whatever machine it lands: start train_lora.py, watch its log, stop it when told.

Nothing here knows Ray: `call(method, *arguments)` reaches the hub (hub.py) of the sweep, wherever that is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.runs.experiment import CHECKPOINT, CONFIG, LOG
from finetune.runs.run_log import COLUMNS, read_rows
from finetune.sweep.courier import Courier, Workspace, place_of
from finetune.sweep.runs import FAILED, FINISHED, INTERRUPTED, REFUSED, STOPPED, folder_status, now, set_aside

ROOT = Path(__file__).resolve().parents[2]
REPORTED = ("step", "epoch", "loss", "eval_loss")
LAST_LINES = 12
SECONDS_TO_END = 5.0  # for a process that is told to end and owes nobody a checkpoint
OUT_OF_MEMORY, KILLED, HUNG = "out of memory", "killed", "hung"
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|MemoryError|ALLOC_FAILED", re.IGNORECASE)
# torchrun ends with status 1 whatever its processes ended with, and says it behind their own last words.
_ELASTIC = "torch/distributed/elastic/"
_TORCHRUN = re.compile(_ELASTIC + r".*failed \(exitcode: (-?\d+)\)")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

Call = Callable[..., Any]


def run_attempt(task: dict[str, Any], call: Call) -> dict[str, Any]:
    """Run the task's process to its end; returns how it ended (see `ending`).

    task: name, words, command, root, folder, cwd, scratch, sweep_id, machine, token, transport, inputs, processes,
    cpus, gpus, number, interval, patience and silence (seconds; see Options).
    """
    outcome = {
        "number": task["number"], "node": socket.gethostname(), "device": device_name(task), "started": now(),
    }  # fmt: skip
    place = place_of(task)
    outcome["transport"] = "shared folder" if place.shared else "Ray"
    about = {"run": task["name"], **outcome}  # in every report: the one that said it first may have been lost
    if call("report", about):
        return outcome | {"outcome": INTERRUPTED, "step": None, "ended": now(), "lines": []}
    courier = Courier(place, task["name"], call)
    courier.fetch(task["inputs"])
    folder = place.folder / task["name"]
    if folder_status(folder) == FINISHED:  # and whoever ran it was gone before it could say so
        outcome |= ending(0, [], "") | {"step": last_step(folder), "ended": now()}
        courier.clear()
        return outcome
    words = first_words(task, place) + flags_for(task, place, folder)
    log = place.folder / "logs" / f"{task['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"=== attempt {task['number']} on {outcome['node']}, {outcome['started']}\n".encode())
        file.flush()
        begins = file.tell()
        process = start(words, place.cwd, file, task)
        stopped = ""
        try:
            stopped = watch(process, folder / LOG, log, task, about, call, courier)
        finally:
            end_process(process)
            if process.returncode != 0:  # what a finished run has left, an uploader say, may take its time
                end_children(process, task["patience"] if stopped and not call("in_a_hurry") else SECONDS_TO_END)
    courier.send_changed(ended=True)
    code, lines = last_words(process.returncode, log, begins)
    end = ending(code, lines, stopped)
    if code and not stopped and not lines:
        end["lines"] = [f"ended without a word, with exit status {code}"]
    if end["outcome"] == HUNG:
        end["lines"].append(f"neither logged nor printed for {task['silence'] / 60:g} minutes (--hang_minutes)")
    if end["outcome"] == FINISHED and (status := folder_status(folder)) != FINISHED:
        reason = f"ended with exit status 0, but {folder / CONFIG} says {status or 'nothing'} instead of {FINISHED}"
        end = {"outcome": FAILED, "exit_code": 0, "lines": [*lines, reason]}
    outcome |= end | {"step": last_step(folder), "ended": now()}
    if not place.shared and not (os.name == "posix" and _in_group(process.pid)):  # an uploader may still read it
        courier.clear()
    return outcome


def first_words(task: dict[str, Any], place: Workspace) -> list[str]:
    """The program: train_lora.py, through torchrun where a run has several GPUs."""
    if task["command"]:
        return list(task["command"])
    # On a cluster Ray brings a copy of the code; the checkout itself also knows its commit.
    root = Path(task["root"])
    script = [str((root if place.shared and (root / "train_lora.py").is_file() else ROOT) / "train_lora.py")]
    if task["processes"] > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={task['processes']}"]
        return [sys.executable, *module, *script]
    return [sys.executable, *script]


def flags_for(task: dict[str, Any], place: Workspace, folder: Path) -> list[str]:
    """`--resume FOLDER` where the run has a checkpoint; else its flags, with an older try's remains moved aside."""
    if folder.is_dir():
        if any(CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()):
            return ["--resume", place.named(folder)]
        set_aside(folder)
    return [*task["words"], "--experiments_dir", place.named(place.folder), "--name", task["name"]]


def start(words: Sequence[str], cwd: Path, output: Any, task: dict[str, Any]) -> subprocess.Popen:
    """The run's process, in a session of its own so that a Ctrl-C at the sweep's terminal does not reach it."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    env["PYTHONUNBUFFERED"] = "1"
    if not task["gpus"]:
        env["OMP_NUM_THREADS"] = str(max(1, int(task["cpus"])))
    try:
        return subprocess.Popen(
            list(words), cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
            preexec_fn=_die_with_parent(task["processes"] > 1),  # noqa: PLW1509 (system calls only, no Python locks)
        )  # fmt: skip
    except OSError as error:
        output.write(f"error: {words[0]}: {error.strerror}\n".encode())
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])


def _die_with_parent(several: bool) -> Callable[[], None] | None:
    """For Linux: the process ends when this worker is gone, so that a lost node leaves nobody writing to the run."""
    if not sys.platform.startswith("linux"):
        return None  # on Windows, Ray's own job object does this
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    # torchrun has to be asked, or its own children would outlive it.
    number = int(signal.SIGTERM if several else signal.SIGKILL)
    pr_set_pdeathsig = 1

    def before_exec() -> None:
        prctl(pr_set_pdeathsig, number)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block SIGINT

    return before_exec


def watch(
    process: subprocess.Popen,
    log: Path,
    output: Path,
    task: dict[str, Any],
    about: dict[str, Any],
    call: Call,
    courier: Courier,
) -> str:
    """Report new rows of the run's `log` each second until it ends; returns why it was told to stop, or "".

    about: what every report begins with.

    A run of which neither the log nor the `output` grows for task["silence"] seconds hangs (0: never), and is told so.
    """
    stopped, deadline, seen, size = "", None, 0, -1
    heard, heard_of = time.monotonic(), -1
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=task["interval"])
        rows = []
        with contextlib.suppress(OSError):
            if log.stat().st_size != size:
                size = log.stat().st_size
                rows = new_rows(log, seen)
                seen = rows[-1]["step"] if rows else seen
        ended = process.returncode is not None
        if rows or not ended:
            wanted = call("report", {**about, "rows": rows})
            if wanted and not stopped and not ended:
                stopped, deadline = wanted, time.monotonic() + task["patience"]
                process.terminate()  # train_lora.py finishes its step and saves a checkpoint
        with contextlib.suppress(OSError):  # somebody has tidied up the logs
            if (now_heard := size + output.stat().st_size) != heard_of:
                heard, heard_of = time.monotonic(), now_heard
        if task["silence"] and not stopped and not ended and time.monotonic() - heard > task["silence"]:
            stopped, deadline = HUNG, time.monotonic() + task["patience"]
            process.terminate()
        if ended:
            return stopped
        courier.send_changed()
        if deadline is not None and (time.monotonic() > deadline or call("in_a_hurry")):
            _kill(process)


def new_rows(log: Path, after: int) -> list[dict[str, Any]]:
    """Rows of training_log.csv behind step `after`, with the columns that a sweep looks at.

    A row in which one of these is no number (somebody has edited the log) is passed over.
    """
    rows = []
    for row in read_rows(log):
        cells = dict(zip(COLUMNS, row, strict=True))
        if int(cells["step"]) > after:
            with contextlib.suppress(ValueError):
                numbers = {name: float(cells[name]) for name in REPORTED if cells[name]}
                rows.append(numbers | {"step": int(cells["step"])})
    return rows


def end_process(process: subprocess.Popen) -> None:
    """For an attempt that is itself broken off: leave no process behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()


def end_children(process: subprocess.Popen, seconds: float) -> None:
    """End what an ended process has left in its group: a trainer behind a shell script would write to the next try.

    They are asked first, and have `seconds` for a checkpoint.
    """
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # none are left
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _in_group(process.pid):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def _in_group(group: int) -> bool:
    """Whether a process of the group is alive; one that has ended may stay in it until somebody asks for its status."""
    import psutil

    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(one.pid) == group and one.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _kill(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started: torchrun's own have groups of their own, and would live on."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


def ending(code: int, lines: list[str], stopped: str) -> dict[str, Any]:
    """outcome, exit_code, lines of an ended process. `stopped`: why we stopped it, or "" when we did not."""
    if code == 0:
        kind = FINISHED
    elif stopped:
        kind = stopped if stopped in (STOPPED, HUNG) else INTERRUPTED
    elif any(_OUT_OF_MEMORY.search(line) for line in lines):
        kind = OUT_OF_MEMORY
    elif code == 2:
        kind = REFUSED
    elif code in (-9, 137):
        kind = KILLED  # by the kernel when memory ran out, or by somebody
    elif code in (130, 143, -15, -2):
        kind = "preempted"  # somebody else's SIGTERM or SIGINT: a machine that is taken away
    else:
        kind = FAILED
    return {"outcome": kind, "exit_code": code, "lines": [] if kind in (FINISHED, STOPPED) else lines}


def last_words(code: int, log: Path, begins: int) -> tuple[int, list[str]]:
    """Exit code and last lines of this attempt, without colours; of torchrun's first failed process where it ran."""
    text = ""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(begins, log.stat().st_size - 16_384))
        text = _COLOUR.sub("", file.read().decode("utf-8", "replace"))
    lines = [line.rstrip()[:500] for line in text.splitlines() if line.strip()]
    if code == 1:
        for number, line in enumerate(lines):
            if match := _TORCHRUN.search(line):
                code, lines = int(match[1]), [said for said in lines[:number] if _ELASTIC not in said]
                break
    return code, lines[-LAST_LINES:]


def last_step(folder: Path) -> int | None:
    """The newest checkpoint's step, the last logged step of a finished run, or None."""
    steps = [int(match[1]) for path in folder.glob("checkpoint-*") if (match := CHECKPOINT.fullmatch(path.name))]
    if folder_status(folder) == FINISHED:
        with contextlib.suppress(OSError):
            steps += [int(row[0]) for row in read_rows(folder / LOG)[-1:]]
    return max(steps, default=None)


def device_name(task: dict[str, Any]) -> str:
    if task["gpus"]:
        return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '?')}"
    return f"{task['cpus']:g} CPU"
