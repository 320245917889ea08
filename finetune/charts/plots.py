"""The loss curves of many runs in one picture."""

from __future__ import annotations

import io
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.charts import curves
from finetune.charts.curves import LoggedRun
from finetune.charts.fonts import font_family, missing_glyphs_ignored
from finetune.charts.run_labels import Comparison, Look, value_text
from finetune.errors import UserError
from finetune.files import write_bytes_atomic

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

PICTURE_TYPES = (".png", ".svg", ".pdf", ".jpg", ".webp")
MAX_RAW_POINTS, MAX_SMOOTH_POINTS = 1600, 800  # of one run: more than the picture has pixels for
MAX_RAW_POINTS_OF_ALL = 30_000  # of all runs together: overlapping faint lines show no detail
MAX_EVAL_POINTS = 60  # of one run
LEGEND_ROWS = 34
MAX_LEGEND_ENTRIES = 2 * LEGEND_ROWS
EVAL_DOTS = (0, (1, 1.2))
TEXT, GREY, GRID = "#222222", "#666666", "#E6E6E6"
X_LABELS = {"step": "optimizer step", "epoch": "epoch", "tokens": "tokens seen", "time": "time"}


def draw_curves(
    comparison: Comparison,
    output: Path,
    *,
    x: str = "step",
    log_y: bool = False,
    smooth: int | None = None,
    repeats: bool = False,
) -> None:
    """Write the picture to `output` (type by its suffix). Raises UserError for an unknown type.

    Faint line: every logged loss; strong line: its centred mean over `smooth` points (see `curves.smooth`); dots: eval
    loss. With `repeats`, runs that differ only by their seed become one mean curve in a band of one standard deviation.
    """
    check_picture_type(output)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = "".join(run.label for run in comparison.runs) + subtitle(comparison)
    settings = {
        "font.family": font_family(text), "font.size": 10.5, "text.color": TEXT, "axes.labelcolor": TEXT,
        "axes.edgecolor": "#BBBBBB", "xtick.color": GREY, "ytick.color": GREY, "svg.fonttype": "none",
        "agg.path.chunksize": 10000, "axes.unicode_minus": True,
        "text.parse_math": False,  # names of runs and data sets may contain "$"
    }  # fmt: skip
    with rc_context(settings), missing_glyphs_ignored():
        warnings.filterwarnings("ignore", message="Data has no positive values")  # a loss of 0 on a logarithmic axis
        figure = Figure(figsize=(12, 6.75), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if repeats:
            from finetune.charts.repeats import draw_repeats, merge_repeats

            comparison, bands = merge_repeats(comparison)
        scale, unit = time_unit(comparison) if x == "time" else (1.0, "")
        lowest, top = _draw_lines(axes, comparison, x, scale, smooth)
        if repeats:
            draw_repeats(axes, bands, x, smooth, scale)
        axes.set_xlabel(f"time ({unit})" if unit else X_LABELS[x])
        _format_axes(axes, comparison, x, log_y, lowest, top)
        _draw_legend(axes, comparison)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=output.suffix[1:].lower(), dpi=150, facecolor="white")
    write_bytes_atomic(output, buffer.getvalue())


def check_picture_type(output: Path) -> None:
    if output.suffix.lower() not in PICTURE_TYPES:
        raise UserError(f"{output}: unknown type of picture; use a name that ends in {', '.join(PICTURE_TYPES)}")


def _draw_lines(axes: Axes, comparison: Comparison, x: str, scale: float, width: int | None) -> tuple[float, float]:
    """Draw every run; returns the lowest and highest y that must be visible (spikes may be cut off)."""
    import numpy as np

    count = len(comparison.runs)
    line = 2.2 if count <= 6 else 1.6 if count <= 16 else 1.1
    faint = max(0.03, min(0.28, 1.0 / count))
    drawn: list[np.ndarray] = []
    tops: list[float] = []
    crosses: list[tuple[np.ndarray, np.ndarray, str]] = []
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        xs, ys = run.points(x, "loss")
        xs = xs / scale
        if len(ys):
            smoothed = curves.smooth(ys, width)
            keep = curves.thin(ys, min(MAX_RAW_POINTS, max(200, MAX_RAW_POINTS_OF_ALL // count)))
            if smoothed is not ys:
                axes.plot(xs[keep], ys[keep], color=look.color, alpha=faint, linewidth=0.8, zorder=2)
            keep = curves.thin(smoothed, MAX_SMOOTH_POINTS)
            axes.plot(
                xs[keep], smoothed[keep], color=look.color, linestyle=line_style(look), linewidth=line, zorder=4,
                marker="o" if len(ys) == 1 else None, solid_capstyle="round",
            )  # fmt: skip
            drawn.append(smoothed)
            # A diverged run must not compress all the others: its curve is cut off at the top.
            room = 1.15 if run.is_broken_off and smoothed[-1] > smoothed[0] else 2
            tops.append(min(ys.max() if count <= 6 else smoothed.max(), smoothed[0] * room))
            if run.is_broken_off:
                crosses.append((xs, smoothed, look.color))
        xs, ys = run.points(x, "eval_loss")
        if len(ys):
            keep = curves.thin(ys, MAX_EVAL_POINTS)
            axes.plot(
                xs[keep] / scale, ys[keep], "o", color=look.color, linewidth=line * 0.75, zorder=5,
                linestyle=EVAL_DOTS if count <= 16 else "none", markeredgecolor="white",
                markersize=6.5 if count <= 6 else 4.5 if count <= 16 else 3.5,
                markeredgewidth=0.9 if count <= 16 else 0.5 if count <= 40 else 0,
            )  # fmt: skip
            drawn.append(ys)
            tops.append(min(ys.max(), ys[0] * 2))
    if not drawn:
        raise UserError(f"no run has a loss and {X_LABELS[x]} yet; nothing to draw (see the table)")
    lowest, top = float(np.concatenate(drawn).min()), float(max(tops))
    for xs, smoothed, color in crosses:
        end = int(np.argmax(smoothed > top)) if smoothed[-1] > top else len(smoothed) - 1
        axes.plot(xs[end], min(smoothed[-1], top), "X", color=color, markersize=11, markeredgecolor="white", zorder=6)
    return lowest, top


def _format_axes(axes: Axes, comparison: Comparison, x: str, log_y: bool, lowest: float, top: float) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        if lowest > 0:
            axes.set_ylim(lowest * 0.85, top * 1.15)
    else:
        # From zero unless more than a quarter of the picture would be empty.
        bottom = max(0.0, lowest - 0.35 * (top - lowest)) if lowest >= 0 else lowest * 1.05
        axes.set_ylim(bottom, top + 0.06 * max(top - bottom, 1e-9))
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
    axes.set_title(headline(comparison), loc="left", fontsize=16, fontweight="bold", pad=30)
    axes.annotate(
        subtitle(comparison), (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=GREY,
        va="bottom", annotation_clip=False,
    )  # fmt: skip


def _draw_legend(axes: Axes, comparison: Comparison) -> None:
    """One entry per group at the right, in drawing order, then the meaning of the line styles."""
    from matplotlib.lines import Line2D

    groups: dict[Look, list[LoggedRun]] = {}
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        groups.setdefault(look, []).append(run)
    dashed = any(look.dash for look in groups)
    handles = [
        Line2D([], [], label=_entry(look.group, runs), color=look.color, linestyle=line_style(look),
               linewidth=1.6 if dashed else 2.6) for look, runs in groups.items()
    ]  # fmt: skip
    if (omitted := len(handles) - MAX_LEGEND_ENTRIES) > 0:  # evenly, so that the whole range of colours is shown
        handles = [handles[index * len(handles) // MAX_LEGEND_ENTRIES] for index in range(MAX_LEGEND_ENTRIES)]
        handles.append(Line2D([], [], linestyle="none", label=f"and {omitted} more, see the table"))
    if any(len(run.points("step", "eval_loss")[1]) for run in comparison.runs):
        handles += [
            Line2D([], [], linestyle="none", label=" "),
            Line2D([], [], color=GREY, linewidth=2.2, label="training"),
            Line2D([], [], color=GREY, linestyle=EVAL_DOTS, marker="o", markersize=6, markeredgecolor="white",
                   label="evaluation"),
        ]  # fmt: skip
    columns = -(-len(handles) // LEGEND_ROWS)
    few = len(handles) <= 22
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, ncols=columns, borderaxespad=0,
        fontsize=10.5 if few else 8.5 if len(handles) <= LEGEND_ROWS + 2 else 7, labelspacing=0.55 if few else 0.35,
        handlelength=3.4 if dashed else 1.9, columnspacing=1.2,
    )  # fmt: skip


def _entry(group: str, runs: list[LoggedRun]) -> str:
    """Legend text of a group: its name, the number of runs, and what went wrong with them."""
    lines = textwrap.wrap(group, 40, break_long_words=False, break_on_hyphens=False)
    text = "\n".join(line if len(line) <= 44 else f"{line[:43]}…" for line in lines)
    if len(runs) > 1:
        text += f"  ({len(runs)} runs)"
    states = sorted({run.status for run in runs} - {"finished", "unknown"})
    if any("loss is not finite" in note for run in runs for note in run.notes):
        states.append("diverged")
    return f"{text}  ({', '.join(states)})" if states else text


def headline(comparison: Comparison) -> str:
    keys = [key for key in comparison.differing if key != "seed"]
    by = ", ".join(keys[:-1]) + " and " * (len(keys) > 1) + keys[-1] if 0 < len(keys) < 4 else ""
    return f"Training loss{' by ' * bool(by)}{by}"


def subtitle(comparison: Comparison) -> str:
    """The number of runs and the settings they share, as far as they fit into about 105 characters."""
    count = len(comparison.runs)
    line = f"{count} run{'s' * (count > 1)}"
    for key in ("model", "rank", "lr", "epochs", "batch_size", "dataset"):
        value = comparison.common.get(key)
        if value is None:
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
    longest = max((run.rows["seconds"].max() for run in comparison.runs if len(run.rows)), default=0)
    return (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def short_number(value: float) -> str:
    """12345678 -> 12.3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
