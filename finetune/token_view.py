"""Tokens of one row for a person's eyes: trained ones in colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text


def mask_text(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Text:
    """The row's text; trained tokens green on black and underlined (so that they show without colour too).

    Runs of tokens are decoded together: one character may be spread over several tokens.
    """
    text = Text()
    start = 0
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or (labels[end] == -100) != (labels[start] == -100):
            piece = tokenizer.decode(list(input_ids[start:end]), skip_special_tokens=False)
            text.append(piece, style="dim" if labels[start] == -100 else "bold green underline")
            start = end
    return text
