"""Score against rank, with the spectra of the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.charts.figures import GRID, new_figure, picture
from finetune.charts.palette import BLUE, GREEN, PURPLE, VERMILLION
from finetune.files import write_bytes_atomic

if TYPE_CHECKING:
    import numpy as np

SCORE_COLORS = (VERMILLION, GREEN, PURPLE)
MAX_DRAWN_LAYERS = 400


def draw_ranks(
    output: Path,
    *,
    losses: dict[int, float],
    scores: dict[str, dict[int, float]],
    spectra: Sequence[np.ndarray],
    chosen: int,
    title: str,
) -> None:
    """Write the picture: loss at the left axis, scores and the energy kept of each layer at the right one.

    losses, scores  by rank; spectra: singular values of each layer; chosen: the rank with the vertical line
    """
    import numpy as np

    with new_figure(9, 5.4, title) as figure:
        axes = figure.add_subplot()
        shares = axes.twinx()
        axes.set_zorder(shares.get_zorder() + 1)  # the loss is drawn over what is behind it
        axes.patch.set_visible(False)
        drawn = [values for values in spectra if (values**2).sum() > 0]
        step = -(-len(drawn) // MAX_DRAWN_LAYERS) or 1
        for number, values in enumerate(drawn[::step]):
            kept = np.cumsum(values**2) / (values**2).sum()
            label = "energy kept, one line per layer" if number == 0 else None
            shares.plot(np.arange(1, len(kept) + 1), kept, color="#BBBBBB", alpha=0.35, linewidth=0.7, label=label)
        for color, (name, values) in zip(SCORE_COLORS, scores.items(), strict=False):
            shares.plot(list(values), list(values.values()), "s-", color=color, linewidth=1.6, markersize=5,
                        label=name.replace("_", " "))  # fmt: skip
        axes.plot(list(losses), list(losses.values()), "o-", color=BLUE, linewidth=2.2, markersize=7,
                  markeredgecolor="white", label="evaluation loss")  # fmt: skip
        axes.axvline(chosen, color=BLUE, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(losses), [str(rank) for rank in losses])
        axes.minorticks_off()
        axes.set_xlim(min(losses) * 0.85, max(losses) * 1.18)
        axes.set_xlabel(f"rank of the truncated adapter; at the right the adapter itself ({max(losses)})")
        axes.set_ylabel("evaluation loss (nats per token)", color=BLUE)
        shares.set_ylabel("share: scores, energy kept")
        shares.set_ylim(0, 1.03)
        shares.grid(axis="y", color=GRID, linewidth=0.9)
        for one in (axes, shares):
            one.spines[["top", "right", "left"]].set_visible(False)
            one.tick_params(which="both", length=0, pad=6)
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=14)
        handles = [one.get_legend_handles_labels() for one in (axes, shares)]
        axes.legend(
            [*handles[0][0], *handles[1][0]], [*handles[0][1], *handles[1][1]], loc="upper center",
            bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False, fontsize=9.5,
        )  # fmt: skip
        content = picture(figure)
    write_bytes_atomic(output, content)
