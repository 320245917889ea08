"""Qwen3.5, 3.6 and 3.8: calls as XML, `<function=name>` with one `<parameter=key>` each, values without types."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import replace
from typing import Any

from formats.base import Format, Ollama, Parsed, read_template
from formats.calls import read_tagged, read_value, skip_space
from formats.probing import USER, call_message, default_system, own_text, thinks
from formats.schema_types import KINDS, declared_properties, declared_types


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """Values get the type that their tool's schema declares.

    Without a schema, a text that is exactly what JSON writes for a number, a boolean, null, an object or a list is that
    value; everything else is a string.
    """
    types = declared_properties(tools)
    return read_tagged(text, "<tool_call>", "</tool_call>", lambda source, at: read_call(source, at, types))


def read_call(source: str, at: int, types: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """(call, end position) of the `<function=…>` block at `at`. Raises ValueError."""
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
            raise ValueError(f"duplicate parameter {key!r}")
        raw = source[at:end].removeprefix("\n").removesuffix("\n")
        arguments[key] = typed_value(raw, types.get(name, {}).get(key))
        at = skip_space(source, end + len("</parameter>"))
    return {"name": name, "arguments": arguments}, at + len("</function>")


def _tag(text: str, at: int, opening: str) -> tuple[str, int]:
    close = text.find(">", at)
    if not text.startswith(opening, at) or close < 0:
        raise ValueError(f"{opening}…> expected at character {at}")
    return text[at + len(opening) : close], close + 1


def typed_value(raw: str, schema: Any) -> Any:
    """A value that is written without its type, as `schema` (a parameter's JSON Schema) declares it."""
    declared = declared_types(schema)
    if declared and declared <= {"string"}:
        return raw
    word = {"True": "true", "False": "false", "None": "null"}.get(raw, raw) if declared else raw
    try:
        value = read_value(word)
    except ValueError:
        return raw
    kind = KINDS.get(type(value), "number")
    if kind == "string":
        return raw  # strings are written without quotes, so these quotes belong to the text
    if declared and not (kind in declared or (kind == "number" and "integer" in declared)):
        return raw
    return value if declared or json.dumps(value, ensure_ascii=False) == raw else raw


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """As the own template does: its words for true and null, its default for thinking, how it renders past turns."""

    def text(*messages: dict, **kwargs: Any) -> str:
        return own_text(tokenizer, list(messages), **kwargs) or ""

    call = text(USER, call_message({"a": True}))
    if "<parameter=a>\n" not in call:
        return fmt
    past = text(USER, {"role": "assistant", "content": "aq0zk"}, USER, enable_thinking=False)
    tagged = text(USER, {"role": "assistant", "content": "<think>\nrq0zk\n</think>\n\naq0zk"}, USER)
    prompt = text(USER, add_generation_prompt=True)
    adapted = fmt.with_kwargs(
        python_words="\nTrue\n" in call,
        thinks_by_default=prompt.endswith("<think>\n"),
        keeps_thinking="</think>\n\naq0zk" in past,
        effort=default_system(tokenizer, add_generation_prompt=True),
        reads_tags="rq0zk" not in tagged,
    )
    return adapted if thinks(tokenizer) else replace(adapted, thinking=None)


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<|im_start|>", "<|im_end|>"} <= added and "<parameter=" in template
    return "the tokenizer has <|im_start|>, and its template writes calls as XML" if matches else None


FORMAT = Format(
    "qwen-xml",
    read_template(__file__),
    end_of_turn=("<|im_end|>",),
    control_tokens=("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>"),
    call_markers=("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
    template_kwargs={
        "python_words": False,
        "thinks_by_default": True,
        "keeps_thinking": False,
        "effort": "",
        "reads_tags": True,
        "enable_thinking": False,  # the empty block belongs to the prompt; turns with reasoning switch it on
    },
    read_calls=parse,
    adapt=adapt,
    detect=detect,
    detect_order=20,
    thinking="enable_thinking",
    reasoning=True,
    untyped=True,
    tokens=("<|im_start|>", "<|im_end|>"),
    vllm_parser="qwen3_coder",
    ollama=Ollama("qwen-xml", parser="qwen3-coder"),
)
