"""Reading calls out of text: the parts that several formats share."""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any

from formats.base import Parsed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


# For calls and for training rows: what two readers would read in two ways, or JSON has no word for, is an error.
STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
_SPACE = " \t\r\n"
DEEPEST = 64  # levels of objects and lists: checks and templates walk them on Python's limited stack


def levels(value: Any) -> int:
    """How deep objects and lists are nested."""
    number, level = 0, [value]
    while level:
        number += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return number


def _usable(value: Any, text: str) -> Any:
    if text.count("{") + text.count("[") > DEEPEST and isinstance(value, (dict, list)) and levels(value) > DEEPEST:
        raise ValueError(f"the JSON is nested deeper than {DEEPEST} levels")
    if "\\u" in text:
        refuse_halves(value)
    return value


def refuse_halves(value: Any) -> None:
    """ValueError when a string in `value` holds half a surrogate pair (\\ud83d alone): no file or page can show it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair, which is no character") from error


def skip_space(text: str, at: int) -> int:
    """The first position from `at` on that is no JSON whitespace."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def read_json(text: str, at: int) -> tuple[Any, int]:
    """(value, position behind it) of the JSON object or list at `at`. Raises ValueError with a one-line reason."""
    at = skip_space(text, at)
    if at >= len(text):
        raise ValueError("the text ends where JSON should start")
    if text[at] not in "{[":
        raise ValueError(f"{text[at]!r} where JSON should start")
    try:
        value, end = STRICT.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            raise ValueError("the JSON is cut off") from error
        raise ValueError(f"wrong JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(f"the JSON is nested deeper than {DEEPEST} levels") from error
    return _usable(value, text[at:end]), end


def read_value(text: str) -> Any:
    """The JSON value that the whole of `text` is. Raises ValueError."""
    try:
        return _usable(STRICT.decode(text), text)
    except RecursionError as error:
        raise ValueError(f"the JSON is nested deeper than {DEEPEST} levels") from error


def read_arguments(text: str, at: int, name: str) -> tuple[dict[str, Any], int]:
    """(arguments, position behind them) of the call of `name` whose JSON object stands at `at`."""
    if not name.strip():
        raise ValueError("the function has no name")
    value, end = read_json(text, at)
    if not isinstance(value, dict):
        raise ValueError(f"arguments of {name!r} must be a JSON object")
    return value, end


def call_from_object(value: Any, *keys: str) -> dict[str, Any]:
    """{"name", "arguments"} of a decoded call object whose arguments stand under one of `keys`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ValueError('a call must be an object with a "name"')
    for key in keys:
        if isinstance(value.get(key), dict):
            return {"name": value["name"], "arguments": value[key]}
    raise ValueError(f'call of {value["name"]!r} has no object "{keys[0]}"')


def read_tagged(text: str, opening: str, closing: str, read_body) -> Parsed:
    """Calls between `opening` and `closing` (which may be empty) anywhere in `text`.

    `read_body(text, at)` reads one call behind an opening tag and returns (call, position behind it), or raises
    ValueError; the closing tag must follow. Searching goes on behind a broken call's closing tag, or its opening
    tag when it has none.
    """
    parsed, kept, at = Parsed(), [], 0
    last_close = text.rfind(closing)
    while (start := text.find(opening, at)) >= 0:
        kept.append(text[at:start])
        try:
            call, end = read_body(text, start + len(opening))
            if not text.startswith(closing, end):  # which may itself begin with white space
                end = skip_space(text, end)
            if not text.startswith(closing, end):
                raise ValueError(f"{closing} is missing" if end >= len(text) else f"text before {closing}")
        except ValueError as error:
            parsed.errors.append(f"call {len(parsed.tool_calls) + len(parsed.errors) + 1}: {error}")
            close = text.find(closing, start) if closing and start <= last_close else -1
            reopen = text.find(opening, start + len(opening))
            end = len(text) if close < 0 else close + len(closing)
            if 0 <= reopen < end:
                end = reopen
            kept.append(text[start:end])
            at = end
            continue
        parsed.tool_calls.append(call)
        at = end + len(closing)
    kept.append(text[at:])
    parsed.content = "".join(kept).strip()
    return parsed


def parse_hermes(text: str, tools: list[dict] | None = None) -> Parsed:
    """`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, any number of them, text around them."""

    def body(source: str, at: int) -> tuple[dict[str, Any], int]:
        value, end = read_json(source, at)
        return call_from_object(value, "arguments"), end

    return read_tagged(text, "<tool_call>", "</tool_call>", body)


def parse_function_tag(text: str, tools: list[dict] | None = None) -> Parsed:
    """`<function=NAME>{…}</function>`, any number of them, text around them."""

    def body(source: str, at: int) -> tuple[dict[str, Any], int]:
        close = source.find(">", at)
        if close < 0:
            raise ValueError("the function's name is cut off")
        name = source[at:close]
        arguments, end = read_arguments(source, close + 1, name)
        return {"name": name, "arguments": arguments}, end

    return read_tagged(text, "<function=", "</function>", body)


def read_call_list(text: str, opening: str, closing: str) -> Parsed:
    """JSON lists of `{"name", "arguments"}` between `opening` and `closing`, usually one, text around them."""

    def body(source: str, at: int) -> tuple[list[dict[str, Any]], int]:
        value, end = read_json(source, at)
        if not isinstance(value, list) or not value:
            raise ValueError("the calls must be a JSON list")
        return [call_from_object(item, "arguments", "parameters") for item in value], end

    parsed = read_tagged(text, opening, closing, body)
    parsed.tool_calls = [call for calls in parsed.tool_calls for call in calls]
    return parsed
