"""The sweep's folder: what is to be run, what became of it, and how it is found again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune.errors import UserError
from finetune.files import acquire_lock, write_text_atomic
from finetune.runs.experiment import CONFIG, check_writable
from finetune.sweep.grid import Point

SWEEP, SWEEP_LOG, LOGS, LOCK, TOKEN = "sweep.json", "sweep.log", "logs", ".lock", ".token"
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
STOPPED, FAILED, INTERRUPTED = "stopped early", "failed", "interrupted"
DONE = {FINISHED, STOPPED}
# Exit status 2: the run's own flags or data are refused, and would be refused again.
REFUSED = "refused"


@dataclass
class SweepRun:
    """One run of the sweep: what it is, what became of it, and each attempt at it.

    `failures` counts attempts in a row that ended badly without having got further than the one before.
    """

    point: Point
    status: str = WAITING
    attempts: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    best_step: int = 0
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.point.name

    def ended(self, outcome: dict[str, Any], retries: int) -> bool:
        """Take in how an attempt ended; returns whether the run is to be tried again."""
        if outcome["outcome"] == INTERRUPTED and "node" not in outcome:  # it never began
            self.status = INTERRUPTED
            return False
        self.attempts.append(outcome)
        kind, step = outcome["outcome"], outcome.get("step") or 0
        if kind in (FINISHED, STOPPED, INTERRUPTED):
            self.status = kind
            return False
        # A machine that is taken away again and again must not use up the retries of a run that gets on.
        self.failures = 1 if step > self.best_step else self.failures + 1
        self.best_step = max(self.best_step, step)
        if kind == REFUSED or self.failures > retries:
            self.status = FAILED
            return False
        self.status = WAITING
        return True

    def record(self) -> dict[str, Any]:
        """What sweep.json keeps of the run."""
        return {
            "name": self.name, "status": self.status, "varied": self.point.varied, "flags": self.point.flags,
            "attempts": self.attempts,
        }  # fmt: skip


@dataclass
class Sweep:
    """A sweep's folder and the contents of its sweep.json. `lock` is held as long as this process runs it.

    `new`: nobody has started this sweep before.
    """

    folder: Path
    config: dict[str, Any]
    runs: list[SweepRun]
    lock: FileLock | None
    new: bool = False

    def run_folder(self, run: SweepRun) -> Path:
        return self.folder / run.name

    def log_path(self, run: SweepRun) -> Path:
        return self.folder / LOGS / f"{run.name}.log"

    def save(self, **entries: Any) -> None:
        """Write sweep.json aside and rename it."""
        self.config.update(entries)
        data = self.config | {"runs": [run.record() for run in self.runs]}
        write_text_atomic(self.folder / SWEEP, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def count(self, *statuses: str) -> int:
        return sum(run.status in statuses for run in self.runs)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def discard(self) -> None:
        """Remove the folder of a new sweep that was refused before its first try; what others put there stays."""
        with contextlib.suppress(OSError):
            for name in (SWEEP_LOG, SWEEP, TOKEN, LOCK):  # on Windows the first is open, and all of it stays
                (self.folder / name).unlink(missing_ok=True)
            (self.folder / LOGS).rmdir()
            self.folder.rmdir()


def open_sweep(folder: Path, points: list[Point], *, identity: str, argv: list[str], settings: dict[str, Any]) -> Sweep:
    """The sweep in `folder`: a new one, or the same one again with what it has finished so far.

    Raises UserError when another process is running it, when the folder holds another sweep or something else, or when
    a data file has changed since the first run was made.
    """
    check_writable(folder)
    others = any(
        not (entry.name == LOGS and entry.is_dir()) and not entry.name.startswith(".") for entry in folder.iterdir()
    )
    if others and not (folder / SWEEP).exists():
        raise UserError(f"{folder} holds other files and no sweep; choose another --name")
    busy = f"sweep {folder} is being run by another process; wait for it, or start another one with --name"
    lock = acquire_lock(folder / LOCK, busy)
    try:
        (folder / LOGS).mkdir(exist_ok=True)
        runs = [SweepRun(point) for point in points]
        data = data_digests(points)
        config = {
            "sweep": folder.name, "id": identity, "argv": argv, "started": now(), "ended": None, "status": RUNNING,
            "host": socket.gethostname(), "pid": os.getpid(), "settings": settings, "data": data, "best": None,
        }  # fmt: skip
        path = folder / SWEEP
        if path.exists():
            _take_over(path, config, runs)
        sweep = Sweep(folder, config, runs, lock, new=not path.exists())
        sweep.save()
        return sweep
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _take_over(path: Path, config: dict[str, Any], runs: list[SweepRun]) -> None:
    """Fill in what an earlier start of the same sweep has done."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        digests, config["started"] = dict(old["data"]), str(old["started"])
        started_as = " ".join(map(str, old["argv"]))
        records = {
            str(record["name"]): (str(record["status"]), [_attempt(one) for one in record["attempts"]])
            for record in old["runs"]
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"cannot read {path}: {error}; start another sweep with --name") from error
    if old.get("id") != config["id"]:
        raise UserError(f"{path.parent} holds another sweep (sweep_lora.py {started_as}); choose another --name")
    for name, digest in config["data"].items():
        if digests.get(name, digest) != digest:
            raise UserError(
                f"{name} has changed since sweep {path.parent} began, and its runs would no longer compare; "
                "start another sweep with --name"
            )
    for run in runs:
        status, run.attempts = records.get(run.name, (WAITING, []))
        run.best_step = max((attempt["step"] or 0 for attempt in run.attempts), default=0)
        # The run's own folder has the last word: the sweep may have been killed before it could write this down, and
        # who removes a run's folder wants it made again.
        folder = path.parent / run.name
        if (status in DONE and folder.is_dir()) or folder_status(folder) == FINISHED:
            run.status = status if status in DONE else FINISHED


def _attempt(record: Any) -> dict[str, Any]:
    """An attempt out of sweep.json, with what is asked of it later in its right type; TypeError and others if not."""
    lines = [str(line) for line in record["lines"]]
    step = None if record["step"] is None else int(record["step"])
    return {**record, "outcome": str(record["outcome"]), "step": step, "lines": lines}


def folder_status(folder: Path) -> str | None:
    """`status` in a run folder's experiment_config.json; None where there is none."""
    try:
        status = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        return None
    return str(status)


def set_aside(folder: Path) -> None:
    """Keep what is left of a try that nothing can go on from, under a name that everything passes over."""
    for number in range(1, 10_000):
        aside = folder.with_name(f".{folder.name}_broken_{number}")
        if not aside.exists():
            folder.rename(aside)
            return


def local_files(points: list[Point]) -> list[str]:
    """The data and format files that the runs name and that lie on this machine, in order of appearance."""
    found: dict[str, None] = {}
    for point in points:
        values = point.flags
        named = [*(values.get("dataset") or []), *(values.get("eval_dataset") or []), values.get("format") or ""]
        for name in named:
            path = name.rsplit("*", 1)[0]  # rows.jsonl*0.5 takes half of the rows
            if path and Path(path).is_file():
                found[path] = None
    return list(found)


def data_digests(points: list[Point]) -> dict[str, str]:
    """SHA-256 of every local file that the runs read."""
    digests = {}
    for name in local_files(points):
        digest = sha256()
        with Path(name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
