"""Gemma 1 to 3: roles user and model taking turns; calls as a Python list."""

from __future__ import annotations

from collections.abc import Set

from formats.base import Format, read_template
from formats.pythonic import OLLAMA, parse


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<start_of_turn>", "<end_of_turn>"} <= added
    return "the tokenizer has Gemma's <start_of_turn>" if matches else None


FORMAT = Format(
    "gemma",
    read_template(__file__),
    end_of_turn=("<end_of_turn>",),
    control_tokens=("<start_of_turn>", "<end_of_turn>", "<tool_response>", "</tool_response>"),
    read_calls=parse,
    detect=detect,
    detect_order=60,
    tokens=("<start_of_turn>", "<end_of_turn>"),
    ollama=OLLAMA,
)
