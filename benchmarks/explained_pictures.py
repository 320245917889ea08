"""docs/images/masks.svg and prefixes.svg: a row of the sample tools with its trained tokens, and the passes of a step.

    python benchmarks/explained_pictures.py

Drawn from what the encoder and the planner return, with the bundled model's tokenizer. No model is loaded.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer  # noqa: E402

from finetune.encoding.encode import encode_conversations  # noqa: E402
from finetune.models.bundled import smollm2_dir  # noqa: E402
from finetune.passes.plan import make_row, plan_passes  # noqa: E402
from finetune.preparing.mask_view import decoded_spans  # noqa: E402
from formats import get_format  # noqa: E402

TRAINED, SHARED, MASKED, TEXT = "#b7e4c7", "#a8c7fa", "#e8eaed", "#202124"
CHARACTER, LINE, COLUMNS = 7.25, 19, 84  # pixels, and characters in a line


def svg(width: float, height: float, shapes: list[str], font: str) -> str:
    """A complete picture; the background makes it readable on a dark page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="{font}" '
        f'font-size="12" fill="{TEXT}">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" rx="2"/>'


def label(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve" {more}>{escape(text)}</text>'


def mask_picture(ids, labels, tokenizer) -> str:
    """One row as text: trained tokens on green, everything else on grey."""
    shapes = [
        box(10, 8, 14, 14, TRAINED), label(30, 19, "trained: the answer and its end of turn"),
        box(330, 8, 14, 14, MASKED), label(350, 19, "context, label -100"),
    ]  # fmt: skip
    column, line = 0, 2
    for span in decoded_spans(ids, labels, tokenizer):
        for index, part in enumerate(span.text.split("\n")):
            if index:
                column, line = 0, line + 1
            while part:
                piece, part = part[: COLUMNS - column], part[COLUMNS - column :]
                x, y = 10 + column * CHARACTER, line * LINE
                shapes.append(box(x, y - 14, len(piece) * CHARACTER, LINE - 1, TRAINED if span.trained else MASKED))
                size = f'textLength="{len(piece) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
                shapes.append(label(x, y, piece, size))
                column += len(piece)
                if column == COLUMNS:
                    column, line = 0, line + 1
    return svg(20 + COLUMNS * CHARACTER, (line + 1) * LINE, shapes, "DejaVu Sans Mono, Menlo, Consolas, monospace")


def prefix_picture(rows) -> str:
    """Bars to scale: the tokens of the rows of a step, and those that are computed when their prefix is shared."""
    (planned,) = plan_passes(rows, tokens_per_pass=10**6)
    computed, total = len(planned.input_ids), sum(len(row.input_ids) for row in rows)
    ids = [list(row.input_ids) for row in rows]
    shared = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    scale = 560 / max(map(len, ids))
    shapes, y = [], 30
    for title, offset in ((f"each row computed alone: {total:,} tokens", 0), (f"shared: {computed:,} tokens", shared)):
        shapes.append(label(10, y, title, 'font-weight="bold"'))
        y += 12
        if offset:
            shapes.append(box(10, y, shared * scale, 26 * len(ids) - 6, SHARED))
            shapes.append(label(20, y + 13 * len(ids), f"system prompt and tool schemas, once: {shared} tokens"))
        for number, row in enumerate(ids, 1):
            if not offset:
                shapes.append(box(10, y, shared * scale, 20, SHARED))
            shapes.append(box(10 + shared * scale, y, (len(row) - shared) * scale, 20, TRAINED))
            shapes.append(label(16 + shared * scale, y + 14, f"row {number}: {len(row) - shared} own"))
            y += 26
        y += 26
    return svg(600, y - 20, shapes, "DejaVu Sans, Helvetica, Arial, sans-serif")


def main() -> int:
    tools = json.loads((ROOT / "data" / "samples" / "house_tools.json").read_text(encoding="utf-8"))
    requests = [
        ("Dim the hall to 3", "set_lamp", {"room": "hall", "level": 3}),
        ("The front door, please", "lock_door", {"door": "front"}),
        ("Wake me in 20 minutes", "set_timer", {"minutes": 20}),
        ("Full light in the attic", "set_lamp", {"room": "attic", "level": 10}),
    ]
    conversations = []
    for request, name, arguments in requests:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        conversations.append({"messages": messages, "tools": tools})
    conversations[0]["messages"] += [
        {"role": "tool", "name": "set_lamp", "content": '{"ok": true}'},
        {"role": "assistant", "content": "The hall is dimmed."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    encoded = encode_conversations(conversations, tokenizer, get_format("chatml"), num_proc=1, progress=False)
    rows = [make_row(*sequence) for sequence in encoded.sequences]
    pictures = {"masks": mask_picture(*encoded.sequences[0], tokenizer), "prefixes": prefix_picture(rows)}
    for name, picture in pictures.items():
        target = ROOT / "docs" / "images" / f"{name}.svg"
        target.write_text(picture, encoding="utf-8")
        print(target.relative_to(ROOT), f"{target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
