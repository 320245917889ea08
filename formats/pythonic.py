"""Calls as a Python list: `[f(a='x'), g(b={"c": 1})]`, read by Python's own parser and never run."""

from __future__ import annotations

import ast
import re
import warnings
from math import inf
from typing import Any

from formats.base import Parsed
from formats.calls import DEEPEST, levels, refuse_halves

_LOOKS_LIKE_CALLS = re.compile(r"\[\s*[^\W\d][\w.]*\s*\(")
_TOO_LARGE = 10**4300  # more digits than Python writes; reachable as 0xfff…
_JSON_NAMES = {"true": True, "false": False, "null": None}


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """The whole turn must be one list of calls with named arguments; otherwise it is text."""
    content = text.strip().removeprefix("<|python_tag|>").strip()
    if not _LOOKS_LIKE_CALLS.match(content):
        return Parsed(content=text.strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's opinion of escapes like \\d inside a model's strings
            tree = ast.parse(content, mode="eval").body
        if not isinstance(tree, ast.List):
            raise ValueError("text behind the list of calls")
        return Parsed(tool_calls=[_call(node) for node in tree.elts])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        return Parsed(content=text.strip(), errors=[f"call 1: {reason}"])


def _call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call in the list")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("arguments must be named")
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if len(arguments) < len(node.keywords):
        raise ValueError("an argument stands twice")
    if levels(arguments) > DEEPEST:
        raise ValueError(f"the arguments are nested deeper than {DEEPEST} levels")
    refuse_halves(arguments)
    return {"name": _name(node.func), "arguments": arguments}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("a call needs a name")


def read_literal(text: str) -> Any:
    """The value that the whole of `text` is in Python's spelling, of JSON's types only. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python value: {error}") from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        number = node.value
        if number == inf or (isinstance(number, int) and abs(number) >= _TOO_LARGE):
            raise ValueError("a number is too large")
        return number
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict) and all(
        isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys
    ):
        value = {key.value: _value(item) for key, item in zip(node.keys, node.values, strict=True)}
        if len(value) < len(node.keys):
            raise ValueError("a key stands twice in one object")
        return value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number
    raise ValueError("an argument must be a value, not an expression")
