"""The panel under the loss curves: how many calls were right at each evaluation (--eval_calls)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from finetune.charts.run_labels import Comparison

HEIGHT = 2.3  # inches, with its distance to the chart above
GAP = 0.35
SCORES = {"eval_parameter_accuracy": "solid", "eval_tool_name_accuracy": (0, (1, 1.2))}


def has_scores(comparison: Comparison) -> bool:
    """Whether any run has scored calls."""
    return any(len(run.points("step", name)[1]) for run in comparison.runs for name in SCORES)


def add_call_panel(figure: Figure, above: Axes, comparison: Comparison, x: str, scale: float) -> None:
    """Draw the panel into the HEIGHT inches under `above`, whose x axis it shares and labels."""
    box, height = above.get_position(), figure.get_figheight()
    panel = figure.add_axes((box.x0, box.y0 - HEIGHT / height, box.width, (HEIGHT - GAP) / height), sharex=above)
    for run, look in zip(comparison.runs, comparison.looks, strict=True):
        for name, style in SCORES.items():
            xs, ys = run.points(x, name)
            panel.plot(xs / scale, ys, color=look.color, linestyle=style, linewidth=1.5, marker="o", markersize=3)
    panel.set_ylim(-0.03, 1.03)
    panel.set_yticks([0, 0.5, 1])
    panel.set_ylabel("right calls")
    panel.set_xlabel(above.get_xlabel())
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.9, zorder=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(which="both", length=0, pad=6)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    panel.text(
        0.995, 0.04, "solid: tools and arguments right, dotted: tools right", transform=panel.transAxes, ha="right",
        color="#666666", fontsize=9,
    )  # fmt: skip
