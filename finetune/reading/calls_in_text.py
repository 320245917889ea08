"""Calls that a data set wrote into the assistant's text, extracted only when the text parses to its last character.

Known notations: `<function=NAME>{…}</function>` (Llama 3 custom), `<tool_call>{…}</tool_call>` (Hermes, Qwen),
`<function=NAME><parameter=KEY>…` with or without `<tool_call>` (Qwen3.5 and Coder, SWE-smith),
`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>…` (GLM-4.5), `<TOOLCALL>[…]</TOOLCALL>` (When2Call),
`[TOOL_CALLS] […]` and `[TOOL_CALLS]NAME[ARGS]{…}` (Mistral), `<functioncall> {…}` (Glaive). A JSON decoder reads the
arguments, so braces and closing tags inside strings are safe.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.reading.row_files import RowError, decode_json, json_type, strict_json
from formats import schema_types
from formats.builtin import qwen_xml
from formats.pythonic import read_literal

_OPENING = re.compile(
    r"<function=(?P<name>[^<>=\s]+)>|(?P<hermes><tool_call>)|(?P<nvidia><TOOLCALL>)"
    r"|(?P<mistral>\[TOOL_CALLS\])|(?P<glaive><functioncall>)"
)
_CLOSING = {"name": "</function>", "hermes": "</tool_call>", "nvidia": "</TOOLCALL>", "mistral": "", "glaive": ""}
_GLAIVE = re.compile(r"""\s*\{\s*"name":\s*"(?P<name>[^"]+)",\s*"arguments":\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL)
_GLAIVE_END = "<|endoftext|>"  # some conversions of Glaive's set keep it after a call
_MISTRAL = re.compile(r"(?P<name>[^\s\[\]{}]+)(\[CALL_ID\](?P<id>\w+))?\[ARGS\]")
_GLM = re.compile(r"(?P<name>[^\s<>{}\[\]\"']+)\s*(?=<arg_key>|</tool_call>)")
_GLM_ARGUMENT = re.compile(
    r"\s*<arg_key>(?>(?P<key>.*?)</arg_key>)\s*<arg_value>(?P<value>.*?)</arg_value>\s*", re.DOTALL
)
_SPACE = re.compile(r"\s*")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # of a raw call: OpenAI, Llama, LangChain, Anthropic


def call_tag(text: str) -> str:
    """The first opening tag of a call in `text`, in any of the known notations; "" if there is none."""
    found = _OPENING.search(text)
    return found[0] if found else ""


def split_calls(text: str, tools: list[dict] | None = None) -> tuple[str, list[dict[str, Any]]] | None:
    """(text before the calls, [{"name": str, "arguments": dict}, …]), or None unless calls end the text.

    None also for a tag that is only mentioned, broken JSON or arguments that are not an object. `tools` give the types
    of values that are written without one (`<parameter=KEY>`).
    """
    first = _OPENING.search(text)
    if first is None:
        return None
    calls: list[dict[str, Any]] = []
    position = first.start()
    while position < len(text):
        opening = _OPENING.match(text, position)
        found = opening and _calls_at(text, opening, tools)
        if not found:
            return None
        calls += found[0]
        position = _SPACE.match(text, found[1]).end()
    return text[: first.start()].rstrip(), calls


def _calls_at(text: str, opening: re.Match, tools: list[dict] | None) -> tuple[list[dict], int] | None:
    """The calls between one opening tag and its closing tag, and the position after that."""
    kind = opening.lastgroup
    closing = _CLOSING[kind]
    start = _SPACE.match(text, opening.end()).end()
    try:
        if kind == "glaive" and (match := _GLAIVE.match(text, start)):
            value: Any = {"name": match["name"], "arguments": match["arguments"].replace("\\'", "'")}
            end = match.end()
        elif kind == "hermes" and text.startswith("<function=", start):
            value, end = qwen_xml.read_call(text, start, schema_types.declared_properties(tools))
        elif kind == "hermes" and (match := _GLM.match(text, start)):
            value, end = _glm_call(text, match, schema_types.declared_properties(tools))
        elif kind == "name" and text.startswith(("<parameter=", "</function>"), start):
            value, end = qwen_xml.read_call(text, opening.start(), schema_types.declared_properties(tools))
            kind = closing = ""
        elif kind == "mistral" and (match := _MISTRAL.match(text, start)):
            arguments, end = _decode(text, match.end(), "")
            value = {"name": match["name"], "arguments": arguments}
        else:
            value, end = _decode(text, start, closing)
        if kind == "name":
            value = {"name": opening["name"], "arguments": value}
        calls = [_named_call(item) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None
    end = _SPACE.match(text, end).end()
    if kind == "glaive" and text.startswith(_GLAIVE_END, end):
        closing = _GLAIVE_END
    return (calls, end + len(closing)) if calls and text.startswith(closing, end) else None


def _glm_call(text: str, name: re.Match, types: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """The call `name` with its `<arg_key>` and `<arg_value>` pairs, and the position behind them."""
    arguments: dict[str, Any] = {}
    position = name.end()
    while match := _GLM_ARGUMENT.match(text, position):
        if match["key"] in arguments:
            raise ValueError(f"duplicate argument {match['key']!r}")
        schema = types.get(name["name"], {}).get(match["key"])
        arguments[match["key"]] = qwen_xml.typed_value(match["value"], schema)
        position = match.end()
    return {"name": name["name"], "arguments": arguments}, position


def _decode(text: str, start: int, closing: str) -> tuple[Any, int]:
    """The JSON value at `start`, or the Python literal that ends at `closing`, as an early Hermes set wrote them."""
    try:
        end = json.JSONDecoder().raw_decode(text, start)[1]
        return strict_json(text[start:end]), end
    except ValueError:
        end = text.find(closing, start) if closing else -1
        if end < 0 or not text.startswith("{'", start):
            raise
        return read_literal(text[start:end]), end


def _named_call(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise ValueError("a call needs a name")
    unknown = set(item) - {"name", "arguments", "parameters", "id", "type"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    return {"name": item["name"], "arguments": given_arguments(item) or {}}


def given_arguments(*holders: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a raw call, under either key of any of its objects; None if there are none.

    Raises RowError when they are not a JSON object, or when two of them are not empty and differ.
    """
    given = [holder[key] for holder in holders for key in ARGUMENT_KEYS if holder.get(key) is not None]
    found = [read_arguments(value) for value in given]
    filled = [arguments for arguments in found if arguments]
    if any(arguments != filled[0] for arguments in filled):
        raise RowError("it has two arguments that differ; keep one of them")
    return filled[0] if filled else ({} if found else None)


def read_arguments(value: Any) -> dict[str, Any]:
    """Arguments as an object: a dict unchanged, JSON text decoded (repeatedly if need be), nothing as {}.

    Key order and number types are preserved. Raises RowError when they are not a JSON object.
    """
    value = decode_json(value, "arguments", times=3)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(f"arguments are a JSON {json_type(value)}, not an object")
    return value
