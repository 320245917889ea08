"""Calls that a data set wrote into the assistant's text, taken out only when every character of them parses.

Known ways of writing: `<function=NAME>{…}</function>` (Llama 3 custom), `<tool_call>{…}</tool_call>` (Hermes, Qwen),
`<tool_call><function=NAME><parameter=KEY>…` (Qwen3.5 and Coder), `<TOOLCALL>[…]</TOOLCALL>` (When2Call),
`[TOOL_CALLS] […]` and `[TOOL_CALLS]NAME[ARGS]{…}` (Mistral), `<functioncall> {…}` (Glaive). The JSON is read by a JSON
decoder from its first brace on, never by a pattern, so braces and closing tags inside strings are no matter.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.reading.row_files import json_type, strict_json
from formats.builtin import qwen_xml
from formats.pythonic import read_literal

_OPENING = re.compile(
    r"<function=(?P<name>[^<>=\s]+)>|(?P<hermes><tool_call>)|(?P<nvidia><TOOLCALL>)"
    r"|(?P<mistral>\[TOOL_CALLS\])|(?P<glaive><functioncall>)"
)
_CLOSING = {"name": "</function>", "hermes": "</tool_call>", "nvidia": "</TOOLCALL>", "mistral": "", "glaive": ""}
_GLAIVE = re.compile(r"""\s*\{\s*"name":\s*"(?P<name>[^"]+)",\s*"arguments":\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL)
_GLAIVE_END = "<|endoftext|>"  # conversions of that set leave it behind a call
_MISTRAL = re.compile(r"(?P<name>[^\s\[\]{}]+)(\[CALL_ID\](?P<id>\w+))?\[ARGS\]")
_SPACE = re.compile(r"\s*")


def call_tag(text: str) -> str:
    """The first opening of a call in `text`, in any of the known ways of writing; empty where there is none."""
    found = _OPENING.search(text)
    return found[0] if found else ""


def split_calls(text: str, tools: list[dict] | None = None) -> tuple[str, list[dict[str, Any]]] | None:
    """Take `text` apart into the words before and the calls that end it; None unless it parses to the last character.

    `tools` give the types of values that are written without one (`<parameter=KEY>`). Returns
    (words, [{"name": str, "arguments": dict}, …]). A tag that is only talked about, broken JSON, arguments that are
    no object, or words after a call all give None: the caller keeps the text as it is.
    """
    first = _OPENING.search(text)
    if first is None:
        return None
    calls: list[dict[str, Any]] = []
    position = first.start()
    while position < len(text):
        opening = _OPENING.match(text, position)
        if opening is None:
            return None
        found = _calls_at(text, opening, tools)
        if found is None:
            return None
        calls += found[0]
        position = _SPACE.match(text, found[1]).end()
    return text[: first.start()].rstrip(), calls


def _calls_at(text: str, opening: re.Match, tools: list[dict] | None) -> tuple[list[dict], int] | None:
    """The calls between one opening tag and its closing tag, and the position behind that."""
    kind = opening.lastgroup
    start = _SPACE.match(text, opening.end()).end()
    if kind == "glaive" and (match := _GLAIVE.match(text, start)):
        value: Any = {"name": match["name"], "arguments": match["arguments"].replace("\\'", "'")}
        end = match.end()
    else:
        try:
            if kind == "hermes" and text.startswith("<function=", start):
                value, end = qwen_xml.read_call(text, start, qwen_xml.declared_properties(tools))
            elif kind == "mistral" and (match := _MISTRAL.match(text, start)):
                arguments, end = _decode(text, match.end(), "")
                value = {"name": match["name"], "arguments": arguments}
            else:
                value, end = _decode(text, start, _CLOSING[kind])
        except (ValueError, TypeError, SyntaxError, RecursionError):
            return None
    if kind == "name":
        value = {"name": opening["name"], "arguments": value}
    end = _SPACE.match(text, end).end()
    closing = _CLOSING[kind]
    if kind == "glaive" and text.startswith(_GLAIVE_END, end):
        closing = _GLAIVE_END
    if not text.startswith(closing, end):
        return None
    try:
        items = value if isinstance(value, list) else [value]
        calls = [_named_call(item) for item in items]
    except ValueError:
        return None
    return (calls, end + len(closing)) if calls else None


def _decode(text: str, start: int, closing: str) -> tuple[Any, int]:
    """The JSON value at `start`; a Python literal up to `closing` where an early Hermes set wrote single quotes."""
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
    """The arguments of a raw call, which may stand under two keys of several objects; None where there are none.

    Raises ValueError when they are no JSON object, or when two of them hold something and differ.
    """
    given = [holder[key] for holder in holders for key in ("arguments", "parameters") if holder.get(key) is not None]
    found = [read_arguments(value) for value in given]
    filled = [arguments for arguments in found if arguments]
    if any(arguments != filled[0] for arguments in filled):
        raise ValueError("it has two arguments that differ; keep one of them")
    return filled[0] if filled else ({} if found else None)


def read_arguments(value: Any) -> dict[str, Any]:
    """Arguments as an object: a dict as it is, JSON text decoded (twice if it was encoded twice), nothing as {}.

    Key order and number types stay as written. Raises ValueError when they are no JSON object.
    """
    for _ in range(3):
        if not isinstance(value, str):
            break
        if not value.strip():
            value = None
            break
        try:
            value = strict_json(value)
        except ValueError as error:
            raise ValueError(f"arguments are no JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"arguments are a JSON {json_type(value)}, not an object")
    return value
