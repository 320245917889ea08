"""What a running sweep shows: a live table where a person looks, a line for each event where a log does."""

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
MOST_ROWS = 30
SECONDS_BETWEEN_LINES = 30
STYLES = {RUNNING: "bold", FAILED: "red", INTERRUPTED: "yellow", WAITING: "dim"}
MANY = 50  # with more runs than this, a run's start and good end are no news


class LiveTable:
    """Context manager; `show` may be called as often as one likes."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.live: Live | None = None
        self.began = self.last_line = time.time()
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
        if self.total <= MANY:
            log.info("%s: started on %s, %s", run.name, run.progress["node"], run.progress["device"])

    def ended(self, run: SweepRun, again: bool) -> None:
        if run.status in DONE or run.status == INTERRUPTED:  # perhaps before its first attempt began
            if self.total <= MANY:
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
        # What earlier starts of this sweep have done took none of this start's time.
        self.done_before = done + failed if self.done_before is None else self.done_before
        lately = done + failed - self.done_before + sum(_share(run) for run in runs if run.status == RUNNING)
        if lately > 0.02 and running + waiting:
            seconds = (time.time() - self.began) / lately * (len(runs) - self.done_before - lately)
            text += f", about {duration(max(seconds, 0))} left"
        return text

    def _table(self, runs: list[SweepRun]) -> Table:
        order = {RUNNING: 0, FAILED: 1, INTERRUPTED: 2, WAITING: 3}
        shown = sorted(runs, key=lambda run: order.get(run.status, 4))[:MOST_ROWS] if len(runs) > MOST_ROWS else runs
        more = f"; {len(runs) - len(shown)} more not shown" if len(shown) < len(runs) else ""
        table = Table(box=None, padding=(0, 1), header_style="bold", caption=self.line(runs) + more)
        for name in ("run", "status", "step", "loss", "eval", "left", "device", "tries"):
            table.add_column(name, justify="right" if name in ("step", "loss", "eval", "left", "tries") else "left")
        for run in shown:
            news = run.progress
            device = f"{news['node']} {news['device']}" if run.status == RUNNING else ""
            tries = len(run.attempts) + (run.status == RUNNING)
            table.add_row(
                run.name, run.status, str(news.get("step", "")), _loss(news.get("loss")), _loss(news.get("eval_loss")),
                eta(run), device, str(tries) if tries > 1 else "", style=STYLES.get(run.status),
            )  # fmt: skip
        return table


def eta(run: SweepRun) -> str:
    """Time left of a running run, from how fast its share of the whole has grown since its first logged row."""
    if run.status != RUNNING or "first" not in run.progress:
        return ""
    share, since = run.progress["first"]
    gained = run.progress["percent"] - share
    if gained <= 0:
        return ""
    return duration((time.time() - since) / gained * max(100 - run.progress["percent"], 0))


def _share(run: SweepRun) -> float:
    return run.progress.get("percent", 0.0) / 100


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
