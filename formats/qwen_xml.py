"""Qwen3.5, 3.6 and 3.8: calls as XML, `<function=name>` with one `<parameter=key>` each, values without types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from formats.base import Format, Parsed, read_template
from formats.calls import read_tagged, read_value, skip_space
from formats.probing import USER, own_text, thinks

TEMPLATE = read_template("qwen_xml")
END_OF_TURN = ("<|im_end|>",)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>")
CALL_MARKERS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")
TEMPLATE_KWARGS = {
    "python_words": False,
    "thinks_by_default": True,
    "keeps_thinking": False,
    "effort": "",
    "reads_tags": True,
    "enable_thinking": False,  # the empty block belongs to the prompt; turns with reasoning switch it on
}


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """Values get the type their tool's schema declares; without a schema, a text that is exactly how JSON writes a
    number, a boolean, null, an object or a list is that value, and everything else is a string."""
    types = declared_properties(tools)
    return read_tagged(text, "<tool_call>", "</tool_call>", lambda source, at: read_call(source, at, types))


def declared_properties(tools: list[dict] | None) -> dict[str, dict[str, Any]]:
    """{tool's name: {parameter: its schema}} of what the tools declare; a schema of another shape declares nothing."""
    types = {}
    for tool in tools or []:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        types[function.get("name")] = properties if isinstance(properties, dict) else {}
    return types


def read_call(source: str, at: int, types: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """({"name", "arguments"}, position behind it) of the `<function=…>` block at `at`. Raises ValueError."""
    name, at = _tag(source, skip_space(source, at), "<function=")
    if not name.strip():
        raise ValueError("the function has no name")
    arguments: dict[str, Any] = {}
    at = skip_space(source, at)
    while not source.startswith("</function>", at):
        key, at = _tag(source, at, "<parameter=")
        end = source.find("</parameter>", at)
        if end < 0:
            raise ValueError(f"parameter {key!r} is cut off")
        if key in arguments:
            raise ValueError(f"the parameter {key!r} stands twice")
        raw = source[at:end].removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(raw, types.get(name, {}).get(key))
        at = skip_space(source, end + len("</parameter>"))
    return {"name": name, "arguments": arguments}, at + len("</function>")


def _tag(text: str, at: int, opening: str) -> tuple[str, int]:
    close = text.find(">", at)
    if not text.startswith(opening, at) or close < 0:
        raise ValueError(f"{opening}…> expected at character {at}")
    return text[at + len(opening) : close], close + 1


_KINDS = {dict: "object", list: "array", bool: "boolean", type(None): "null", str: "string"}


def _declared_types(schema: Any) -> set[str]:
    """The JSON types that a parameter's schema allows, empty when it does not say."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    found = {name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        found = found.union(*map(_declared_types, options)) if isinstance(options, list) else found
    if not found and isinstance(schema.get("enum"), list):
        found = {_KINDS.get(type(value), "number") for value in schema["enum"]}
    return found


def _typed(raw: str, schema: Any) -> Any:
    declared = _declared_types(schema)
    if declared and declared <= {"string"}:
        return raw
    word = {"True": "true", "False": "false", "None": "null"}.get(raw, raw) if declared else raw
    try:
        value = read_value(word)
    except ValueError:
        return raw
    kind = _KINDS.get(type(value), "number")
    if kind == "string":
        return raw  # strings are written without quotes, so these quotes are the string's own
    if declared and not (kind in declared or (kind == "number" and "integer" in declared)):
        return raw
    return value if declared or json.dumps(value, ensure_ascii=False) == raw else raw


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """As the own template does: its words for true and null, its default for thinking, its handling of the past."""
    call = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": {"a": True}}}
    said = {"role": "assistant", "content": "aq0zk"}
    written = own_text(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]) or ""
    if "<parameter=a>\n" not in written:
        return fmt
    past = own_text(tokenizer, [USER, said, USER], enable_thinking=False) or ""
    tagged = (
        own_text(tokenizer, [USER, {"role": "assistant", "content": "<think>\nrq0zk\n</think>\n\naq0zk"}, USER]) or ""
    )
    prompt = own_text(tokenizer, [USER], add_generation_prompt=True) or ""
    before = prompt.partition(USER["content"])[0]
    effort = before.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
    kwargs = {
        "python_words": "\nTrue\n" in written,
        "thinks_by_default": prompt.endswith("<think>\n"),
        "keeps_thinking": "</think>\n\naq0zk" in past,
        "effort": effort,
        "reads_tags": "rq0zk" not in tagged,
    }
    adapted = fmt.with_kwargs(**kwargs)
    return adapted if thinks(tokenizer) else replace(adapted, thinking=None)


FORMAT = Format(
    "qwen-xml",
    TEMPLATE,
    END_OF_TURN,
    CONTROL_TOKENS,
    CALL_MARKERS,
    TEMPLATE_KWARGS,
    parse,
    adapt,
    thinking="enable_thinking",
    vllm_parser="qwen3_coder",
    reasoning=True,
    untyped=True,
    tokens=("<|im_start|>", "<|im_end|>"),
)
