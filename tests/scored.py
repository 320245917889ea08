"""Items and answers made by hand, for tests of verdicts, metrics and reports."""

from __future__ import annotations

from typing import Any

from finetune.evaluation.items import CALL, Item
from finetune.evaluation.metrics import Scored
from finetune.evaluation.scoring import score

LAMP = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "level": {"type": "integer"}},
            "required": ["room"],
        },
    },
}
DOOR = {
    "type": "function",
    "function": {
        "name": "door",
        "parameters": {
            "type": "object",
            "properties": {
                "Assign": {
                    "type": "object",
                    "additionalProperties": {"type": "object", "properties": {"open": {"type": "boolean"}}},
                }
            },
        },
    },
}
TOOLS = [LAMP, DOOR]


def call(name: str, **arguments: Any) -> dict:
    return {"name": name, "arguments": arguments}


def item(kind: str = CALL, *expected: dict, row: int = 1, text: str | None = None, **more: Any) -> Item:
    messages = [{"role": "user", "content": "Dim the kitchen"}]
    more.setdefault("tools", TOOLS)
    return Item("rows", row, 1, kind, messages, expected_calls=list(expected), expected_text=text, **more)


def answered(one: Item, *made: dict, text: str = "", errors: tuple[str, ...] = (), latency: float = 1.0) -> Scored:
    return Scored(one, text, list(made), score(one, text, list(made), list(errors)), latency, errors)
