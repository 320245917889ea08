"""Phi-4-mini: `<|tool_call|>[{"name": …, "arguments": {…}}]<|/tool_call|>`, all calls in one list."""

from __future__ import annotations

from formats.base import Format, Parsed, read_template
from formats.calls import read_call_list

TEMPLATE = read_template("phi4_mini")
END_OF_TURN = ("<|end|>",)
CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|end|>")
CALL_MARKERS = ("<|tool_call|>", "<|/tool_call|>")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    return read_call_list(text, *CALL_MARKERS)


FORMAT = Format(
    "phi4-mini", TEMPLATE, END_OF_TURN, CONTROL_TOKENS, CALL_MARKERS, {}, parse, tokens=CONTROL_TOKENS + CALL_MARKERS
)
