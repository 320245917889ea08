"""Kanana 1.5 as served (functionary v3-llama3.1): `<function=name>{…}</function>`, then `<|eom_id|>`."""

from __future__ import annotations

from formats.base import Format, Ollama, Parsed, read_template
from formats.calls import call_error, parse_function_tag, read_arguments, skip_space

CONTROL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """`<function=…>` calls; the JSON after `<|python_tag|>` is a call of the function "python"."""
    before, *pieces = text.split("<|python_tag|>")
    parsed = parse_function_tag(before, tools)
    for piece in pieces:
        try:
            arguments, end = read_arguments(piece, 0, "python")
        except ValueError as error:
            parsed.errors.append(call_error(parsed, error))
            parsed.content = f"{parsed.content}<|python_tag|>{piece}".strip()
            continue
        rest = parse_function_tag(piece[skip_space(piece, end) :], tools)
        parsed.tool_calls += [{"name": "python", "arguments": arguments}, *rest.tool_calls]
        parsed.errors += rest.errors
        parsed.content = (parsed.content + rest.content).strip()
    return parsed


FORMAT = Format(
    "kanana",
    read_template(__file__),
    end_of_turn=("<|eot_id|>", "<|eom_id|>"),
    control_tokens=CONTROL_TOKENS,
    call_markers=("<function=", "</function>", "<|python_tag|>"),
    read_calls=parse,
    tokens=CONTROL_TOKENS,
    ollama=Ollama("kanana", "<function="),
)
