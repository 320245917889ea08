"""Runs the runs of a sweep as tasks of Ray, which queues, places and watches them.

Each task is one process of train_lora.py (attempt.py). Ray's own retries are off: what is tried again, and from which
checkpoint, is decided here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.errors import UserError
from finetune.runs.experiment import LOG
from finetune.sweep.attempt import KILLED, OUT_OF_MEMORY, ROOT, new_rows, run_attempt
from finetune.sweep.coordinator import ALL_RUNS, Coordinator
from finetune.sweep.ray_session import HANGUP, SweepOptions, resources_per_run
from finetune.sweep.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, STOPPED, TOKEN, WAITING, Sweep, SweepRun, now
from finetune.sweep.stopping import Asha
from finetune.sweep.table import LiveTable

log = logging.getLogger("sandwich")
POLL_SECONDS = 0.5
SAVE_SECONDS = 1.0  # between two writes of sweep.json, which has a megabyte for a thousand runs


def remote_attempt(task: dict[str, Any], coordinator: Any) -> dict[str, Any]:
    """The Ray task: an attempt whose calls go to the Coordinator's actor."""
    import ray

    # Several Ray nodes on one machine must not work in one folder.
    task = task | {"machine": ray.get_runtime_context().get_node_id()[:12]}
    # Not on the task's own thread: while that waits for an answer, Ray gives the task's CPUs to another run.
    with ThreadPoolExecutor(max_workers=1) as thread:

        def call(method: str, *arguments: Any) -> Any:
            return thread.submit(lambda: ray.get(getattr(coordinator, method).remote(*arguments))).result()

        return run_attempt(task, call)


class RayRunner:
    """Runs a sweep until each run is finished, stopped or out of retries.

    `progress` of a run: node, device and start of its attempt, the columns of its newest row, "percent", and "first":
    percent and time of its first row.
    """

    def __init__(self, ray: ModuleType, sweep: Sweep, options: SweepOptions, table: LiveTable, asha: Asha | None):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray, self.sweep, self.options, self.table, self.asha = ray, sweep, options, table, asha
        self.gpus, self.cpus = resources_per_run(ray, options)
        self.by_name = {run.name: run for run in sweep.runs}
        self.inputs: dict[str, str] = sweep.config["data"]
        # The path on this machine distinguishes sweeps in the scratch folders of others.
        self.sweep_id = f"{sweep.config['id']}_{sha256(str(sweep.folder.resolve()).encode()).hexdigest()[:8]}"
        self.token = secrets.token_hex(16)
        (sweep.folder / TOKEN).write_text(self.token, encoding="utf-8")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Ray restarts the actor when it is killed (out of memory, say) and repeats the calls it had not answered.
        # Absolute paths: on a cluster it starts in Ray's copy of the code.
        actor = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(Coordinator)
        inputs = {name: str(Path(name).resolve()) for name in self.inputs}
        self.coordinator = actor.remote(str(sweep.folder.resolve()), inputs)
        # One function for all runs, as Ray sends each one to every worker. max_calls 0: Ray would end a worker after
        # each GPU task to free memory that only the run's own process has used.
        self.attempt = ray.remote(num_cpus=self.cpus, max_retries=0, max_calls=0, scheduling_strategy="SPREAD")(
            remote_attempt
        )
        self.pending: dict[Any, SweepRun] = {}
        self.judged: dict[str, int] = {}  # the last step of each run that ASHA has judged
        self.stop_reasons: dict[str, str] = {}  # run -> why it must stop
        self.hopeless: set[str] = set()  # runs that ASHA has stopped and that have not ended yet
        self.signals = 0
        self.saved_at = 0.0

    def run(self) -> None:
        """Returns when no run is left, or when a signal has stopped the sweep and every process has ended."""
        if self.asha is not None:
            self._replay()
        for run in self.sweep.runs:
            if run.status == WAITING:
                self._submit(run)
        with self._handle_signals(), self.table:
            handled = 0
            while self.pending:
                if self.signals > handled:
                    handled = self.signals
                    self._stop_all(hurry=handled > 1)
                self._collect()
                self.table.show(self.sweep.runs)
                self._save()
        self._save()

    def _submit(self, run: SweepRun) -> None:
        gpus = self.gpus
        if 0 < gpus < 1 and run.attempts and run.attempts[-1]["outcome"] in (OUT_OF_MEMORY, KILLED):
            gpus = 1.0  # it did not fit beside others: the next attempt gets a GPU of its own
        run.progress = {}
        task = vars(self.options) | {
            "name": run.name, "arguments": run.point.arguments(), "root": str(ROOT), "cwd": str(Path.cwd()),
            "folder": str(self.sweep.folder.resolve()), "sweep_id": self.sweep_id, "token": self.token,
            "inputs": self.inputs, "processes": int(gpus) if gpus > 1 else 1, "cpus": self.cpus, "gpus": gpus,
            "number": len(run.attempts) + 1,
        }  # fmt: skip
        self.pending[self.attempt.options(num_gpus=gpus).remote(task, self.coordinator)] = run

    def _collect(self) -> None:
        """Wait up to POLL_SECONDS for attempts to end, and record them."""
        done, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=POLL_SECONDS)
        if done:
            done, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
        self._take_reports()  # an attempt has reported before it ended
        for ref in done:
            run = self.pending.pop(ref)
            again = run.record_attempt(self._result(ref, run), self.options.retries)
            if run.name in self.hopeless:
                self.hopeless.discard(run.name)
                if run.status == FINISHED:
                    self.asha.finished_first(run.name, run.progress)
            if again and self.signals:
                run.status, again = INTERRUPTED, False
            self.table.ended(run, again)
            if again:
                self._submit(run)

    def _result(self, ref: Any, run: SweepRun) -> dict[str, Any]:
        """How an attempt ended: as it says itself, or why Ray could not run it."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref)
        except errors.TaskCancelledError:
            kind, line = INTERRUPTED, "stopped before it began"
        except errors.OutOfMemoryError as error:
            kind, line = OUT_OF_MEMORY, str(error).splitlines()[0]
        except errors.RayTaskError as error:
            kind, line = FAILED, str(error.cause)
        except errors.RayError as error:
            kind, line = "lost", f"{type(error).__name__}: the machine or its worker is gone"
        known = {name: run.progress[name] for name in ("node", "device", "started") if name in run.progress}
        return known | {
            "number": len(run.attempts) + 1, "outcome": kind, "step": run.progress.get("step"), "ended": now(),
            "lines": [line],
        }  # fmt: skip

    def _take_reports(self) -> None:
        for report in self.ray.get(self.coordinator.exchange.remote(self.stop_reasons, self.signals > 1)):
            run = self.by_name[report["run"]]
            if report["number"] != len(run.attempts) + 1:
                continue  # of an attempt that has ended
            if run.status == WAITING:
                run.status = RUNNING
                run.progress = {name: report[name] for name in ("node", "device", "started")}
                self.table.started(run)
            for row in report.get("rows", ()):
                self._take_row(run, row)

    def _take_row(self, run: SweepRun, row: dict[str, Any]) -> None:
        done = percent(run, row)
        run.progress.setdefault("first", (done, time.time()))
        run.progress |= row | {"percent": done}
        new = row["step"] > self.judged.get(run.name, 0)
        # Rows that a stopped run still logs are not compared with those of others.
        if self.asha is not None and new and run.status == RUNNING and run.name not in self.hopeless:
            self.judged[run.name] = row["step"]
            if self.asha.should_stop(run.name, done, row) and done < 100:
                log.info("%s: stopping early at step %d (%s %.4f)", run.name, row["step"], self.asha.metric,
                         row[self.asha.metric])  # fmt: skip
                self.hopeless.add(run.name)
                self.stop_reasons[run.name] = STOPPED

    def _replay(self) -> None:
        """Give ASHA the rows that runs have logged in earlier starts of this sweep."""
        for run in self.sweep.runs:
            path = self.sweep.run_folder(run) / LOG
            for row in new_rows(path, 0) if path.exists() else ():
                if self.asha.should_stop(run.name, percent(run, row), row, replay=True):
                    break

    def _stop_all(self, hurry: bool) -> None:
        log.warning("stopping now" if hurry else "stopping: runs save a checkpoint first; interrupt again to stop now")
        self.stop_reasons[ALL_RUNS] = INTERRUPTED
        self._take_reports()
        for ref, run in self.pending.items():
            if run.status == WAITING:
                self.ray.cancel(ref)

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP in `signals`; the third raises KeyboardInterrupt. `nohup` is respected."""
        terminals = [number for number in range(3) if os.isatty(number)]

        def handle(number: int, frame: Any) -> None:
            if number in HANGUP:
                self.signals = max(self.signals, 1)  # it may come twice, from the shell and the system
                null = os.open(os.devnull, os.O_RDWR)
                for terminal in terminals:  # writing to a closed terminal would fail
                    os.dup2(null, terminal)
                return
            self.signals += 1
            if self.signals > 2:
                raise KeyboardInterrupt

        handled = {signal.SIGINT, signal.SIGTERM} | {one for one in HANGUP if signal.getsignal(one) != signal.SIG_IGN}
        before = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self) -> None:
        """Write sweep.json every SAVE_SECONDS. A full disk is only a warning: the sweep's end saves once more."""
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            try:
                self.sweep.save()
            except UserError as error:
                log.warning("%s", error)
            self.saved_at = time.monotonic()


def percent(run: SweepRun, row: dict[str, Any]) -> float:
    """How much of the run is done, 0 to 100: by its steps where --max_steps is set, else by its epochs."""
    flags = run.point.settings()
    if flags.max_steps:
        return 100.0 * row["step"] / flags.max_steps
    return min(100.0, 100.0 * row.get("epoch", 0.0) / flags.epochs)
