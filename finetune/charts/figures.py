"""The figures of all charts: one style, fonts for any script, drawn without a window."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.charts.fonts import font_family, missing_glyphs_ignored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, GREY, GRID = "#222222", "#666666", "#E6E6E6"
STYLE: dict[str, Any] = {
    "font.size": 10.5, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": "#BBBBBB", "xtick.color": GREY,
    "ytick.color": GREY, "svg.fonttype": "none", "agg.path.chunksize": 10000, "axes.unicode_minus": True,
    "text.parse_math": False,  # names of runs, tools and data sets may contain "$"
}  # fmt: skip


@contextlib.contextmanager
def new_figure(width: float, height: float, text: str = "", layout: str | None = "constrained") -> Iterator[Figure]:
    """A figure for text in any script, to be drawn and written inside the block; sizes in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"font.family": font_family(text)}), missing_glyphs_ignored():
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def picture(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """The content of a file of this type."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, facecolor="white")
    return buffer.getvalue()
