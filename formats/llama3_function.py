"""Llama 3 with `<function=name>{…}</function>` calls, several in a row, every turn ended by `<|eot_id|>`."""

from __future__ import annotations

from formats.base import Format, read_template
from formats.calls import parse_function_tag

TEMPLATE = read_template("llama3_function")
END_OF_TURN = ("<|eot_id|>",)
CONTROL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CALL_MARKERS = ("<function=", "</function>")
parse = parse_function_tag

FORMAT = Format(
    "llama3-function", TEMPLATE, END_OF_TURN, CONTROL_TOKENS, CALL_MARKERS, {}, parse, tokens=CONTROL_TOKENS
)
