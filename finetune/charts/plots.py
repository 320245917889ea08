"""The loss curves of many runs in one picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.charts import curves
from finetune.charts.call_panel import HEIGHT, add_call_panel, has_scores
from finetune.charts.figures import GREY, GRID, new_figure, picture
from finetune.charts.legend import DOT, LEFT, Entry, draw_legend
from finetune.charts.repeats import MAX_BANDS, Band, draw_repeats, merge_repeats
from finetune.charts.run_labels import Comparison, Look, value_text
from finetune.errors import UserError
from finetune.files import write_bytes_atomic
from finetune.progress import counted

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

PICTURE_TYPES = (".png", ".svg", ".pdf", ".jpg", ".webp")
MAX_RAW_POINTS, MAX_SMOOTH_POINTS = 1600, 800  # of one run: more than the picture has pixels for
MAX_RAW_POINTS_OF_ALL = 30_000  # of all runs together: overlapping faint lines show no detail
MAX_RUNS_WITH_RAW = 16  # of more runs, every logged loss and every evaluation would only be a blur
EVAL_DOTS = (0, (1, 1.2))
X_LABELS = {"step": "optimizer step", "epoch": "epoch", "tokens": "tokens seen", "time": "time"}
FIRST_SHARE = 0.1  # of a curve: its steep start
MAX_START = 4  # times the range of the rest: a curve that starts or jumps higher is cut off above


def draw_curves(
    comparison: Comparison,
    output: Path,
    *,
    x: str = "step",
    log_y: bool = False,
    smooth: int | None = None,
    repeats: bool = False,
    y_range: tuple[float, float] | None = None,
) -> None:
    """Write the picture to `output` (type by its suffix). Raises UserError for an unknown type.

    Faint line: every logged loss; strong line: its centred mean over `smooth` points (see `curves.smooth`); dotted
    line: eval loss, with a dot at its lowest. With `repeats`, runs that differ only by their seed become one mean curve
    in a band of one standard deviation. y_range: loss at the bottom and at the top; None: chosen so that a spike or a
    steep start does not squash the rest. Runs with --eval_calls get a panel with their scores.
    """
    check_picture_type(output)
    text = "".join(run.label for run in comparison.runs) + subtitle(comparison)
    with new_figure(12, 6.75, text, layout=None) as figure:
        warnings.filterwarnings("ignore", message="Data has no positive values")  # a loss of 0 on a logarithmic axis
        axes = figure.add_subplot()
        bands: list[Band] = []
        headings = headline(comparison), subtitle(comparison)
        if repeats:
            comparison, bands = merge_repeats(comparison)
        scale, unit = time_unit(comparison) if x == "time" else (1.0, "")
        drawn = _draw_lines(axes, comparison, x, scale, smooth)
        if bands:
            draw_repeats(axes, bands, x, smooth, scale)
        axes.set_xlabel(f"time ({unit})" if unit else X_LABELS[x])
        top = _set_y_range(axes, drawn, log_y, y_range)
        _mark_ends(axes, comparison, x, scale, smooth, top)
        _format_axes(axes, headings, x, log_y)
        scored = has_scores(comparison)
        draw_legend(figure, comparison, _line_styles(comparison, bands), below=HEIGHT if scored else 0)
        if scored:
            add_call_panel(figure, axes, comparison, x, scale)
        content = picture(figure, output.suffix[1:].lower())
    write_bytes_atomic(output, content)


def check_picture_type(output: Path) -> None:
    if output.suffix.lower() not in PICTURE_TYPES:
        raise UserError(f"{output}: unknown type of picture; use a name that ends in {', '.join(PICTURE_TYPES)}")


def _draw_lines(axes: Axes, comparison: Comparison, x: str, scale: float, width: int | None) -> list[np.ndarray]:
    """Draw every run; returns the curves, by which the y range is chosen. Marks each run's lowest evaluation."""
    count = len(comparison.runs)
    line = 2.2 if count <= 6 else 1.6 if count <= 16 else 1.1
    faint = min(0.14, 0.5 / count) if count <= MAX_RUNS_WITH_RAW else 0
    drawn: list[np.ndarray] = []
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        xs, ys = run.points(x, "loss")
        xs = xs / scale
        if len(ys):
            smoothed = curves.smooth(ys, width)
            if smoothed is not ys and faint:
                keep = curves.thin(ys, min(MAX_RAW_POINTS, max(200, MAX_RAW_POINTS_OF_ALL // count)))
                axes.plot(xs[keep], ys[keep], color=look.color, alpha=faint, linewidth=0.7, zorder=2)
            keep = curves.thin(smoothed, MAX_SMOOTH_POINTS)
            axes.plot(
                xs[keep], smoothed[keep], color=look.color, linestyle=line_style(look), linewidth=line, zorder=4,
                marker="o" if len(ys) == 1 else None, solid_capstyle="round",
            )  # fmt: skip
            drawn.append(smoothed)
        xs, ys = run.points(x, "eval_loss")
        if len(ys):
            if count <= MAX_RUNS_WITH_RAW:
                axes.plot(xs / scale, ys, color=look.color, linewidth=line * 0.6, linestyle=EVAL_DOTS, zorder=3)
            best = ys.argmin()
            axes.plot(
                xs[best] / scale, ys[best], "o", color=look.color, zorder=6, markeredgecolor="white",
                markersize=8 if count <= 6 else 5.5 if count <= 40 else 4, markeredgewidth=1 if count <= 40 else 0.5,
            )  # fmt: skip
            drawn.append(ys)
    if not drawn:
        raise UserError(f"no run has a loss and {X_LABELS[x]} yet; nothing to draw (see the table)")
    return drawn


def _mark_ends(axes: Axes, comparison: Comparison, x: str, scale: float, width: int | None, top: float) -> None:
    """A cross where a run broke off, or where its curve leaves the picture after that."""
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        xs, ys = run.points(x, "loss")
        if run.is_broken_off and len(ys):
            smoothed = curves.smooth(ys, width)
            end = int((smoothed > top).argmax()) if smoothed[-1] > top else len(smoothed) - 1
            axes.plot(
                xs[end] / scale, min(smoothed[-1], top), "X", color=look.color, markersize=11, markeredgecolor="white",
                zorder=6,
            )  # fmt: skip


def _set_y_range(axes: Axes, drawn: list[np.ndarray], log_y: bool, y_range: tuple[float, float] | None) -> float:
    """Choose the y range, and say so where curves leave it; returns the highest visible loss."""
    lowest, top, highest = visible_range(drawn)
    if log_y:
        axes.set_yscale("log")
        top = highest
    if y_range:
        axes.set_ylim(*y_range)
        return y_range[1]
    if log_y:
        if lowest > 0:
            axes.set_ylim(lowest * 0.95, top * 1.08)
        return top
    # From zero unless more than a quarter of the picture would be empty.
    bottom = max(0.0, lowest - 0.35 * (top - lowest)) if lowest >= 0 else lowest * 1.05
    axes.set_ylim(bottom, top + 0.06 * max(top - bottom, 1e-9))
    if highest > top:
        axes.text(
            0.995, 0.98, f"\u25b2 losses up to {highest:.3g} are above the picture (--y_range LOW,HIGH, --log_y)",
            transform=axes.transAxes, va="top", ha="right", color=GREY, fontsize=9,
        )  # fmt: skip
    return top


def visible_range(curves: list[np.ndarray]) -> tuple[float, float, float]:
    """(lowest, top, highest): the y range that must be visible, and the highest value, which may be above `top`.

    curves  smoothed losses of each run, all finite
    The level that a run holds for more than a tenth of its time is visible, and so is its start unless it would take
    most of the picture.
    """
    import numpy as np

    lowest = min(float(values.min()) for values in curves)
    highest = max(float(values.max()) for values in curves)
    bodies = [values[int(len(values) * FIRST_SHARE) :] for values in curves]
    level = max(float(np.quantile(values, 0.9)) for values in bodies)
    room = max(level - lowest, 1e-9)
    if highest <= lowest + MAX_START * room or len(max(curves, key=len)) < 4:
        return lowest, highest, highest
    return lowest, level + room, highest


def _format_axes(axes: Axes, headings: tuple[str, str], x: str, log_y: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if log_y:
        low, high = axes.get_ylim()
        # A range below a factor of five has too few of 1, 2 and 5 times a power of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high >= 5 * low else MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.015)
    axes.grid(axis="y", color=GRID, linewidth=0.9, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, pad=6)
    axes.set_ylabel("loss (log scale)" if log_y else "loss")
    if x == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    elif x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left = LEFT / axes.get_figure().get_figwidth()
    for text, down, style in (
        (headings[0], 0.13, {"fontsize": 16, "fontweight": "bold"}),
        (headings[1], 0.44, {"color": GREY}),
    ):
        axes.annotate(
            text, (left, 1), (0, -72 * down), xycoords="figure fraction", textcoords="offset points", va="top",
            annotation_clip=False, **style,
        )  # fmt: skip


def _line_styles(comparison: Comparison, bands: list[Band]) -> list[Entry]:
    """What the kinds of lines mean, as entries of the legend."""
    styles = []
    if bands:
        spread = " \u00b1 1 standard deviation" if len(bands) <= MAX_BANDS else ""
        styles.append(Entry(f"mean{spread} over the seeds", GREY))
    if any(len(run.points("step", "eval_loss")[1]) for run in comparison.runs):
        with_line = len(comparison.runs) <= MAX_RUNS_WITH_RAW
        styles.append(Entry("evaluation (dot: its lowest)", GREY, EVAL_DOTS[1]) if with_line
                      else Entry("lowest evaluation", GREY, DOT))  # fmt: skip
    return styles


def headline(comparison: Comparison) -> str:
    keys = [key for key in comparison.differing if key != "seed"]
    by = ", ".join(keys[:-1]) + " and " * (len(keys) > 1) + keys[-1] if 0 < len(keys) < 4 else ""
    return f"Training loss{' by ' * bool(by)}{by}"


def subtitle(comparison: Comparison) -> str:
    """The number of runs and the settings they share, as far as they fit into about 105 characters."""
    line = counted(len(comparison.runs), "run")
    for key in ("model", "rank", "lr", "epochs", "max_steps", "batch_size", "dataset"):
        value = comparison.common.get(key)
        if value is None or (key == "epochs" and any(run.flags.get("max_steps") for run in comparison.runs)):
            continue
        part = value_text(value) if key in ("model", "dataset") else f"{key.removesuffix('_size')} {value_text(value)}"
        if key == "batch_size" and comparison.common.get("grad_accum"):
            part += f" × {comparison.common['grad_accum']}"
        if len(line) + len(part) < 105:
            line += f"  ·  {part}"
    return line


def line_style(look: Look) -> str | tuple[float, tuple[float, ...]]:
    """The dashes of a look as matplotlib's line style."""
    return (0, look.dash) if look.dash else "solid"


def time_unit(comparison: Comparison) -> tuple[float, str]:
    """Seconds per unit and its name, so that the longest run has a readable axis."""
    longest = max((max(run.rows.logged("seconds").tolist(), default=0) for run in comparison.runs), default=0)
    return (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def short_number(value: float) -> str:
    """12345678 -> 12.3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
