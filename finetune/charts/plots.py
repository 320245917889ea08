"""The loss curves of many runs in one picture."""

from __future__ import annotations

import io
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.charts import curves
from finetune.charts.boxes import boxes_unremarked
from finetune.charts.curves import broke_off
from finetune.charts.run_labels import Comparison, Look, value_text
from finetune.errors import UserError
from finetune.files import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_TYPES = (".png", ".svg", ".pdf", ".jpg", ".webp")
RAW_POINTS, SMOOTH_POINTS = 1600, 800  # of one run: more than there are pixels for
ALL_RAW_POINTS = 30_000  # of all runs together: faint lines over each other show no detail anyway
LEGEND_ROWS = 34
EVAL_DOTS = (0, (1, 1.2))
INK, SOFT, GRID = "#222222", "#666666", "#E6E6E6"
# Korean names of data sets and runs need one of these; the first that is installed is used.
KOREAN_FONTS = ["Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "NanumGothic", "AppleGothic", "UnDotum"]
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
    """Write the picture to `output` (type by its ending); raises UserError for an unknown type.

    Faint: every logged loss; strong: its centred mean over `smooth` points (see `curves.smooth`); dots: eval loss.
    With `repeats`, runs that differ by their seed alone become one curve, their mean, in a band of one standard
    deviation to each side.
    """
    check_picture_type(output)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {
        "font.family": _fonts(comparison), "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": "#BBBBBB", "xtick.color": SOFT, "ytick.color": SOFT, "svg.fonttype": "none",
        "agg.path.chunksize": 10000, "axes.unicode_minus": True,
        "text.parse_math": False,  # a "$" in the name of a run or a data set is a dollar
    }  # fmt: skip
    with rc_context(settings), boxes_unremarked():
        warnings.filterwarnings("ignore", message="Data has no positive values")  # a loss of 0 on a logarithmic axis
        figure = Figure(figsize=(12, 6.75), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if repeats:
            from finetune.charts.repeats import draw_repeats, merge_repeats

            comparison, bands = merge_repeats(comparison)
        lowest, top = _draw_lines(axes, comparison, x, smooth)
        if repeats:
            draw_repeats(axes, bands, x, smooth, time_unit(comparison)[0] if x == "time" else 1.0)
        _dress(axes, comparison, x, log_y, lowest, top)
        _legend(axes, comparison)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=output.suffix[1:].lower(), dpi=150, facecolor="white")
    write_bytes_atomic(output, buffer.getvalue())


def check_picture_type(output: Path) -> None:
    if output.suffix.lower() not in PICTURE_TYPES:
        raise UserError(f"{output}: cannot draw this type of picture; end the name in {', '.join(PICTURE_TYPES)}")


def _draw_lines(axes: Axes, comparison: Comparison, x: str, width: int | None) -> tuple[float, float]:
    """Draw every run; returns the lowest and highest y that must be seen (a spike may leave the picture)."""
    import numpy as np

    count = len(comparison.runs)
    line = 2.2 if count <= 6 else 1.6 if count <= 16 else 1.1
    faint = max(0.03, min(0.28, 1.0 / count))
    seen: list[Any] = []
    tops: list[float] = []
    ends: list[tuple[Any, Any, str]] = []
    scale = time_unit(comparison)[0] if x == "time" else 1.0
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        xs, ys = run.points(x, "loss")
        xs = xs / scale
        if len(ys):
            soft = curves.smooth(ys, width)
            keep = curves.thin(ys, min(RAW_POINTS, max(200, ALL_RAW_POINTS // count)))
            if soft is not ys:
                axes.plot(xs[keep], ys[keep], color=look.color, alpha=faint, linewidth=0.8, zorder=2)
            keep = curves.thin(soft, SMOOTH_POINTS)
            axes.plot(
                xs[keep], soft[keep], color=look.color, linestyle=stroke(look), linewidth=line, zorder=4,
                marker="o" if len(ys) == 1 else None, solid_capstyle="round",
            )  # fmt: skip
            seen.append(soft)
            # A run that blows up must not press all others flat against the axis; it leaves the picture at the top.
            room = 1.15 if broke_off(run) and soft[-1] > soft[0] else 2
            tops.append(min(ys.max() if count <= 6 else soft.max(), soft[0] * room))
            if broke_off(run):
                ends.append((xs, soft, look.color))
        xs, ys = run.points(x, "eval_loss")
        if len(ys):
            keep = curves.thin(ys, 60)
            axes.plot(
                xs[keep] / scale, ys[keep], "o", color=look.color, linewidth=line * 0.75, zorder=5,
                linestyle=EVAL_DOTS if count <= 16 else "none", markeredgecolor="white",
                markersize=6.5 if count <= 6 else 4.5 if count <= 16 else 3.5,
                markeredgewidth=0.9 if count <= 16 else 0.5 if count <= 40 else 0,
            )  # fmt: skip
            seen.append(ys)
            tops.append(min(ys.max(), ys[0] * 2))
    if not seen:
        raise UserError(f"no run has a loss and {X_LABELS[x]} yet; nothing to draw (see the table)")
    lowest, top = float(np.concatenate(seen).min()), float(max(tops))
    for xs, soft, color in ends:
        left = int(np.argmax(soft > top)) if soft[-1] > top else len(soft) - 1
        axes.plot(xs[left], min(soft[-1], top), "X", color=color, markersize=11, markeredgecolor="white", zorder=6)
    return lowest, top


def _dress(axes: Axes, comparison: Comparison, x: str, log_y: bool, lowest: float, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        if lowest > 0:
            axes.set_ylim(lowest * 0.85, top * 1.15)
    else:
        # From zero unless that would waste more than a quarter of the picture.
        bottom = max(0.0, lowest - 0.35 * (top - lowest)) if lowest >= 0 else lowest * 1.05
        axes.set_ylim(bottom, top + 0.06 * max(top - bottom, 1e-9))
    axes.margins(x=0.015)
    axes.grid(axis="y", color=GRID, linewidth=0.9, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, pad=6)
    axes.set_ylabel("loss (log scale)" if log_y else "loss")
    axes.set_xlabel(f"time ({time_unit(comparison)[1]})" if x == "time" else X_LABELS[x])
    if x == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    elif x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(headline(comparison), loc="left", fontsize=16, fontweight="bold", pad=30)
    axes.annotate(
        subtitle(comparison), (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=SOFT,
        va="bottom", annotation_clip=False,
    )  # fmt: skip


def _legend(axes: Axes, comparison: Comparison) -> None:
    """One entry a group at the right, in the order of its numbers, then what the strokes mean."""
    from matplotlib.lines import Line2D

    groups: dict[str, list[int]] = {}
    for index, look in enumerate(comparison.looks):
        groups.setdefault(look.group, []).append(index)
    handles = []
    dashed = any(look.dash for look in comparison.looks)
    for group, members in groups.items():
        look = comparison.looks[members[0]]
        runs = [comparison.runs[index] for index in members]
        style = {"color": look.color, "linestyle": stroke(look), "linewidth": 1.6 if dashed else 2.6}
        handles.append(Line2D([], [], label=_entry(group, runs), **style))
    most = 2 * LEGEND_ROWS
    more = len(handles) - most
    if more > 0:
        step = len(handles) / most
        handles = [handles[int(index * step)] for index in range(most)]
        handles.append(Line2D([], [], linestyle="none", label=f"and {more} more, see the table"))
    if any(len(run.points("step", "eval_loss")[1]) for run in comparison.runs):
        handles += [
            Line2D([], [], linestyle="none", label=" "),
            Line2D([], [], color=SOFT, linewidth=2.2, label="training"),
            Line2D([], [], color=SOFT, linestyle=EVAL_DOTS, marker="o", markersize=6, markeredgecolor="white",
                   label="evaluation"),
        ]  # fmt: skip
    columns = -(-len(handles) // LEGEND_ROWS)
    few = len(handles) <= 22
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, ncols=columns, borderaxespad=0,
        fontsize=10.5 if few else 8.5 if len(handles) <= LEGEND_ROWS + 2 else 7, labelspacing=0.55 if few else 0.35,
        handlelength=3.4 if dashed else 1.9, columnspacing=1.2,
    )  # fmt: skip


def _entry(group: str, runs: list[Any]) -> str:
    """Legend text of the runs that are drawn alike: what they are, and what went wrong with them."""
    lines = [""]
    for part in group.split("  "):
        if lines[-1] and len(lines[-1]) + len(part) > 34:
            lines.append("")
        lines[-1] += f"  {part}" if lines[-1] else textwrap.shorten(part, 44, placeholder="…") or part[:44]
    text = "\n".join(lines)
    if len(runs) > 1:
        text += f"  ({len(runs)} runs)"
    states = sorted({run.status for run in runs} - {"finished", "unknown"})
    if any("loss is no number" in note for run in runs for note in run.notes):
        states.append("diverged")
    return f"{text}  ({', '.join(states)})" if states else text


def headline(comparison: Comparison) -> str:
    keys = [key for key in comparison.differing if key != "seed"]
    by = ", ".join(keys[:-1]) + " and " * (len(keys) > 1) + keys[-1] if 0 < len(keys) < 4 else ""
    return f"Training loss{' by ' * bool(by)}{by}"


def subtitle(comparison: Comparison) -> str:
    """What all runs have in common, in one line of at most 110 characters; what does not fit is left out."""
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


def stroke(look: Look) -> Any:
    """A look's dashes as matplotlib's line style."""
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


def _fonts(comparison: Comparison) -> list[str]:
    text = "".join(run.label for run in comparison.runs) + subtitle(comparison)
    if text.isascii():
        return ["DejaVu Sans"]
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in KOREAN_FONTS if name in installed][:1]]
