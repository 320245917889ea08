"""Runs that differ only by their seed: one mean curve for each such group, and the spread of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetune.charts import curves
from finetune.charts.curves import COLUMNS, X_COLUMNS, LoggedRun
from finetune.charts.run_labels import Comparison, Look

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Band:
    """The runs of a group; their spread is drawn around their mean."""

    runs: list[LoggedRun]
    look: Look


def merge_repeats(comparison: Comparison) -> tuple[Comparison, list[Band]]:
    """The comparison with one mean run for each group of repeats, and the groups of more than one run.

    A run that broke off keeps its own curve: the mean would jump where it ends.
    """
    groups: dict[str, list[int]] = {}
    for index, (run, look) in enumerate(zip(comparison.runs, comparison.looks, strict=True)):
        alone = run.is_broken_off or run.rows.empty
        groups.setdefault(f"{look.group} #{index}" if alone else look.group, []).append(index)
    runs, looks, bands = [], [], []
    for members in groups.values():
        look, repeats = comparison.looks[members[0]], [comparison.runs[index] for index in members]
        run = repeats[0]
        if len(repeats) > 1:
            bands.append(Band(repeats, look))
            look = replace(look, group=f"{look.group}  mean of {len(repeats)} seeds")
            run = replace(run, rows=mean_rows(repeats))
        runs.append(run)
        looks.append(look)
    return replace(comparison, runs=runs, looks=looks), bands


def mean_rows(runs: list[LoggedRun]) -> pd.DataFrame:
    """Means of all columns over the runs, at the steps that every run has logged."""
    import pandas as pd

    groups = pd.concat([run.rows for run in runs]).groupby("step")
    return groups.mean()[groups.size() == len(runs)].reset_index()[list(COLUMNS)]


def draw_repeats(axes: Axes, bands: list[Band], x: str, width: int | None, scale: float) -> None:
    """A band of one sample standard deviation around each mean curve, and error bars of that length at eval losses."""
    for band in bands:
        xs, middle, spread = mean_and_spread(band.runs, x, "loss", width)
        axes.fill_between(xs / scale, middle - spread, middle + spread, color=band.look.color, alpha=0.18, linewidth=0,
                          zorder=3)  # fmt: skip
        xs, middle, spread = mean_and_spread(band.runs, x, "eval_loss", 0)
        if 0 < len(xs) <= 60:
            axes.errorbar(xs / scale, middle, yerr=spread, fmt="none", ecolor=band.look.color, elinewidth=1.2,
                          capsize=2.5, zorder=5)  # fmt: skip


def mean_and_spread(
    runs: list[LoggedRun], x: str, y: str, width: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, sample standard deviation) of the smoothed curves at the steps that all runs share."""
    import pandas as pd

    columns = []
    for run in runs:
        rows = run.rows[run.rows[y].notna()]
        columns.append(pd.Series(curves.smooth(rows[y].to_numpy(), width), index=rows["step"].to_numpy()))
    table = pd.concat(columns, axis=1, join="inner")
    xs = mean_rows(runs).set_index("step")[X_COLUMNS[x]] if x != "step" else pd.Series(table.index, table.index)
    return xs.loc[table.index].to_numpy(), table.mean(axis=1).to_numpy(), table.std(axis=1, ddof=1).to_numpy()
