"""Tools written into the system text: by ToolACE (with calls in brackets), Kimi, Hermes and Glaive."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from finetune.reading.bracket_calls import bracket_calls
from finetune.reading.content_parts import read_parts
from finetune.reading.row_files import RowError, as_text, json_stream
from finetune.reading.tool_schemas import normalize_tools
from formats.calls import STRICT

_LIST_START = re.compile(
    r"Here is a list of (?:the )?functions in JSON format that you can (?:invoke|use|call)[\s.:]*(?=\[)",
    re.IGNORECASE,
)
# The sentences that explain the brackets, which the format's own explanation replaces.
_EXPLANATIONS = re.compile(
    r"(?:Should you decide to return the function call\(s\)\s*[.,:]?\s*)?"
    r"(?<![^\s.])[^.\n\[]{0,500}\[\s{0,9}func\w{0,9}\([^\n\]]{0,500}\]\.?[ \t]*\n?"
    r"(?:\s*(?:NO other text MUST be included|You SHOULD NOT include any other text(?: in the response)?)"
    r"\s*\.?[ \t]*\n?)?"
)
# (what it begins with, the tools up to the first end, the rest of the block up to its last mark, or all)
_KIMI = ("<|im_system|>tool_declare<|im_middle|>", re.compile(""), "<|im_end|>", "")
_HERMES = ("You are a function calling AI model.", re.compile(r"<tools>(?=\s*[\[{])"), "</tools>", "</tool_call>")
_GLAIVE = re.compile(
    r"(?:You are an? [\w ]{0,200}assistant,? )?with access to the following functions\.\s*"
    r"Use them(?: if required)?[\s:-]*$"
)


def system_text(fields: dict[str, Any], notes: Counter) -> str:
    """The system column as text, from text, a message or parts (Anthropic, Converse, Gemini). Raises RowError."""
    value = fields.get("system")
    if isinstance(value, dict):
        value = next((value[key] for key in ("parts", "content", "text") if key in value), value)
    if not isinstance(value, (list, dict)):
        return re.sub(r"^\s*SYSTEM:\s*", "", as_text(value)) if value is not None else ""  # Glaive's label
    try:
        parts = read_parts(value, notes)
    except RowError as error:
        raise RowError(f"the system column: {error}") from error
    if parts.calls or parts.results or parts.reasoning:
        raise RowError("the system column has content parts that are not text; only text can be trained")
    return "\n\n".join(parts.texts)


def without_tools(
    system: str, messages: list[Any], tools: list[dict[str, Any]], notes: Counter
) -> tuple[str, list[Any], list[dict[str, Any]]]:
    """(system text, messages, canonical tools) with the tools that system texts declare moved into the tools.

    So are those under the key `tools` of a system message (Phi). ToolACE's bracket calls become `tool_calls`.
    Raises RowError.
    """
    result: list[Any] = []
    in_brackets = False
    for number, message in enumerate([{"role": "system", "content": system}, *messages]):
        if not isinstance(message, dict) or _role(message) not in ("system", "developer"):
            result.append(message)
            continue
        key = "content" if isinstance(message.get("content"), str) else "value"
        text = message.get(key)
        try:
            if message.get("tools") and not tools:
                notes["tools taken from the system message"] += 1
                tools = normalize_tools(message["tools"], notes)
                message = message if message.get(key) or message.get("content") else None  # nothing but tools (GLM)
            if message is not None and isinstance(text, str) and (found := tools_of_system_text(text)):
                rest, declared, writer = found
                names = {tool["function"]["name"] for tool in tools}
                tools = tools + [t for t in normalize_tools(declared, notes) if t["function"]["name"] not in names]
                notes[f"{writer} system prompt: tools taken out, its wording left to the format"] += 1
                in_brackets = in_brackets or writer == "ToolACE"
                message = {**message, key: rest} if rest or not number else None
        except RowError as error:
            raise RowError(f"message {number}: {error}" if number else f"the system column: {error}") from error
        result += [message] if message is not None else []
    system = result.pop(0)["content"]
    return system, (read_bracket_calls(result, tools) if in_brackets else result), tools


def _role(message: dict[str, Any]) -> Any:
    return message.get("role") or message.get("from")


def tools_of_system_text(text: str) -> tuple[str, list[Any], str] | None:
    """(rest of the text, tools, who writes so), or None where the text declares no tools."""
    if match := _LIST_START.search(text):
        try:
            tools, end = STRICT.raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            raise RowError(f"the list of functions in the system text is not valid JSON ({error})") from error
        rest = [_EXPLANATIONS.sub("", side).strip() for side in (text[: match.start()], text[end:].lstrip(" ."))]
        return "\n".join(filter(None, rest)), tools, "ToolACE"
    for marks, where, writer in (
        (_KIMI, "the tool_declare message", "Kimi"),
        (_HERMES, "the <tools> block", "Hermes"),
    ):
        if block := _marked_block(text, *marks):
            start, tools, end = block
            return (text[:start] + text[end:]).strip(), json_stream(tools, where), writer
    return _glaive_tools(text)


def _marked_block(text: str, begins: str, opening: re.Pattern, closing: str, last: str) -> tuple[int, str, int] | None:
    """(start, tools, end) of the first block of tools; a pattern with several `.*?` would take quadratic time."""
    start = text.find(begins)
    opened = opening.search(text, start + len(begins)) if start >= 0 else None
    closed = text.find(closing, opened.end()) if opened else -1
    if opened is None or closed < 0:
        return None
    end = text.find(last, closed + len(closing))
    return start, text[opened.end() : closed], end + len(last) if end >= 0 else len(text)


def _glaive_tools(text: str) -> tuple[str, list[Any], str] | None:
    """Functions as JSON at the end of the text; elsewhere JSON in a text is an example."""
    start = min((at for at in map(text.find, "{[") if at >= 0), default=-1)
    if start < 0 or text.rstrip()[-1] not in "}]":
        return None
    before = text[:start]
    is_glaive = _GLAIVE.search(before)
    try:
        tools = json_stream(text[start:], "the system text")
    except RowError:
        if is_glaive:
            raise
        return None
    if not tools or not (is_glaive or all(map(_looks_like_a_tool, tools))):
        return None
    return _GLAIVE.sub("", before).strip(), tools, "Glaive"


def _looks_like_a_tool(value: Any) -> bool:
    function = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and "name" in function and isinstance(function.get("parameters"), dict)


def read_bracket_calls(messages: list[Any], tools: list[dict[str, Any]]) -> list[Any]:
    """Assistant texts that are one list of bracket calls as `tool_calls`; results split by their names."""
    names = sorted((tool["function"]["name"] for tool in tools), key=len, reverse=True)
    result: list[Any] = []
    calls: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        role = _role(message) if isinstance(message, dict) else None
        key = "content" if isinstance(message, dict) and isinstance(message.get("content"), str) else "value"
        text = message.get(key) if isinstance(message, dict) else None
        if role in ("assistant", "gpt") and isinstance(text, str):
            try:
                calls = bracket_calls(text, names) or []
            except ValueError as error:
                raise RowError(f"message {number}: bracket calls that cannot be read ({error})") from error
            result.append({**message, key: "", "tool_calls": calls} if calls else message)
        elif role in ("tool", "function", "observation") and isinstance(text, str):
            result += [{**message, key: part} for part in _results(text, calls)]
        else:
            result.append(message)
    return result


def _results(text: str, calls: list[dict[str, Any]]) -> list[str]:
    """One text for each call where a JSON list holds one result for each, under the calls' names; else the text."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    names = [call["name"] for call in calls]
    if len(calls) < 2 or not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return [text]
    if [item.get("name") for item in items] != names:
        return [text]
    return [as_text(item["results"] if item.keys() == {"name", "results"} else item) for item in items]
