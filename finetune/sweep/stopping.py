"""Early stopping of hopeless runs: Ray Tune's ASHA decides, every decision is written down.

ASHA, Li et al., arXiv:1810.05934: at each rung a run goes on only if its loss is among the best 1/reduction of those
that have reached the rung so far. Rungs are per cent of a run's own length, so that runs of unlike batch sizes meet.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.errors import UserError
from finetune.sweep.runs import now

log = logging.getLogger("sandwich")
DECISIONS = "decisions.jsonl"
OUTRAN = "finished before it could be stopped"
NO_NUMBER = 1e9  # what a loss that is NaN or infinite counts as
MOST_RUNGS = 20  # the state of every rung goes into every decision that is written down


def rungs(grace: float, reduction: float) -> list[float]:
    """The shares of a run, in per cent, at which it is judged; UserError where that is hardly ever or all the time."""
    count = math.ceil((math.log(100) - math.log(grace)) / math.log(reduction))
    if count > MOST_RUNGS:
        raise UserError(
            f"--asha_grace {grace:g} with --asha_reduction {reduction!r} makes {count:,} rungs, more than "
            f"{MOST_RUNGS}; give a larger one of the two"
        )
    return [grace * reduction**k for k in range(count)]


class Asha:
    """Takes losses of runs in the order in which they come; says which run is to stop."""

    def __init__(self, folder: Path, *, metric: str, grace: float, reduction: float):
        from ray.tune.schedulers import AsyncHyperBandScheduler

        self.metric, self.path = metric, folder / DECISIONS
        self.rungs = rungs(grace, reduction)
        self.scheduler = AsyncHyperBandScheduler(
            time_attr="percent", metric="loss", mode="min", grace_period=grace, reduction_factor=reduction, max_t=100,
            stop_last_trials=False,
        )  # fmt: skip
        self.trials: dict[str, Any] = {}
        self.reached: dict[str, float] = {}

    def result(self, run: str, percent: float, row: dict[str, Any], *, replay: bool = False) -> bool:
        """Whether the run is to stop after this row of its log. `replay`: an old row, whose decision is on file."""
        if self.metric not in row:
            return False
        if run not in self.trials:
            self.trials[run] = SimpleNamespace(trial_id=run)
            self.scheduler.on_trial_add(None, self.trials[run])
        before = self.reached.get(run, 0.0)
        self.reached[run] = max(before, percent)
        crossed = [rung for rung in self.rungs if before < rung <= percent]
        loss = row[self.metric]
        known = {"percent": percent, "loss": loss if math.isfinite(loss) else NO_NUMBER}
        decision = self.scheduler.on_trial_result(None, self.trials[run], known)
        stop = decision == self.scheduler.STOP
        if crossed and not replay:
            self._write(run, row, crossed[-1], "stop" if stop else "go on")
        return stop

    def too_late(self, run: str, row: dict[str, Any]) -> None:
        """Write down that a run had finished before the word to stop reached it; `row`: the last of its log."""
        self._write(run, row, 100.0, OUTRAN)

    def _write(self, run: str, row: dict[str, Any], rung: float, decision: str) -> None:
        loss = row[self.metric]
        entry = {
            "time": now(), "run": run, "step": row["step"], "rung_percent": rung, "metric": self.metric,
            "value": loss if math.isfinite(loss) else str(loss), "decision": decision,
            "state": self.scheduler.debug_string().splitlines()[1:],
        }  # fmt: skip
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must not end the runs
            log.warning("%s: %s at step %d, and it cannot be written to %s: %s", run, decision, row["step"], self.path,
                        error.strerror)  # fmt: skip
