"""Kanana 1.5 as served (functionary v3-llama3.1): `<function=name>{…}</function>`, then `<|eom_id|>`."""

from __future__ import annotations

from formats.base import Format, Parsed, read_template
from formats.calls import parse_function_tag, read_arguments, skip_space

TEMPLATE = read_template("kanana")
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>")
CONTROL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
CALL_MARKERS = ("<function=", "</function>", "<|python_tag|>")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """`<function=…>` calls; what stands behind `<|python_tag|>` is a call of the function "python"."""
    before, *pieces = text.split("<|python_tag|>")
    parsed = parse_function_tag(before, tools)
    for piece in pieces:
        try:
            value, end = read_arguments(piece, 0, "python")
        except ValueError as error:
            parsed.errors.append(f"call {len(parsed.tool_calls) + len(parsed.errors) + 1}: {error}")
            parsed.content = f"{parsed.content}<|python_tag|>{piece}".strip()
            continue
        parsed.tool_calls.append({"name": "python", "arguments": value})
        behind = parse_function_tag(piece[skip_space(piece, end) :], tools)
        parsed.tool_calls += behind.tool_calls
        parsed.errors += behind.errors
        parsed.content = (parsed.content + behind.content).strip()
    return parsed


FORMAT = Format("kanana", TEMPLATE, END_OF_TURN, CONTROL_TOKENS, CALL_MARKERS, {}, parse, tokens=CONTROL_TOKENS)
