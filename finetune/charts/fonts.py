"""Fonts of the charts, and text for which no font is installed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

# Data sets and runs may have Korean names; the first of these that is installed is used.
KOREAN_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "NanumGothic", "AppleGothic", "UnDotum")


def font_family(text: str) -> list[str]:
    """matplotlib's `font.family` for a chart with this text."""
    if text.isascii():
        return ["DejaVu Sans"]
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in KOREAN_FONTS if name in installed][:1]]


@contextlib.contextmanager
def missing_glyphs_ignored() -> Iterator[None]:
    """No warning for each letter that is drawn as a box: the table or report beside the picture has the same text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
