"""The results of a sweep: the table, the chart, and the best run."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from finetune.charts import curves
from finetune.charts.curves import LoggedRun, last_tenth
from finetune.charts.plots import draw_curves
from finetune.charts.run_labels import Comparison, compare_runs
from finetune.charts.tables import print_table, write_summary
from finetune.runs.experiment import LOG
from finetune.sweep.from_largest import truncated_curves
from finetune.sweep.runs import FINISHED, WAITING, Sweep, SweepRun

SUMMARY, PICTURE = "summary.csv", "comparison.png"


@dataclass(frozen=True)
class Best:
    """The run, or the repeats of one setting, with the lowest loss; `values` has one entry for each repeat."""

    setting: str
    folder: str
    metric: str
    values: list[float]
    cut_to: int | None = None  # with --from_largest: the rank to which the folder's adapter has to be cut

    def text(self) -> str:
        loss = f"{mean(self.values):.4f}"
        if len(self.values) > 1:
            loss += f" ± {stdev(self.values):.4f} over {len(self.values)} seeds"
        text = f"best: {self.setting} ({self.metric} {loss}), {self.folder}"
        if self.cut_to is not None:
            text += f"; get it with: python export_lora.py {self.folder} --to adapter --rank {self.cut_to}"
        return text


def write_results(sweep: Sweep) -> Best | None:
    """Print the table, write summary.csv and, where any loss was logged, comparison.png; returns the best run."""
    runs = {str(sweep.run_folder(run)): run for run in sweep.runs if run.status != WAITING or run.attempts}
    if not runs:
        return None
    curves_of_runs = {folder: as_curve(sweep, run) for folder, run in runs.items()}
    truncated = [cut for folder, run in runs.items() for cut in truncated_curves(sweep, run, curves_of_runs[folder])]
    comparison = compare_runs([*curves_of_runs.values(), *truncated])
    table = []
    for curve in comparison.runs:
        if curve.is_truncated:
            table.append(curves.summarize(curve) | {"folder": str(curve.folder.parent)})
            continue
        run = runs[str(curve.folder)]
        last = run.attempts[-1] if run.attempts else {}
        lines = last.get("lines") or [""]
        extra = {"attempts": len(run.attempts), "node": last.get("node"), "device": last.get("device"),
                 "last_outcome": last.get("outcome"), "last_line": lines[-1]}  # fmt: skip
        table.append(curves.summarize(curve) | extra)
    best = find_best(comparison)
    with contextlib.suppress(SystemExit):  # rich raises it for a closed pipe (| head); the files must be written
        print_table(table)
    write_summary(sweep.folder / SUMMARY, comparison, table)
    if any(row["final_loss"] is not None for row in table):  # truncated adapters have none, but their run has
        draw_curves(comparison, sweep.folder / PICTURE, repeats=True)
    return best


def as_curve(sweep: Sweep, run: SweepRun) -> LoggedRun:
    """The run's folder as the charts read it, with the flags and the status that the sweep knows.

    Runs without a folder get them too, and a --command may not record the flags that the sweep varies.
    """
    curve = curves.read_run(sweep.run_folder(run) / LOG)
    curve.config["flags"] = run.point.settings().run_flags()
    curve.config["status"] = run.status
    return curve


def find_best(comparison: Comparison) -> Best | None:
    """The setting with the lowest mean over its repeats: of eval_loss where every finished run has one, else of loss.

    A setting qualifies when all its repeats have finished and their last losses are finite.
    """
    finished = [run for run in comparison.runs if run.is_truncated or (run.status == FINISHED and _ends_finite(run))]
    evaluated = bool(finished) and all(len(run.rows.logged("eval_loss")) for run in finished)
    groups: dict[str, list[LoggedRun]] = {}
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        groups.setdefault(look.group, []).append(run)
    candidates = []
    for name, runs in groups.items():
        if all(run in finished for run in runs):
            values = [_loss(run, evaluated) for run in runs]
            first = runs[values.index(min(values))]
            metric = "eval_loss" if evaluated else "training loss"
            if first.is_truncated:
                setting = f"{name} {first.status}"
                candidates.append(Best(setting, str(first.folder.parent), metric, values, int(first.flags["rank"])))
            else:
                candidates.append(Best(name, str(first.folder), metric, values))
    return min(candidates, key=lambda one: mean(one.values), default=None)


def _ends_finite(run: LoggedRun) -> bool:
    """Whether the run has logged losses, and those that rank it are finite."""
    evaluations = run.rows.logged("eval_loss")
    has_loss = len(run.rows.logged("loss")) > 0
    return has_loss and math.isfinite(_loss(run, False)) and math.isfinite(evaluations[-1:].sum())


def _loss(run: LoggedRun, evaluated: bool) -> float:
    if evaluated:
        return float(run.rows.logged("eval_loss").min())
    loss: Any = last_tenth(run.rows.logged("loss"))
    return loss
