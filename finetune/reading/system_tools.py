"""Tools written into the system text: ToolACE's list with calls in brackets, Kimi's declarations, Hermes' block."""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.reading.row_files import RowError, strict_json
from finetune.reading.text_shapes import as_text, hermes_system, json_stream
from formats.calls import STRICT
from formats.pythonic import read_literal

_LIST_START = re.compile(
    r"Here is a list of (?:the )?functions in JSON format that you can (?:invoke|use|call)\s*[.:]?\s*(?=\[)",
    re.IGNORECASE,
)
# The sentences that explain the brackets, which the format's own explanation replaces.
_EXPLANATIONS = re.compile(
    r"(?:Should you decide to return the function call\(s\)\s*[.,:]?\s*)?"
    r"(?<![^\s.])[^.\n\[]*\[\s*func\w*\([^\n\]]*\]\.?[ \t]*\n?"
    r"(?:\s*(?:NO other text MUST be included|You SHOULD NOT include any other text(?: in the response)?)"
    r"\s*\.?[ \t]*\n?)?"
)
_KIMI = re.compile(r"<\|im_system\|>tool_declare<\|im_middle\|>(?P<tools>.*?)<\|im_end\|>\s*", re.DOTALL)


def bracket_tools(text: str) -> tuple[str, list[Any]] | None:
    """(rest of the text, tools) of a system text that lists functions for bracket calls; None for any other."""
    match = _LIST_START.search(text)
    if match is None:
        return None
    try:
        tools, end = STRICT.raw_decode(text, match.end())
    except (ValueError, RecursionError) as error:
        raise RowError(f"the list of functions in the system text is not valid JSON ({error})") from error
    rest = text[: match.start()], text[end:].lstrip(" .")
    return "\n".join(part for part in (_EXPLANATIONS.sub("", side).strip() for side in rest) if part), tools


def kimi_tools(text: str) -> tuple[str, list[Any]] | None:
    """(rest of the text, tools) of Kimi's `tool_declare` system message; None for any other text."""
    match = _KIMI.search(text)
    if match is None:
        return None
    return (text[: match.start()] + text[match.end() :]).strip(), json_stream(
        match["tools"], "the tool_declare message"
    )


def tools_of_system_text(text: str, *, with_hermes: bool) -> tuple[str, list[Any], bool] | None:
    """(rest of the text, tools, whether calls are in brackets), or None where the text declares no tools."""
    if found := bracket_tools(text):
        return *found, True
    if found := kimi_tools(text) or (hermes_system(text) if with_hermes else None):
        return *found, False
    return None


def merged_tools(column: Any, in_text: list[Any]) -> Any:
    """The tools of the column, then those that only the system text declares."""
    if column is None or column == "" or column == []:
        return in_text
    column = strict_json(column) if isinstance(column, str) else column
    column = column if isinstance(column, list) else [column]
    named = {_name(tool) for tool in column}
    return [*column, *(tool for tool in in_text if _name(tool) not in named)]


def _name(tool: Any) -> Any:
    try:
        tool = strict_json(tool) if isinstance(tool, str) else tool
    except ValueError:
        return None
    inner = tool.get("function") if isinstance(tool, dict) else None
    name = (inner if isinstance(inner, dict) else tool).get("name") if isinstance(tool, dict) else None
    return name if isinstance(name, str) else None


def read_bracket_calls(messages: list[Any], tools: list[Any]) -> list[Any]:
    """Assistant texts that are one list of bracket calls as `tool_calls`; results split by their names."""
    names = sorted(filter(None, map(_name, tools)), key=len, reverse=True)
    result: list[Any] = []
    calls: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
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
    if len(calls) < 2 or not isinstance(items, list) or [_name(item) for item in items] != names:
        return [text]
    return [as_text(item["results"] if item.keys() == {"name", "results"} else item) for item in items]


def bracket_calls(text: str, names: list[str]) -> list[dict[str, Any]] | None:
    """The calls of `[Name With Spaces(k="v"), f.g(x=[1])]`; None unless the text begins like one, with a known name.

    Values are Python literals or JSON's `true`, `false` and `null`. Raises ValueError for a call that breaks off.
    """
    text = text.strip()
    position = _after_space(text, 1)
    if not text.startswith("[") or _name_at(text, position, names) is None:
        return None
    calls = []
    while True:
        name = _name_at(text, position, names)
        if name is None:
            raise ValueError(f"no declared function at {text[position : position + 30]!r}")
        position = text.index("(", position + len(name)) + 1
        arguments, position = _arguments(text, position)
        calls.append({"name": name, "arguments": arguments})
        position = _after_space(text, position)
        if text[position:] == "]":
            return calls
        if text[position : position + 1] != ",":
            raise ValueError(f"neither ',' nor the closing ']' at {text[position : position + 30]!r}")
        position = _after_space(text, position + 1)


def _name_at(text: str, position: int, names: list[str]) -> str | None:
    """The longest known name at a position that is followed by an opening parenthesis."""
    for name in names:
        if text.startswith(name, position) and text[position + len(name) :].lstrip()[:1] == "(":
            return name
    return None


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _arguments(text: str, position: int) -> tuple[dict[str, Any], int]:
    """The named arguments up to the closing parenthesis, and the position behind it."""
    arguments: dict[str, Any] = {}
    position = _after_space(text, position)
    while text[position : position + 1] != ")":
        equals = text.find("=", position)
        name = text[position:equals].strip() if equals >= 0 else ""
        if not name or any(letter in name for letter in "()[]{},'\""):
            raise ValueError(f"an argument without a name at {text[position : position + 30]!r}")
        if name in arguments:
            raise ValueError(f"the argument {name} twice")
        end = _value_end(text, equals + 1)
        arguments[name] = read_literal(text[equals + 1 : end])
        position = _after_space(text, end + 1) if text[end] == "," else end
    return arguments, position + 1


def _value_end(text: str, position: int) -> int:
    """Where a value ends: the `,` or `)` outside of quotes and brackets."""
    depth, quote = 0, ""
    while position < len(text):
        letter = text[position]
        if quote:
            if letter == "\\":
                position += 1
            elif letter == quote:
                quote = ""
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}" and depth:
            depth -= 1
        elif letter in ",)" and not depth:
            return position
        position += 1
    raise ValueError("it breaks off")
