"""Llama 3.1, 3.2 and 3.3 with JSON calls: `{"name": …, "parameters": {…}}` is the whole turn."""

from __future__ import annotations

import re

from formats.base import Format, Parsed, read_template
from formats.calls import call_from_object, read_json, skip_space

TEMPLATE = read_template("llama3")
END_OF_TURN = ("<|eot_id|>",)
CONTROL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE_KWARGS = {"date_string": "26 Jul 2024"}  # the constant of the 3.1 template; a live date cannot be reproduced


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """One call, or several separated by ";" (which models write although the template has no place for them)."""
    content = text.strip().removeprefix("<|python_tag|>").strip()
    if not _starts_like_a_call(content):
        return Parsed(content=text.strip())
    parsed, at = Parsed(), 0
    while at < len(content):
        try:
            value, at = read_json(content, at)
            parsed.tool_calls.append(call_from_object(value, "parameters", "arguments"))
        except ValueError as error:
            parsed.errors.append(f"call {len(parsed.tool_calls) + 1}: {error}")
            return Parsed(content=text.strip(), errors=parsed.errors)
        at = skip_space(content, at)
        if at < len(content):
            if content[at] != ";":
                return Parsed(content=text.strip(), errors=[f"text behind call {len(parsed.tool_calls)}"])
            at = skip_space(content, at + 1)
    return parsed


def _starts_like_a_call(text: str) -> bool:
    """A JSON object whose first key is "name", perhaps behind "type": "function" as these models like to write it.
    Other objects are answers in JSON."""
    return re.match(r'\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"', text) is not None


FORMAT = Format(
    "llama3",
    TEMPLATE,
    END_OF_TURN,
    CONTROL_TOKENS,
    (),
    TEMPLATE_KWARGS,
    parse,
    vllm_parser="llama3_json",
    tokens=CONTROL_TOKENS,
)
