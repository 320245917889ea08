"""Parsing calls: what several formats share. Functions raise ValueError with a one-line reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

from formats.base import Parsed

MAX_JSON_DEPTH = 64  # nested objects and lists: checks and templates recurse into them
_TOO_DEEP = f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels"
_SPACE = " \t\r\n"


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {key!r}")
    return value


# For calls and for training rows: rejects what JSON does not have and what two parsers could read differently.
STRICT = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys)


def json_depth(value: Any) -> int:
    """How deep objects and lists are nested; not recursive, so that any depth can be measured."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return depth


def reject_lone_surrogates(value: Any) -> None:
    """Raise ValueError when a string in `value` holds a lone surrogate (\\ud83d), which UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate (half of a \\u pair) is not a character") from error


def _checked(value: Any, text: str) -> Any:
    brackets = text.count("{") + text.count("[")
    if brackets > MAX_JSON_DEPTH and isinstance(value, (dict, list)) and json_depth(value) > MAX_JSON_DEPTH:
        raise ValueError(_TOO_DEEP)
    if "\\u" in text:
        reject_lone_surrogates(value)
    return value


def skip_space(text: str, at: int) -> int:
    """The first position >= `at` that is not JSON white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def read_json(text: str, at: int, starts: str = "{[") -> tuple[Any, int]:
    """(value, end position) of the JSON object or list at `at`; of any JSON value where `starts` is empty."""
    at = skip_space(text, at)
    if at >= len(text):
        raise ValueError("the text ends where JSON should start")
    if starts and text[at] not in starts:
        raise ValueError(f"{text[at]!r} where JSON should start")
    try:
        value, end = STRICT.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            raise ValueError("the JSON is cut off") from error
        raise ValueError(f"invalid JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    return _checked(value, text[at:end]), end


def read_value(text: str) -> Any:
    """The JSON value that `text` consists of."""
    try:
        return _checked(STRICT.decode(text), text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def read_arguments(text: str, at: int, name: str) -> tuple[dict[str, Any], int]:
    """(arguments, end position) of the call of `name` whose JSON object starts at `at`."""
    if not name.strip():
        raise ValueError("the function has no name")
    value, end = read_json(text, at)
    if not isinstance(value, dict):
        raise ValueError(f"arguments of {name!r} must be a JSON object")
    return value, end


def read_named_call(text: str, at: int, separator: str) -> tuple[dict[str, Any], int]:
    """(call, end position) of a name, `separator` and a JSON object of arguments."""
    close = text.find(separator, at)
    if close < 0:
        raise ValueError("the function's name is cut off")
    name = text[at:close]
    arguments, end = read_arguments(text, close + len(separator), name)
    return {"name": name, "arguments": arguments}, end


def call_from_object(value: Any, *keys: str) -> dict[str, Any]:
    """{"name", "arguments"} of a decoded call object that has its arguments under one of `keys`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ValueError('a call must be an object with a "name"')
    for key in keys:
        if isinstance(value.get(key), dict):
            return {"name": value["name"], "arguments": value[key]}
    raise ValueError(f'call of {value["name"]!r} has no object "{keys[0]}"')


def call_error(parsed: Parsed, error: Exception) -> str:
    """The error line of the call that follows those in `parsed`."""
    return f"call {len(parsed.tool_calls) + len(parsed.errors) + 1}: {error}"


def read_tagged(text: str, opening: str, closing: str, read_body: Callable[[str, int], tuple[Any, int]]) -> Parsed:
    """Calls between `opening` and `closing` (which may be empty) anywhere in `text`.

    `read_body(text, at)` returns (call, end position) of one call after its opening tag, or raises ValueError. After
    a malformed call, parsing continues after its closing tag, or at the next opening tag if that comes first.
    """
    parsed, kept, at = Parsed(), [], 0
    last_close = text.rfind(closing)
    while (start := text.find(opening, at)) >= 0:
        kept.append(text[at:start])
        try:
            call, end = read_body(text, start + len(opening))
            if not text.startswith(closing, end):  # the closing tag may itself start with white space
                end = skip_space(text, end)
            if not text.startswith(closing, end):
                raise ValueError(f"{closing} is missing" if end >= len(text) else f"text before {closing}")
        except ValueError as error:
            parsed.errors.append(call_error(parsed, error))
            close = text.find(closing, start) if closing and start <= last_close else -1
            reopen = text.find(opening, start + len(opening))
            at = len(text) if close < 0 else close + len(closing)
            if 0 <= reopen < at:
                at = reopen
            kept.append(text[start:at])
        else:
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
    return read_tagged(text, "<function=", "</function>", lambda source, at: read_named_call(source, at, ">"))


def read_call_list(text: str, opening: str, closing: str) -> Parsed:
    """JSON lists of `{"name", "arguments"}` between `opening` and `closing`, usually one, text around them."""

    def body(source: str, at: int) -> tuple[list[dict[str, Any]], int]:
        value, end = read_json(source, at)
        if not isinstance(value, list) or not value:
            raise ValueError("the calls must be a JSON list")
        return [call_from_object(item, "arguments", "parameters") for item in value], end

    parsed = read_tagged(text, opening, closing, body)
    lists: list[Any] = parsed.tool_calls
    parsed.tool_calls = [call for calls in lists for call in calls]
    return parsed
