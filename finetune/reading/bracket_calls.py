"""Calls as ToolACE and Llama write them, `[Name With Spaces(k="v"), f.g(x=[1])]`, read by the declared names."""

from __future__ import annotations

from typing import Any

from formats.pythonic import read_literal


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
