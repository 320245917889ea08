"""Gemma 1 to 3: roles user and model taking turns; calls as a Python list, which vLLM's `pythonic` parser reads."""

from __future__ import annotations

from formats.base import Format, read_template
from formats.pythonic import parse

TEMPLATE = read_template("gemma")
END_OF_TURN = ("<end_of_turn>",)
CONTROL_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<tool_response>", "</tool_response>")

FORMAT = Format(
    "gemma", TEMPLATE, END_OF_TURN, CONTROL_TOKENS, (), {}, parse, vllm_parser="pythonic", tokens=CONTROL_TOKENS[:2]
)
