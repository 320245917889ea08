"""The figures of all charts: one style, fonts for any script, drawn without a window."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Data sets and runs may have Korean names; the first of these that is installed is used.
KOREAN_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "NanumGothic", "AppleGothic", "UnDotum")
TEXT, GREY, GRID = "#222222", "#666666", "#E6E6E6"
STYLE: dict[str, Any] = {
    "font.size": 10.5, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": "#BBBBBB", "xtick.color": GREY,
    "ytick.color": GREY, "svg.fonttype": "none", "agg.path.chunksize": 10000, "axes.unicode_minus": True,
    "text.parse_math": False,  # names of runs, tools and data sets may contain "$"
}  # fmt: skip


def font_family(text: str) -> list[str]:
    """matplotlib's `font.family` for a chart with this text."""
    if text.isascii():
        return ["DejaVu Sans"]
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in KOREAN_FONTS if name in installed][:1]]


@contextlib.contextmanager
def new_figure(width: float, height: float, text: str = "", layout: str | None = "constrained") -> Iterator[Figure]:
    """A figure for text in any script, to be drawn and written inside the block; sizes in inches.

    No warning for each letter that is drawn as a box: the table or report beside the picture has the same text.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"font.family": font_family(text)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def picture(figure: Figure, kind: str = "png", dpi: int = 150, **options: Any) -> bytes:
    """The content of a file of this type."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, facecolor="white", **options)
    return buffer.getvalue()
