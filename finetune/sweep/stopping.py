"""Early stopping of hopeless runs: Ray Tune's ASHA decides, and every decision is recorded.

ASHA, Li et al., arXiv:1810.05934: at each rung a run continues only if its loss is among the best 1/reduction of those
that have reached the rung so far. Rungs are per cent of a run's own length, so runs of different batch sizes compare.
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
FINISHED_FIRST = "finished before it could be stopped"
NONFINITE_LOSS = 1e9  # replaces a loss that is NaN or infinite
MAX_RUNGS = 20  # every recorded decision contains the state of every rung


def rungs(grace: float, reduction: float) -> list[float]:
    """The per cent of a run at which it is judged. Raises UserError when there are too many."""
    count = math.ceil((math.log(100) - math.log(grace)) / math.log(reduction))
    if count > MAX_RUNGS:
        raise UserError(
            f"--asha_grace {grace:g} with --asha_reduction {reduction!r} makes {count:,} rungs, more than {MAX_RUNGS}; "
            "increase one of them"
        )
    return [grace * reduction**k for k in range(count)]


class Asha:
    """Gets the losses of all runs in the order in which they are logged; says which run must stop."""

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

    def should_stop(self, run: str, percent: float, row: dict[str, Any], *, replay: bool = False) -> bool:
        """Whether the run must stop after this row of its log. replay: the decision has been recorded already."""
        if self.metric not in row:
            return False
        if run not in self.trials:
            self.trials[run] = SimpleNamespace(trial_id=run)
            self.scheduler.on_trial_add(None, self.trials[run])
        before = self.reached.get(run, 0.0)
        self.reached[run] = max(before, percent)
        crossed = [rung for rung in self.rungs if before < rung <= percent]
        loss = row[self.metric]
        result = {"percent": percent, "loss": loss if math.isfinite(loss) else NONFINITE_LOSS}
        stop = self.scheduler.on_trial_result(None, self.trials[run], result) == self.scheduler.STOP
        if crossed and not replay:
            self._record(run, row, crossed[-1], "stop" if stop else "go on")
        return stop

    def finished_first(self, run: str, row: dict[str, Any]) -> None:
        """Record that a run finished before the order to stop reached it; `row`: the last of its log."""
        self._record(run, row, 100.0, FINISHED_FIRST)

    def _record(self, run: str, row: dict[str, Any], rung: float, decision: str) -> None:
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
            log.warning("cannot write to %s: %s; decision at step %d of %s: %s", self.path, error.strerror, row["step"],
                        run, decision)  # fmt: skip
