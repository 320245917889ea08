"""Llama 3.1, 3.2 and 3.3 with JSON calls: `{"name": …, "parameters": {…}}` is the complete turn."""

from __future__ import annotations

import re
from collections.abc import Set

from formats.base import Format, Ollama, Parsed, read_template
from formats.calls import call_error, call_from_object, read_json, skip_space

CONTROL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE_KWARGS = {"date_string": "26 Jul 2024"}  # the constant of the 3.1 template; today's date is not reproducible
# A JSON object that does not start with "name" (or "type": "function", which these models add) is an answer in JSON.
_CALL_START = re.compile(r'\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"')


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """One call, or several separated by ";", which models write although the template has one call a turn."""
    content = text.strip().removeprefix("<|python_tag|>").strip()
    unparsed = Parsed(content=text.strip())
    if not _CALL_START.match(content):
        return unparsed
    parsed, at = Parsed(), 0
    while at < len(content):
        try:
            value, at = read_json(content, at)
            parsed.tool_calls.append(call_from_object(value, "parameters", "arguments"))
        except ValueError as error:
            unparsed.errors = [call_error(parsed, error)]
            return unparsed
        at = skip_space(content, at)
        if at < len(content):
            if content[at] != ";":
                unparsed.errors = [f"text after call {len(parsed.tool_calls)}"]
                return unparsed
            at = skip_space(content, at + 1)
    return parsed


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<|start_header_id|>", "<|eot_id|>"} <= added
    return "the tokenizer has Llama 3's <|start_header_id|> and <|eot_id|>" if matches else None


FORMAT = Format(
    "llama3",
    read_template(__file__),
    end_of_turn=("<|eot_id|>",),
    control_tokens=CONTROL_TOKENS,
    template_kwargs=TEMPLATE_KWARGS,
    read_calls=parse,
    detect=detect,
    detect_order=10,
    tokens=CONTROL_TOKENS,
    vllm_parser="llama3_json",
    ollama=Ollama("llama3"),
)
