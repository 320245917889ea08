"""The legend above the chart: in columns, and grouped by what differs where there are many runs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

from finetune.charts.curves import LoggedRun
from finetune.charts.figures import GREY
from finetune.charts.run_labels import Comparison, Look, comparable, describe, sort_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

MAX_SINGLE = 12  # groups of runs with an entry each; more are explained by one entry for each colour and each dash
MAX_VALUES = 8  # entries that show an ordered scale
MAX_ROWS = 5
CHART_SHARE = 0.67  # of the picture, at least; the picture grows higher with its legend
LEFT, RIGHT, TOP, BOTTOM = 0.82, 0.2, 0.76, 0.56  # inches around the axes, without the legend
DOT = (0.0, 1.0)  # a line of nothing: the dot alone


class Entry(NamedTuple):
    label: str
    color: str
    dash: tuple[float, ...] = ()


def entries(comparison: Comparison) -> list[Entry]:
    """One entry for each group of runs; of more than MAX_SINGLE, one for each colour and for each kind of dash."""
    groups: dict[Look, list[LoggedRun]] = {}
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        groups.setdefault(look, []).append(run)
    single = [Entry(_label(look.group, runs), look.color, look.dash) for look, runs in groups.items()]
    if len(single) <= MAX_SINGLE:
        return single
    grouped = _by_color(comparison)
    return grouped or _thinned(single, MAX_ROWS * 3)


def _by_color(comparison: Comparison) -> list[Entry]:
    """Entries for the flag that the colours show, and for the others, which the dashes show; [] where there is none."""
    keys = [key for key in comparison.differing if key != "seed"]
    for key in keys:
        pairs = {(comparable(key, run.flags.get(key)), look.color)
                 for run, look in zip(comparison.runs, comparison.looks, strict=True)}  # fmt: skip
        if not len(pairs) == len({value for value, _ in pairs}) == len({color for _, color in pairs}):
            continue
        values = {look.color: run.flags.get(key) for run, look in zip(comparison.runs, comparison.looks, strict=True)}
        ordered = sorted(values, key=lambda color: sort_key(values[color]))
        shown = [Entry(describe({key: values[color]}, [key]), color) for color in ordered]
        others = [one for one in keys if one != key]
        dashes = {look.dash: describe(run.flags, others)
                  for run, look in zip(comparison.runs, comparison.looks, strict=True)}  # fmt: skip
        if len(dashes) > 1 and len(set(dashes.values()) - {""}) == len(dashes):
            return [*_thinned(shown, MAX_VALUES), *(Entry(text, GREY, dash) for dash, text in dashes.items())]
        return _thinned(shown, MAX_VALUES)
    return []


def _thinned(all_entries: list[Entry], most: int) -> list[Entry]:
    """At most `most` entries, evenly chosen with both ends, and how many are omitted."""
    if (omitted := len(all_entries) - most) <= 0:
        return all_entries
    chosen = [all_entries[round(index * (len(all_entries) - 1) / (most - 1))] for index in range(most)]
    return [*chosen, Entry(f"and {omitted} more, see the table", "none")]


def _label(group: str, runs: list[LoggedRun]) -> str:
    """A group's name, the number of its runs, and what went wrong with them."""
    text = textwrap.shorten(group, 60, placeholder="…") if " " in group else group[:59] + "…" * (len(group) > 59)
    if len(runs) > 1:
        text += f"  ({len(runs)} runs)"
    states = sorted({run.status for run in runs} - {"finished", "unknown"})
    if any("loss is not finite" in note for run in runs for note in run.notes):
        states.append("diverged")
    return f"{text}  ({', '.join(states)})" if states else text


def draw_legend(figure: Figure, comparison: Comparison, line_styles: list[Entry], below: float = 0) -> None:
    """Draw the legend, make the picture as high as it needs, and place the axes below it.

    line_styles  what solid, dotted and filled mean, after the entries of the runs
    below        inches to keep free under the axes
    """
    from matplotlib.lines import Line2D

    shown = entries(comparison)
    handles = [Line2D([], [], label=one.label, color=one.color, linestyle=(0, one.dash) if one.dash else "solid",
                      linewidth=2.2) for one in shown]  # fmt: skip
    for label, color, kind in line_styles:
        marker = {"marker": "o", "markeredgecolor": "white", "markersize": 7} if kind else {}
        style = "none" if kind == DOT else (0, kind) if kind else "solid"
        handles.append(Line2D([], [], label=label, color=color, linestyle=style, linewidth=1.8, **marker))
    width = figure.get_figwidth()
    (axes,) = figure.axes
    left = max(LEFT, _tick_width(figure) + 0.42)
    dashed = any(one.dash for one in shown)

    def make(columns: int) -> Legend:
        return figure.legend(
            handles=handles, ncols=columns, loc="upper left", frameon=False, borderaxespad=0, borderpad=0, fontsize=9.5,
            labelspacing=0.4, handlelength=3.2 if dashed else 2.0, columnspacing=1.6,
        )  # fmt: skip

    for columns in range(len(handles), 0, -1):  # as many columns as fit beside each other
        legend = make(columns)
        box = legend.get_window_extent(figure.canvas.get_renderer())
        if box.width / figure.dpi <= width - left - RIGHT or columns == 1:
            break
        legend.remove()
    high = box.height / figure.dpi + 0.12
    # Without the margins at its sides, the chart is `CHART_SHARE` of the picture.
    share = CHART_SHARE / ((width - left - RIGHT) / width)
    height = max(figure.get_figheight(), (TOP + BOTTOM + high) / (1 - share)) + below
    bottom = BOTTOM + below
    figure.set_figheight(height)
    axes.set_position((
        left / width, bottom / height, (width - left - RIGHT) / width, (height - TOP - bottom - high) / height,
    ))  # fmt: skip
    legend.set_bbox_to_anchor((left / width, (height - TOP) / height), transform=figure.transFigure)


def _tick_width(figure: Figure) -> float:
    """Width of the widest number at the y axis, in inches."""
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels() if label.get_text()]
    return max((box.width for box in boxes), default=0) / figure.dpi
