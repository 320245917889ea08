"""Null padding of JSON rows: removed where the tool's schema says so, kept where null is data."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from finetune.reading.normalize import normalize_row
from tests.rows import chat


def tool(properties: dict, **more) -> dict:
    return {"name": "f", "parameters": {"type": "object", "properties": properties, **more}}


def arguments(given, parameters: dict) -> dict:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": given}]}
    row = normalize_row(chat(message, tools=[parameters]))
    return row["messages"][1]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "properties", "more", "expected"),
    [
        ({"a": 1, "b": None}, {"a": {"type": "integer"}}, {}, {"a": 1}),
        ({"a": None}, {"a": {"type": "string"}}, {}, {}),
        ({"a": None}, {"a": {"type": ["string", "null"]}}, {}, {"a": None}),
        ({"a": None}, {"a": {"type": "string", "nullable": True}}, {}, {"a": None}),
        ({"a": None}, {"a": {"anyOf": [{"type": "null"}, {"type": "string"}]}}, {}, {"a": None}),
        ({"a": None}, {"a": {"type": "string"}}, {"required": ["a"]}, {"a": None}),
        ({"a": None}, {"a": {"$ref": "#/$defs/n"}}, {"$defs": {"n": {"type": ["null", "string"]}}}, {"a": None}),
        ({"a": None}, {"a": {"$ref": "#/$defs/n"}}, {"$defs": {"n": {"type": "string"}}}, {}),
        ({"a": [1, None]}, {"a": {"type": "array"}}, {}, {"a": [1, None]}),
        (
            {"a": {"b": 1, "c": None}},
            {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}},
            {},
            {"a": {"b": 1}},
        ),
        (
            {"a": [{"b": 1, "c": None}]},
            {"a": {"type": "array", "items": {"type": "object", "properties": {"b": {"type": "integer"}}}}},
            {},
            {"a": [{"b": 1}]},
        ),
        ({"x": None}, {}, {"additionalProperties": {"type": ["integer", "null"]}}, {"x": None}),
        ('{"a": null}', {"a": {"type": "string"}}, {}, {"a": None}),
    ],
)
def test_null_arguments(given, properties, more, expected):
    assert arguments(given, tool(properties, **more)) == expected


def test_null_keywords_of_a_schema_are_removed():
    padded = tool(
        {
            "a": {"type": "string", "enum": None, "items": None, "default": None},
            "b": None,
            "c": {"type": "array", "items": {"type": "string", "enum": None}},
            "d": {"enum": ["x", None]},
        },
        required=["a"],
        anyOf=None,
    )
    notes: Counter = Counter()
    row = normalize_row(chat({"role": "assistant", "content": "x"}, tools=[padded | {"strict": None}]), notes=notes)
    function = row["tools"][0]["function"]
    assert function == tool(
        {
            "a": {"type": "string", "default": None},
            "c": {"type": "array", "items": {"type": "string"}},
            "d": {"enum": ["x", None]},
        },
        required=["a"],
    )
    assert notes["null padding in tool schemas removed"] == 6
    assert padded["parameters"]["properties"]["b"] is None  # the tools that were given are not changed


def test_flat_parameter_list_with_padding():
    flat = {"name": "f", "parameters": {"a": {"type": "str", "description": "x"}, "b": None}}
    row = normalize_row(chat({"role": "assistant", "content": "x"}, tools=[flat]))
    assert json.dumps(row["tools"]).count('"b"') == 0
    assert row["tools"][0]["function"]["parameters"]["required"] == ["a"]
