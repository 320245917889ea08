"""Runs a sweep's runs on Ray: on this machine, or on a cluster that is there already.

Ray queues, places and watches them; each is one process of train_lora.py (attempt.py). Ray's own retries are off:
what is tried again, and from which checkpoint, is decided here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.sweep.attempt import KILLED, OUT_OF_MEMORY, ROOT, run_attempt
from finetune.sweep.hub import EVERYTHING, Hub
from finetune.sweep.runs import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    RUNNING,
    STOPPED,
    TOKEN,
    WAITING,
    Sweep,
    SweepRun,
    local_files,
    now,
)  # fmt: skip
from finetune.sweep.stopping import Asha
from finetune.sweep.table import LiveTable

log = logging.getLogger("sandwich")
POLL_SECONDS = 0.5
SAVE_SECONDS = 1.0  # between two writings of sweep.json; with a thousand runs it has a megabyte
HANGUP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()  # a terminal is closed; Windows has no such signal
OBJECT_STORE_BYTES = 256 << 20  # pieces of files pass through it, never whole models
CODE = {"finetune", "formats", "train_lora.py"}  # what a node needs of this checkout


NO_RAY = "a sweep needs Ray; run: pip install -r requirements_optional.txt, or: pip install ray==2.60.0"


def require_ray() -> None:
    """UserError where Ray is not installed; does not import it, which takes seconds."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(NO_RAY)


@contextlib.contextmanager
def ray_session(options: Options):
    """Ray, started for this sweep or found at --address; ended (if started here) on the way out.

    Raises UserError when Ray is not installed or the cluster cannot be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own = options.address is None
    before = dict(os.environ)
    if own:
        # Ray's ports take work from whoever knows this session's token, and nobody else does.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # And they listen on 127.0.0.1 alone. Ray resolves that to an address that others reach wherever it allows
        # clusters; this variable, read when it is imported, forbids them as it does on Windows and macOS.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        import ray
    except ImportError:
        raise UserError(NO_RAY) from None
    common = {"logging_level": "ERROR", "log_to_driver": False}
    if own:
        common |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
                   "_node_ip_address": "127.0.0.1"}  # fmt: skip
    else:
        if options.address.startswith("ray://"):
            raise UserError("--address ray://…: start the sweep on a machine of the cluster, with --address auto")
        _check_answers(options.address)
        others = [f"/{path.name}" for path in ROOT.iterdir() if path.name not in CODE]
        code = {"working_dir": str(ROOT), "excludes": [*others, "__pycache__"]}
        common |= {"address": options.address, "runtime_env": code}
    try:
        try:
            with _ctrl_c_held_back():
                ray.init(**common)
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: no address at all
            where = f"the cluster at {options.address}" if options.address else "Ray on this machine"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if own and isinstance(error, OSError):  # a name of 107 bytes is the most that a socket may have
                reason += "; set RAY_TMPDIR to a folder with a short name that you may write to"
            raise UserError(f"cannot start {where}: {reason}") from error
        yield ray
    finally:
        ray.shutdown()
        if own:
            os.environ.clear()
            os.environ.update(before)


def _check_answers(address: str) -> None:
    """UserError where nobody listens at host:port; Ray itself would ask for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot reach a cluster at {address}: {error}; check --address, or ray start it"
            ) from error


@contextlib.contextmanager
def _ctrl_c_held_back():
    """A Ctrl-C counts when Ray has started: in the middle of that it ends in a segmentation fault of Ray's.

    A terminal that is closed is to be heard of by the sweep alone, which ends its runs well. What Ray starts lies in
    the same group of processes and would end of that signal; a signal that is blocked here is blocked there.
    """
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    if HANGUP:
        signal.pthread_sigmask(signal.SIG_BLOCK, HANGUP)
    try:
        yield
    finally:
        if HANGUP:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANGUP)
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def resources_per_run(ray: Any, options: Options) -> tuple[float, float]:
    """(GPUs, CPUs) for each run: one GPU where the cluster has any, else all cores of its smallest node.

    Raises UserError when no machine here can ever run one; a cluster may still grow, so there it is a warning.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = options.gpus_per_run, options.cpus_per_run
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    if cpus is None:
        able = [node.get("CPU", 0) for node in nodes if node.get("CPU", 0) >= 1]
        cpus = 1.0 if gpus or not able else float(min(able))
    if not any(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= cpus for node in nodes):
        most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        text = (f"no machine has {gpus:g} GPUs and {cpus:g} CPUs for a run; the largest has {most.get('GPU', 0):g} "
                f"and {most.get('CPU', 0):g} (--gpus_per_run, --cpus_per_run)")  # fmt: skip
        if options.address is None:
            raise UserError(text)
        log.warning("%s; waiting for one to join", text)
    return gpus, cpus


def remote_attempt(task: dict[str, Any], hub: Any) -> dict[str, Any]:
    """The Ray task: an attempt whose calls go to the hub's actor."""
    import ray

    # A name of the machine: several Ray nodes on one of them must not work in one folder.
    task = task | {"machine": ray.get_runtime_context().get_node_id()[:12]}
    # Not on the task's own thread: while that waits for an answer, Ray gives the task's CPUs to another run.
    with ThreadPoolExecutor(max_workers=1) as thread:

        def call(method: str, *arguments: Any) -> Any:
            return thread.submit(lambda: ray.get(getattr(hub, method).remote(*arguments))).result()

        try:
            return run_attempt(task, call)
        except UserError as error:
            return _lost(task, REFUSED, str(error))
        except OSError as error:
            return _lost(task, FAILED, f"{type(error).__name__}: {error}")


def _lost(task: dict[str, Any], outcome: str, line: str) -> dict[str, Any]:
    return {"number": task["number"], "outcome": outcome, "step": None, "ended": now(), "lines": [line]}


class RayRunner:
    """Keeps the runs of one sweep going until each is finished, stopped or out of retries."""

    def __init__(self, ray: Any, sweep: Sweep, options: Options, table: LiveTable, asha: Asha | None):
        self.ray, self.sweep, self.options, self.table, self.asha = ray, sweep, options, table, asha
        self.gpus, self.cpus = resources_per_run(ray, options)
        self.by_name = {run.name: run for run in sweep.runs}
        files = local_files([run.point for run in sweep.runs])
        self.inputs = {name: sweep.config["data"][name] for name in files}
        # Folders on other machines are told apart by where the sweep lies on this one.
        self.sweep_id = f"{sweep.config['id']}_{sha256(str(sweep.folder.resolve()).encode()).hexdigest()[:8]}"
        self.token = secrets.token_hex(16)
        (sweep.folder / TOKEN).write_text(self.token, encoding="utf-8")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Whole paths: on a cluster an actor starts in Ray's copy of the code, not where the sweep was started.
        # Killed for want of memory, say, it is started again, and what it was asked meanwhile is asked again.
        self.hub = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(Hub).remote(
            str(sweep.folder.resolve()), {name: str(Path(name).resolve()) for name in self.inputs}
        )
        # One for all runs, since Ray ships each remote function to every worker. max_calls 0: Ray would end a worker
        # after each GPU task to free memory that only our own process ever held.
        self.attempt = ray.remote(num_cpus=self.cpus, max_retries=0, max_calls=0, scheduling_strategy="SPREAD")(
            remote_attempt
        )
        self.pending: dict[Any, SweepRun] = {}
        self.decided: dict[str, int] = {}  # the last step of each run that the scheduler has judged
        self.orders: dict[str, str] = {}  # to the runs, through the hub
        self.told: set[str] = set()  # runs that the scheduler wants stopped
        self.signals = 0
        self.saved = 0.0

    def run(self) -> None:
        """Returns when nothing is left to do, or when a signal has stopped it and every process has ended."""
        if self.asha is not None:
            self._replay()
        for run in self.sweep.runs:
            if run.status == WAITING:
                self._submit(run)
        with self._signals(), self.table:
            told = 0
            while self.pending:
                if self.signals > told:
                    told = self.signals
                    self._stop_all(hurry=told > 1)
                self._collect()
                self.table.show(self.sweep.runs)
                self._save()
        self._save()

    # --- one run ------------------------------------------------------------------------------------------------------

    def _submit(self, run: SweepRun) -> None:
        gpus = self.gpus
        if 0 < gpus < 1 and run.attempts and run.attempts[-1]["outcome"] in (OUT_OF_MEMORY, KILLED):
            gpus = 1.0  # it did not fit beside others: the next try has the card to itself
        run.progress = {}
        sweep, number = self.sweep, len(run.attempts) + 1
        task = {
            "name": run.name, "words": run.point.words(), "command": list(self.options.command), "root": str(ROOT),
            "folder": str(sweep.folder.resolve()), "cwd": str(Path.cwd()), "scratch": self.options.scratch,
            "sweep_id": self.sweep_id, "token": self.token, "transport": self.options.transport, "inputs": self.inputs,
            "processes": int(gpus) if gpus > 1 else 1, "cpus": self.cpus, "gpus": gpus,
            "number": number, "interval": self.options.interval, "patience": self.options.patience,
            "silence": self.options.hang_minutes * 60,
        }  # fmt: skip
        self.pending[self.attempt.options(num_gpus=gpus).remote(task, self.hub)] = run

    def _collect(self) -> None:
        """Wait a moment for attempts to end, and take in how."""
        done, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=POLL_SECONDS)
        if done:
            done, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
        self._listen()  # what an attempt has reported came before its end
        for ref in done:
            run = self.pending.pop(ref)
            outcome = self._outcome(ref, run)
            again = run.ended(outcome, self.options.retries)
            if run.name in self.told:
                self.told.discard(run.name)
                if run.status == FINISHED:
                    self.asha.too_late(run.name, run.progress)
            if again and self.signals:
                run.status, again = INTERRUPTED, False
            self.table.ended(run, again)
            if again:
                self._submit(run)

    def _outcome(self, ref: Any, run: SweepRun) -> dict[str, Any]:
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

    # --- news ---------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for update in self.ray.get(self.hub.exchange.remote(self.orders, self.signals > 1)):
            run = self.by_name[update["run"]]
            if update["number"] != len(run.attempts) + 1:
                continue  # a last word of an attempt that is over
            if run.status == WAITING:
                run.status = RUNNING
                run.progress = {name: update[name] for name in ("node", "device", "started")} | {"clock": time.time()}
                self.table.started(run)
            for row in update.get("rows", ()):
                self._take_row(run, row)

    def _take_row(self, run: SweepRun, row: dict[str, Any]) -> None:
        new = row["step"] > self.decided.get(run.name, 0)
        if "first" not in run.progress:
            run.progress["first"] = (percent(run, row), time.time())
        run.progress |= row | {"percent": percent(run, row)}
        # What a run still logs on its way out is no measure for those that go on.
        if self.asha is not None and new and run.status == RUNNING and run.name not in self.told:
            self.decided[run.name] = row["step"]
            hopeless = self.asha.result(run.name, run.progress["percent"], row)
            if hopeless and run.progress["percent"] < 100:
                log.info("%s: to stop early at step %d (%s %.4f)", run.name, row["step"], self.asha.metric,
                         row[self.asha.metric])  # fmt: skip
                self.told.add(run.name)
                self.orders[run.name] = STOPPED

    def _replay(self) -> None:
        """Tell the scheduler what runs of an earlier start of this sweep have reached."""
        from finetune.runs.experiment import LOG
        from finetune.sweep.attempt import new_rows

        for run in self.sweep.runs:
            log_file = self.sweep.run_folder(run) / LOG
            for row in new_rows(log_file, 0) if log_file.exists() else ():
                if self.asha.result(run.name, percent(run, row), row, replay=True):
                    break

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _stop_all(self, hurry: bool) -> None:
        log.warning("stopping: %s", "at once" if hurry else
                    "runs save a checkpoint and end; again to stop at once")  # fmt: skip
        self.orders[EVERYTHING] = INTERRUPTED
        self._listen()
        for ref, run in self.pending.items():
            if run.status == WAITING:
                self.ray.cancel(ref)

    @contextlib.contextmanager
    def _signals(self):
        on_terminal = [number for number in range(3) if os.isatty(number)]

        def handle(number, frame):
            if number in HANGUP:
                self.signals = max(self.signals, 1)  # it may come from the shell and the system
                nowhere = os.open(os.devnull, os.O_RDWR)
                for one in on_terminal:  # whoever writes there from now on would fail
                    os.dup2(nowhere, one)
                return
            self.signals += 1
            if self.signals > 2:
                raise KeyboardInterrupt

        heeded = {signal.SIGINT, signal.SIGTERM} | {one for one in HANGUP if signal.getsignal(one) != signal.SIG_IGN}
        before = {number: signal.signal(number, handle) for number in heeded}  # ignored by nohup: it stays so
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self) -> None:
        """Now and then. A full disk ends no run here: the sweep's end saves once more, and says if it cannot."""
        if time.monotonic() - self.saved > SAVE_SECONDS:
            try:
                self.sweep.save()
            except UserError as error:
                log.warning("%s", error)
            self.saved = time.monotonic()


def percent(run: SweepRun, row: dict[str, Any]) -> float:
    """How much of the run is done, 0 to 100: by its steps where --max_steps says how many, else by its epochs."""
    flags = run.point.settings()
    if flags.max_steps:
        return 100.0 * row["step"] / flags.max_steps
    return min(100.0, 100.0 * row.get("epoch", 0.0) / flags.epochs)


@dataclass(frozen=True)
class Options:
    """The flags of sweep_lora.py of the same names. interval: seconds between two looks at a run's log; patience:
    seconds that a run has for its last step and its checkpoint when it is told to stop; hang_minutes: a run
    that neither logs nor prints for so long is ended and tried again (0: never).
    """

    address: str | None = None
    gpus_per_run: float | None = None
    cpus_per_run: float | None = None
    transport: str = "auto"
    scratch: str | None = None
    retries: int = 2
    command: tuple[str, ...] = ()
    patience: float = 120.0
    interval: float = 1.0
    hang_minutes: float = 60.0
