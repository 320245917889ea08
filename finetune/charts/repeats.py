"""Runs that differ only by their seed: one mean curve for each such group, and the spread of its runs."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetune.charts import curves
from finetune.charts.curves import COLUMNS, X_COLUMNS, LoggedRun
from finetune.charts.rows import Rows
from finetune.charts.run_labels import Comparison, Look

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes


MAX_BANDS = 8


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
        alone = run.is_broken_off or not len(run.rows)
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


def mean_rows(runs: list[LoggedRun]) -> Rows:
    """Means of all columns over the runs, at the steps that every run has logged."""
    import numpy as np

    steps = shared([run.rows["step"] for run in runs])
    at = [run.rows.take(np.searchsorted(run.rows["step"], steps)) for run in runs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column that no run has logged there
        return Rows({name: np.nanmean([rows[name] for rows in at], axis=0) for name in COLUMNS})


def shared(steps: list[np.ndarray]) -> np.ndarray:
    """The steps, sorted, that are in every array."""
    import numpy as np

    return functools.reduce(np.intersect1d, steps)


def draw_repeats(axes: Axes, bands: list[Band], x: str, width: int | None, scale: float) -> None:
    """A band of one sample standard deviation around each mean curve, and an error bar at its lowest evaluation.

    More than MAX_BANDS would hide each other: their mean curves stand alone.
    """
    for band in bands if len(bands) <= MAX_BANDS else ():
        color = band.look.color
        xs, middle, spread = mean_and_spread(band.runs, x, "loss", width)
        axes.fill_between(xs / scale, middle - spread, middle + spread, color=color, alpha=0.18, linewidth=0, zorder=3)
        xs, middle, spread = mean_and_spread(band.runs, x, "eval_loss", 0)
        if len(xs):
            at = [middle.argmin()]
            axes.errorbar(xs[at] / scale, middle[at], yerr=spread[at], fmt="none", ecolor=color, elinewidth=1.2,
                          capsize=2.5, zorder=5)  # fmt: skip


def mean_and_spread(
    runs: list[LoggedRun], x: str, y: str, width: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, sample standard deviation) of the smoothed curves at the steps that all runs share."""
    import numpy as np

    logged = [run.rows.take(np.isfinite(run.rows[y])) for run in runs]
    steps = shared([rows["step"] for rows in logged])
    values = np.array([curves.smooth(rows[y], width)[np.searchsorted(rows["step"], steps)] for rows in logged])
    means = mean_rows(runs)
    xs = means[X_COLUMNS[x]][np.searchsorted(means["step"], steps)]
    return xs, values.mean(axis=0), values.std(axis=0, ddof=1)
