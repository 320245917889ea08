"""Text of others on a terminal: without control characters, which could clear it, retitle it or fake its lines."""

from __future__ import annotations

import contextlib

KEPT = "\n\t"
CONTROL = {code: "\ufffd" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in KEPT}
# Reorder or hide what is around them.
BIDIRECTIONAL = dict.fromkeys((8234, 8235, 8236, 8237, 8238, 8294, 8295, 8296, 8297), "�")
_TABLE = CONTROL | BIDIRECTIONAL


def printable(text: str) -> str:
    """Text with every control character replaced by U+FFFD, except line breaks and tabs."""
    return text.translate(_TABLE)


def protect_rich() -> None:
    """Let rich's texts, such as table cells and titles, do the same; the styles that rich writes itself stay."""
    with contextlib.suppress(ImportError):  # train_lora.py --doctor, before anything is installed
        from rich import control

        # rich 15 strips these from every Text; it has five of them.
        control._CONTROL_STRIP_TRANSLATE.update(_TABLE)
