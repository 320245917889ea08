"""Calls as ToolACE and Llama write them, `[Name With Spaces(k="v"), f.g(x=[1])]`, read by the declared names."""

from __future__ import annotations

import re
from typing import Any

from formats.pythonic import read_literal

_ARGUMENT = re.compile(r"""\s*([^()\[\]{},'"=\s][^()\[\]{},'"=]*)=""")
_PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^'"()\[\]{},]+|[^'"]""", re.DOTALL)


def bracket_calls(text: str, names: list[str]) -> list[dict[str, Any]] | None:
    """The calls of `[Name With Spaces(k="v"), f.g(x=[1])]`; None unless the text begins like one, with a known name.

    names  the longest first
    Values are Python literals or JSON's `true`, `false` and `null`. Raises ValueError for a call that breaks off.
    """
    call = re.compile(rf"[\[,]\s*({'|'.join(map(re.escape, names))})\s*\(")
    text = text.strip()
    if not names or not call.match(text):
        return None
    calls: list[dict[str, Any]] = []
    position = 0
    while text[position:] != "]":
        match = call.match(text, position)
        if match is None or (text[position] == "[") is bool(calls):
            raise ValueError(f"no declared function at {text[position : position + 30]!r}")
        arguments, position = _arguments(text, match.end())
        calls.append({"name": match[1], "arguments": arguments})
    return calls


def _arguments(text: str, position: int) -> tuple[dict[str, Any], int]:
    """The named arguments up to the closing parenthesis, and the position of what follows it."""
    arguments: dict[str, Any] = {}
    position = _after_space(text, position)
    while text[position : position + 1] != ")":
        match = _ARGUMENT.match(text, position)
        if match is None:
            raise ValueError(f"an argument without a name at {text[position : position + 30]!r}")
        name = match[1].rstrip()
        if name in arguments:
            raise ValueError(f"the argument {name} twice")
        end = _value_end(text, match.end())
        arguments[name] = read_literal(text[match.end() : end])
        position = _after_space(text, end + (text[end] == ","))
    return arguments, _after_space(text, position + 1)


def _value_end(text: str, position: int) -> int:
    """Where a value ends: the `,` or `)` outside of quotes and brackets."""
    depth = 0
    while piece := _PIECE.match(text, position):
        if piece[0] in ",)" and not depth:
            return position
        depth += (piece[0] in "([{") - (piece[0] in ")]}")
        position = piece.end()
    raise ValueError("it breaks off")


def _after_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())
