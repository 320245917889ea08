"""`--from_largest`: of runs that differ only by their rank, train the largest, and report the others from it.

The largest run measures its own truncations when it ends (`--eval_ranks`) and records their losses in its config; here
they become rows of the table and dots of the chart.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.charts.curves import COLUMNS, LoggedRun
from finetune.charts.rows import Rows
from finetune.errors import UserError
from finetune.settings import BY_NAME
from finetune.sweep.grid import Point

if TYPE_CHECKING:
    from finetune.sweep.runs import Sweep, SweepRun


def rank_of(point: Point) -> int:
    return int(point.flags.get("rank", BY_NAME["rank"].default))


def largest_points(points: list[Point]) -> list[Point]:
    """The points with the largest rank among those with the same other flags, each told to evaluate the smaller ones.

    Raises UserError when nothing but one rank is swept, or a run has no evaluation rows.
    """
    groups: dict[str, list[Point]] = {}
    for point in points:
        others = {name: value for name, value in point.flags.items() if name != "rank"}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(point)
    kept = []
    for group in groups.values():
        largest = max(group, key=rank_of)
        if smaller := sorted({rank_of(point) for point in group} - {rank_of(largest)}):
            if not largest.settings().has_eval:
                raise UserError(f"--from_largest: run {largest.name} has no evaluation rows, with which smaller ranks "
                                "could be compared; add --eval_fraction or --eval_dataset")  # fmt: skip
            asked = sorted({*smaller, *(largest.flags.get("eval_ranks") or [])})
            largest = replace(largest, flags=largest.flags | {"eval_ranks": asked})
            largest.settings()  # checks the ranks
        kept.append(largest)
    if len(kept) == len(points):
        raise UserError("--from_largest: no two runs differ by their rank alone; give several values of --rank")
    return kept


def truncated_curves(sweep: Sweep, run: SweepRun, curve: LoggedRun) -> list[LoggedRun]:
    """What the run's config says of smaller ranks: a curve each, with the evaluation loss at the run's last step."""
    losses = (curve.config.get("ranks") or {}).get("eval_loss") or {}
    if not len(curve.rows):
        return []
    trained = rank_of(run.point)
    curves = []
    for rank, loss in sorted((int(rank), float(loss)) for rank, loss in losses.items()):
        if rank >= trained:
            continue
        # No time and no tokens of its own.
        row = dict.fromkeys(COLUMNS, float("nan")) | {"eval_loss": loss}
        row |= {name: float(curve.rows[name][-1]) for name in ("step", "epoch")}
        flags: dict[str, Any] = curve.flags | {"rank": rank, "alpha": curve.flags["alpha"] / trained * rank}
        config = {"flags": flags, "status": f"from rank {trained}"}
        # No folder of its own: a folder of that name would be taken for a run's.
        folder = sweep.run_folder(run) / f"rank{rank}"
        curves.append(LoggedRun(folder, Rows({name: [value] for name, value in row.items()}), config))
    return curves
