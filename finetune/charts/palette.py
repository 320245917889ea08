"""Colours and dashes of all charts."""

from __future__ import annotations

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# Okabe and Ito's palette without black and yellow: distinct on white and with every common colour blindness.
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE)
# Viridis with a darker yellow at its end, which would be too pale on white. Lightness rises throughout.
SEQUENCE = (
    "#440154", "#482576", "#414487", "#35608D", "#2A788E", "#21908C", "#22A884", "#43BF71", "#7AD151", "#DACF20",
)  # fmt: skip
# Lengths of dashes and gaps in line widths. Dots are reserved for evaluation curves.
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2.5, 1.3), (7, 1.5, 1.2, 1.5), (6, 1.3, 1.2, 1.3, 1.2, 1.3))


def ramp(count: int) -> list[str]:
    """`count` colours spread evenly over `SEQUENCE`, dark to light; up to four omit its palest part."""
    first, last = {1: (2.0, 2.0), 2: (2.0, 7.0), 3: (0.5, 7.7), 4: (0.0, 8.3)}.get(count, (0.0, len(SEQUENCE) - 1.0))
    colors = []
    for index in range(count):
        position = first + index / max(count - 1, 1) * (last - first)
        low = min(int(position), len(SEQUENCE) - 2)
        pair = [[int(SEQUENCE[low + side][at : at + 2], 16) for at in (1, 3, 5)] for side in (0, 1)]
        mixed = [round(a + (b - a) * (position - low)) for a, b in zip(*pair, strict=True)]
        colors.append("#" + "".join(f"{value:02X}" for value in mixed))
    return colors
