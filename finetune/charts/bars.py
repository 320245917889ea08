"""A picture of stacked bars without matplotlib, which takes longer to import than a data set to prepare."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from finetune.charts.fonts import drawing_font

WIDTH, ROW, MARGIN, SIZE = 1000, 26, 14, 15  # pixels


def short_label(name: str, most: int = 60) -> str:
    """A name as it is drawn: only printable characters, the end of a long one cut off."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def stacked_bars(
    title: str, bars: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str], full: float | None = None
) -> bytes:
    """PNG: a row for each bar (label, part -> number), its total behind it; a legend of the parts.

    full  the number that fills the width; None: the largest total
    """
    from PIL import Image, ImageDraw

    font = drawing_font("".join(label for label, _ in bars), SIZE)
    totals = [sum(counts.values()) for _, counts in bars]
    left = 2 * MARGIN + max(int(font.getlength(label)) for label, _ in bars)
    scale = (WIDTH - left - 6 * MARGIN) / (full or max(1, *totals))
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + ROW * (len(bars) + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, "black", font)
    x = left
    for name in (name for name in colours if any(name in counts for _, counts in bars)):
        draw.rectangle((x, MARGIN + ROW + 4, x + SIZE, MARGIN + ROW + 4 + SIZE), colours[name])
        draw.text((x + SIZE + 6, MARGIN + ROW), name, "black", font)
        x += SIZE + 6 + int(font.getlength(name)) + 2 * MARGIN
    for number, ((label, counts), total) in enumerate(zip(bars, totals, strict=True), start=2):
        y, x = MARGIN + ROW * number, float(left)
        draw.text((left - MARGIN - font.getlength(label), y), label, "black", font)
        for name, colour in colours.items():
            if width := counts.get(name, 0) * scale:
                draw.rectangle((x, y, x + width, y + ROW - 6), colour)
                x += width
        draw.text((x + 6, y), f"{total:,.{0 if full is None else 2}f}", "black", font)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
