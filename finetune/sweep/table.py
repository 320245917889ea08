"""The display of a running sweep: a live table on a terminal, otherwise a line now and then; events as log lines."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from finetune.charts.curves import duration
from finetune.sweep.runs import DONE, FAILED, INTERRUPTED, RUNNING, WAITING, SweepRun

log = logging.getLogger("sandwich")
MAX_ROWS = 30
SECONDS_BETWEEN_LINES = 30
STYLES = {RUNNING: "bold", FAILED: "red", INTERRUPTED: "yellow", WAITING: "dim"}  # most interesting first
MAX_RUNS_LOGGED = 50  # in larger sweeps, only failures of runs are logged
COLUMNS = {"run": "left", "status": "left", "step": "right", "loss": "right", "eval": "right", "left": "right",
           "device": "left", "tries": "right"}  # fmt: skip


class LiveTable:
    """A context manager; `show` redraws the table, or logs one line every SECONDS_BETWEEN_LINES."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.live: Live | None = None
        self.start = self.last_line = time.time()
        self.done_before: int | None = None

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def started(self, run: SweepRun) -> None:
        if self.total <= MAX_RUNS_LOGGED:
            log.info("%s: started on %s, %s", run.name, run.progress["node"], run.progress["device"])

    def ended(self, run: SweepRun, again: bool) -> None:
        if run.status in DONE or run.status == INTERRUPTED:
            if self.total <= MAX_RUNS_LOGGED:
                log.info("%s: %s", run.name, run.status)
            return
        attempt = run.attempts[-1]
        last = (attempt.get("lines") or [""])[-1]
        log.warning("%s: %s%s, %s", run.name, attempt["outcome"], f" ({last})" if last else "",
                    "trying again" if again else "given up")  # fmt: skip

    def show(self, runs: list[SweepRun]) -> None:
        if self.live is not None:
            self.live.update(self._table(runs))
        elif time.time() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.time()
            log.info("%s", self.line(runs))

    def line(self, runs: list[SweepRun]) -> str:
        """`12 of 40 done, 1 failed, 4 running, 23 waiting, about 1:05 h left`."""
        done, failed = sum(run.status in DONE for run in runs), sum(run.status == FAILED for run in runs)
        running, waiting = (sum(run.status == status for run in runs) for status in (RUNNING, WAITING))
        text = f"{done} of {len(runs)} done, {failed} failed, {running} running, {waiting} waiting"
        # Runs that earlier starts of this sweep have done took no time of this one.
        self.done_before = done + failed if self.done_before is None else self.done_before
        share = sum(run.progress.get("percent", 0.0) / 100 for run in runs if run.status == RUNNING)
        completed = done + failed - self.done_before + share
        if completed > 0.02 and running + waiting:
            seconds = (time.time() - self.start) / completed * (len(runs) - self.done_before - completed)
            text += f", about {duration(max(seconds, 0))} left"
        return text

    def _table(self, runs: list[SweepRun]) -> Table:
        order = list(STYLES)
        shown = sorted(runs, key=lambda run: order.index(run.status) if run.status in order else len(order))
        shown = shown[:MAX_ROWS] if len(runs) > MAX_ROWS else runs
        more = f"; {len(runs) - len(shown)} more not shown" if len(shown) < len(runs) else ""
        table = Table(box=None, padding=(0, 1), header_style="bold", caption=self.line(runs) + more)
        for name, justify in COLUMNS.items():
            table.add_column(name, justify=justify)
        for run in shown:
            progress, tries = run.progress, len(run.attempts) + (run.status == RUNNING)
            losses = (f"{progress[name]:.4f}" if name in progress else "" for name in ("loss", "eval_loss"))
            device = f"{progress['node']} {progress['device']}" if run.status == RUNNING else ""
            table.add_row(
                run.name, run.status, str(progress.get("step", "")), *losses, time_left(run), device,
                str(tries) if tries > 1 else "", style=STYLES.get(run.status),
            )  # fmt: skip
        return table


def time_left(run: SweepRun) -> str:
    """Time left of a running run, from its progress since its first logged row; "" while unknown."""
    if run.status != RUNNING or "first" not in run.progress:
        return ""
    first_percent, first_time = run.progress["first"]
    gained = run.progress["percent"] - first_percent
    if gained <= 0:
        return ""
    return duration((time.time() - first_time) / gained * max(100 - run.progress["percent"], 0))
