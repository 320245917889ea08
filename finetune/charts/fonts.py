"""Fonts of the charts, and text for which no font is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Data sets and runs may have Korean names; the first of these that is installed is used.
KOREAN_FONTS = {
    "Noto Sans CJK KR": "NotoSansCJK-Regular.ttc", "Noto Sans KR": "NotoSansKR-Regular.otf",
    "Malgun Gothic": "malgun.ttf", "NanumGothic": "NanumGothic.ttf", "AppleGothic": "AppleGothic.ttf",
    "UnDotum": "UnDotum.ttf",
}  # fmt: skip


def font_family(text: str) -> list[str]:
    """matplotlib's `font.family` for a chart with this text."""
    if text.isascii():
        return ["DejaVu Sans"]
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in KOREAN_FONTS if name in installed][:1]]


def drawing_font(text: str, size: int) -> FreeTypeFont:
    """Pillow's font for a picture with this text: matplotlib's, without importing it, where that has the letters."""
    from PIL import ImageFont

    for name in () if text.isascii() else KOREAN_FONTS.values():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    (folder,) = importlib.util.find_spec("matplotlib").submodule_search_locations  # type: ignore[union-attr, misc]
    return ImageFont.truetype(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf"), size)


@contextlib.contextmanager
def missing_glyphs_ignored() -> Iterator[None]:
    """No warning for each letter that is drawn as a box: the table or report beside the picture has the same text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
