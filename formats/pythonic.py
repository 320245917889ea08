"""Calls as a Python list: `[f(a='x'), g(b={"c": 1})]`, parsed by `ast` and never executed."""

from __future__ import annotations

import ast
import re
import warnings
from math import inf
from typing import Any

from formats.base import Ollama, Parsed
from formats.calls import MAX_JSON_DEPTH, json_depth, reject_lone_surrogates

OLLAMA = Ollama(refused="Ollama reads calls only where they are JSON, and this format writes them as a Python list")
_CALL_START = re.compile(r"\[\s*[^\W\d][\w.]*\s*\(")
_INT_LIMIT = 10**4300  # Python refuses to print integers with more digits; 0xfff… can exceed it
_JSON_NAMES = {"true": True, "false": False, "null": None}


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """The complete turn must be one list of calls with named arguments; otherwise it is text."""
    content = text.strip().removeprefix("<|python_tag|>").strip()
    if not _CALL_START.match(content):
        return Parsed(content=text.strip())
    try:
        tree = _parse_expression(content)
        if not isinstance(tree, ast.List):
            raise ValueError("text after the list of calls")
        return Parsed(tool_calls=[_call(node) for node in tree.elts])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        return Parsed(content=text.strip(), errors=[f"call 1: {reason}"])


def read_literal(text: str) -> Any:
    """The value of a Python literal with JSON's types only. Raises ValueError."""
    try:
        return _value(_parse_expression(text.strip()))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a Python value: {error}") from error


def _parse_expression(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes like \d inside a model's strings
        return ast.parse(text, mode="eval").body


def _call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call):
        raise ValueError("an item of the list is not a call")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("arguments must be named")
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if len(arguments) < len(node.keywords):
        raise ValueError("duplicate argument")
    if json_depth(arguments) > MAX_JSON_DEPTH:
        raise ValueError(f"the arguments are nested deeper than {MAX_JSON_DEPTH} levels")
    reject_lone_surrogates(arguments)
    return {"name": _name(node.func), "arguments": arguments}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("a call needs a name")


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            if value == inf or (isinstance(value, int) and abs(value) >= _INT_LIMIT):
                raise ValueError("a number is too large")
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=items):
            names = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            if len(names) == len(keys):
                if len(set(names)) < len(names):
                    raise ValueError("duplicate key")
                return {name: _value(item) for name, item in zip(names, items, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _value(operand)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return -number
    raise ValueError("an argument must be a value, not an expression")
