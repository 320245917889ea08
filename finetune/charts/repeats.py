"""Runs that differ by their seed alone: one mean curve for each such group, and how far its runs lie apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.charts import curves
from finetune.charts.curves import COLUMNS, X_COLUMNS, Run, broke_off
from finetune.charts.run_labels import Comparison, Look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Band:
    """A group's runs as they were read, drawn around their mean."""

    runs: list[Run]
    look: Look


def merge_repeats(comparison: Comparison) -> tuple[Comparison, list[Band]]:
    """The comparison with one run for each group of repeats, and the groups of more than one run.

    A run that was broken off keeps its own curve: a mean over runs of unlike length would jump where one ends.
    """
    groups: dict[str, list[int]] = {}
    for index, (run, look) in enumerate(zip(comparison.runs, comparison.looks, strict=True)):
        alone = broke_off(run) or run.rows.empty
        groups.setdefault(f"{look.group} #{index}" if alone else look.group, []).append(index)
    runs, looks, bands = [], [], []
    for members in groups.values():
        look, some = comparison.looks[members[0]], [comparison.runs[index] for index in members]
        if len(some) > 1:
            bands.append(Band(some, look))
            look = replace(look, group=f"{look.group}  mean of {len(some)} seeds")
            some = [replace(some[0], rows=mean_rows(some))]
        runs.append(some[0])
        looks.append(look)
    return replace(comparison, runs=runs, looks=looks), bands


def mean_rows(runs: list[Run]) -> pd.DataFrame:
    """Column means over the runs at the steps that every run of the group has logged."""
    import pandas as pd

    together = pd.concat([run.rows.set_index("step") for run in runs])
    groups = together.groupby(level="step")
    rows = groups.mean()[groups.size() == len(runs)].reset_index()
    return rows[list(COLUMNS)]


def draw_repeats(axes: Axes, bands: list[Band], x: str, width: int | None, scale: float) -> None:
    """A band of one sample standard deviation to each side of the mean; a bar of the same length on each eval dot."""
    for band in bands:
        xs, middle, spread = mean_and_spread(band.runs, x, "loss", width)
        axes.fill_between(xs / scale, middle - spread, middle + spread, color=band.look.color, alpha=0.18, linewidth=0,
                          zorder=3)  # fmt: skip
        xs, middle, spread = mean_and_spread(band.runs, x, "eval_loss", 0)
        if 0 < len(xs) <= 60:
            axes.errorbar(xs / scale, middle, yerr=spread, fmt="none", ecolor=band.look.color, elinewidth=1.2,
                          capsize=2.5, zorder=5)  # fmt: skip


def mean_and_spread(runs: list[Run], x: str, y: str, width: int | None) -> tuple[Any, Any, Any]:
    """(x, mean, sample standard deviation) of the smoothed curves at the steps that all runs share."""
    import pandas as pd

    columns = []
    for run in runs:
        rows = run.rows[run.rows[y].notna()]
        smoothed = curves.smooth(rows[y].to_numpy(), width)
        columns.append(pd.Series(smoothed, index=rows["step"].to_numpy()))
    table = pd.concat(columns, axis=1, join="inner")
    places = mean_rows(runs).set_index("step")[X_COLUMNS[x]] if x != "step" else pd.Series(table.index, table.index)
    return places.loc[table.index].to_numpy(), table.mean(axis=1).to_numpy(), table.std(axis=1, ddof=1).to_numpy()
