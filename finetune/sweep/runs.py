"""The sweep's folder: its runs, the state of each, and how an earlier start of the sweep is continued."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune.errors import UserError
from finetune.files import acquire_lock, free_path, sha256_of, write_text_atomic
from finetune.progress import counted
from finetune.runs.config_schema import schema_fault
from finetune.runs.experiment import check_writable, folder_status, refuse_links
from finetune.settings import Settings
from finetune.sweep.grid import OWN_FILES, Point, free_name

log = logging.getLogger("sandwich")
SWEEP, SWEEP_LOG, LOGS, LOCK, TOKEN = "sweep.json", "sweep.log", "logs", ".lock", ".token"
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
STOPPED, FAILED, INTERRUPTED = "stopped early", "failed", "interrupted"
DONE = {FINISHED, STOPPED}
# What sweep.json must hold for the sweep to continue. Another person may have written it: a name is a folder of a run.
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["id", "data", "argv", "started", "runs", "settings"],
    "properties": {
        "data": {"type": "object"}, "argv": {"type": "array"}, "settings": {"type": "object"},
        "runs": {"type": "array", "items": {
            "type": "object", "required": ["name", "status", "flags", "attempts"],
            "properties": {
                "name": {"type": "string", "pattern": r"^[^./\\][^/\\]*\Z"},
                "attempts": {"type": "array", "items": {
                    "type": "object", "required": ["outcome", "step", "lines"],
                    "properties": {
                        "step": {"type": ["integer", "null"]}, "lines": {"type": "array", "items": {"type": "string"}},
                    },
                }},
            },
        }},
    },
}  # fmt: skip
REFUSED = "refused"  # exit status 2: flags or data that the next attempt would be refused for too


@dataclass
class SweepRun:
    """One run of the sweep: its flags, its status and each attempt at it.

    failures: failed attempts in a row, none of which got further than the one before.
    progress: what the current attempt has reported (see RayRunner).
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

    def record_attempt(self, attempt: dict[str, Any], retries: int) -> bool:
        """Update the status from an ended attempt; returns whether the run must be tried again."""
        kind, step = attempt["outcome"], attempt.get("step") or 0
        if kind == INTERRUPTED and "node" not in attempt:  # it was cancelled before it began
            self.status = INTERRUPTED
            return False
        self.attempts.append(attempt)
        if kind in (FINISHED, STOPPED, INTERRUPTED):
            self.status = kind
            return False
        # A run that is preempted again and again, but progresses, must not run out of retries.
        self.failures = 1 if step > self.best_step else self.failures + 1
        self.best_step = max(self.best_step, step)
        again = kind != REFUSED and self.failures <= retries
        self.status = WAITING if again else FAILED
        return again

    def as_json(self) -> dict[str, Any]:
        """The run's entry in sweep.json."""
        return {
            "name": self.name, "status": self.status, "varied": self.point.varied, "flags": self.point.flags,
            "attempts": self.attempts,
        }  # fmt: skip


@dataclass
class Sweep:
    """A sweep's folder and the contents of its sweep.json; `lock` is held until `close`.

    new: this sweep was not started before.
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
        """Write sweep.json atomically. Raises UserError when the disk is full."""
        self.config.update(entries)
        data = self.config | {"runs": [run.as_json() for run in self.runs]}
        write_text_atomic(self.folder / SWEEP, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def count(self, *statuses: str) -> int:
        return sum(run.status in statuses for run in self.runs)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def discard(self) -> None:
        """Remove the folder of a new sweep that was refused before its first attempt; other files in it stay."""
        with contextlib.suppress(OSError):  # on Windows the log is open, and everything stays
            for name in (SWEEP_LOG, SWEEP, TOKEN, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            (self.folder / LOGS).rmdir()
            self.folder.rmdir()


def open_sweep(folder: Path, points: list[Point], *, identity: str, argv: list[str], settings: dict[str, Any]) -> Sweep:
    """The sweep in `folder`: a new one, or the same one again with what has finished so far.

    Raises UserError when another process is running it, when the folder holds another sweep or something else, or when
    a data file has changed since the sweep began.
    """
    check_writable(folder)
    for name in (*OWN_FILES, LOCK, TOKEN):
        refuse_links(folder / name, owner=folder)
    others = any(not (path.name == LOGS and path.is_dir()) and path.name[0] != "." for path in folder.iterdir())
    path = folder / SWEEP
    if others and not path.exists():
        raise UserError(f"{folder} holds other files and no sweep; choose another --name")
    busy = f"sweep {folder} is being run by another process; wait for it, or start another one with --name"
    lock = acquire_lock(folder / LOCK, busy)
    try:
        (folder / LOGS).mkdir(exist_ok=True)
        config = {
            "sweep": folder.name, "id": identity, "argv": argv, "started": now(), "ended": None, "status": RUNNING,
            "host": socket.gethostname(), "pid": os.getpid(), "settings": settings, "data": data_digests(points),
            "best": None,
        }  # fmt: skip
        sweep = Sweep(folder, config, [SweepRun(point) for point in points], lock, new=not path.exists())
        if not sweep.new:
            sweep.runs = _restore_progress(path, config, points)
        sweep.save()
        return sweep
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _restore_progress(path: Path, config: dict[str, Any], points: list[Point]) -> list[SweepRun]:
    """The runs, with the status and the attempts that an earlier start has made; new values add runs to them.

    Raises UserError when the folder holds another sweep, or when a data file has changed since.
    """
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if fault := schema_fault(SCHEMA, old):
            raise ValueError(fault.removeprefix(", "))
        identity, digests, command_line = old["id"], dict(old["data"]), " ".join(map(str, old["argv"]))
        config["started"] = str(old["started"])
        records = {record["name"]: record for record in old["runs"]}
        named = _with_earlier_names(points, old["runs"])
        is_alike = all(_as_stored(config, name) == old["settings"].get(name) for name in ("command", "asha"))
        runs = [SweepRun(point) for point in named or points]
        for run in runs:
            record = records.get(run.name, {"status": WAITING, "attempts": []})
            run.attempts = list(record["attempts"])
            run.best_step = max((int(attempt["step"] or 0) for attempt in run.attempts), default=0)
            # The run's own folder decides: the sweep may have been killed before it could save this, and a user deletes
            # a run's folder to have it run again.
            folder, done = path.parent / run.name, record["status"] in DONE
            if (done and folder.is_dir()) or folder_status(folder) == FINISHED:
                run.status = record["status"] if done else FINISHED
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; start another sweep with --name") from error
    if identity != config["id"] and (named is None or not is_alike):
        raise UserError(
            f"{path.parent} holds another sweep (sweep_lora.py {command_line}); choose another --name, or repeat all "
            "its values beside the new ones to add runs to it"
        )
    for name, digest in config["data"].items():
        if digests.get(name, digest) != digest:
            raise UserError(
                f"{name} has changed since sweep {path.parent} began, so its runs would not be comparable; "
                "start another sweep with --name"
            )
    config["data"] = digests | config["data"]
    if len(runs) > len(records):
        log.info("adding %s to the %d of sweep %s", counted(len(runs) - len(records), "run"), len(records), path.parent)
    return runs


def _with_earlier_names(points: Sequence[Point], records: Sequence[dict[str, Any]]) -> list[Point] | None:
    """The points, in their order, those of the earlier sweep under the names they have in its sweep.json (`records`).

    A run is the same if all its flags are, defaults included. None where a run of the earlier sweep is absent.
    """
    names = {_key(record["flags"]): str(record["name"]) for record in records}
    keys = [_key(point.flags) for point in points]
    if not names.keys() <= set(keys):
        return None
    taken = {*OWN_FILES, *(name.lower() for name in names.values())}
    return [
        replace(point, name=names[key] if key in names else free_name(point.name, taken))
        for point, key in zip(points, keys, strict=True)
    ]


def _key(flags: dict[str, Any]) -> str:
    with contextlib.suppress(TypeError, UserError):  # another version wrote them: no run of today is the same
        flags = Settings(**flags).run_flags()
    return json.dumps(flags, sort_keys=True)


def _as_stored(config: dict[str, Any], name: str) -> Any:
    return json.loads(json.dumps(config["settings"].get(name)))


def archive_broken(folder: Path) -> None:
    """Rename what is left of an attempt without a checkpoint to the hidden name `.<run>_broken_N`."""
    folder.rename(free_path(folder.with_name(f".{folder.name}_broken_{number}") for number in itertools.count(1)))


def data_digests(points: list[Point]) -> dict[str, str]:
    """SHA-256 of the data and format files that the runs name and that are on this machine, in order of appearance."""
    digests: dict[str, str] = {}
    for flags in (point.flags for point in points):
        for name in [*(flags.get("dataset") or []), *(flags.get("eval_dataset") or []), flags.get("format") or ""]:
            path = name.rsplit("*", 1)[0]  # rows.jsonl*0.5 uses half of the rows
            if path and path not in digests and Path(path).is_file():
                digests[path] = sha256_of(Path(path))
    return digests


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
