"""A tool and a conversation that several tests of rows use."""

from __future__ import annotations

LAMP = {
    "name": "set_lamp",
    "description": "Dim a lamp.",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string"}, "level": {"type": "integer"}},
        "required": ["room"],
    },
}
WRAPPED = {"type": "function", "function": LAMP}


def chat(*messages: dict, tools=None) -> dict:
    """A raw row: one user message, then `messages`."""
    return {"messages": [{"role": "user", "content": "Dim the kitchen"}, *messages], "tools": tools}


def calls(message: dict) -> list[tuple[str, dict]]:
    """(name, arguments) of each call of a canonical message."""
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
