"""Phi-4-mini: `<|tool_call|>[{"name": …, "arguments": {…}}]<|/tool_call|>`, all calls in one list."""

from __future__ import annotations

from collections.abc import Set

from formats.base import Format, Ollama, Parsed, read_template
from formats.calls import read_call_list

CONTROL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|end|>")
CALL_MARKERS = ("<|tool_call|>", "<|/tool_call|>")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    return read_call_list(text, *CALL_MARKERS)


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<|tool_call|>", "<|end|>"} <= added
    return "the tokenizer has Phi-4-mini's <|tool_call|> and <|end|>" if matches else None


FORMAT = Format(
    "phi4-mini",
    read_template(__file__),
    end_of_turn=("<|end|>",),
    control_tokens=CONTROL_TOKENS,
    call_markers=CALL_MARKERS,
    read_calls=parse,
    detect=detect,
    detect_order=70,
    tokens=CONTROL_TOKENS + CALL_MARKERS,
    ollama=Ollama("phi4-mini", "<|tool_call|>"),
)
