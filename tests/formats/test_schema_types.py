"""The types of values that are written without one, from every place where a schema may declare them."""

from __future__ import annotations

import pytest

from formats import FORMATS
from formats.schema_types import declared_types

DEFINITIONS = {
    "Plate": {"type": "string"},
    "Seats": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
    "Alias": {"$ref": "#/$defs/Plate"},
    "Loop": {"$ref": "#/$defs/Loop"},
    "a/b~c d": {"type": "boolean"},
}


def parsed(parameters: dict, **values: str) -> dict:
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items())
    text = f"<tool_call>\n<function=park>\n{body}</function>\n</tool_call>"
    tools = [{"type": "function", "function": {"name": "park", "parameters": parameters}}]
    return FORMATS["qwen-xml"].parse(text, tools).tool_calls[0]["arguments"]


@pytest.mark.parametrize(
    "schema,text,value",
    [
        ({"$ref": "#/$defs/Plate"}, "0815", "0815"),
        ({"$ref": "#/$defs/Plate"}, "42", "42"),
        ({"$ref": "#/$defs/Alias"}, "42", "42"),
        ({"allOf": [{"$ref": "#/$defs/Plate"}, {"maxLength": 9}]}, "42", "42"),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, "42", 42),
        ({"anyOf": [{"$ref": "#/$defs/Alias"}, {"type": "null"}]}, "42", "42"),
        ({"$ref": "#/$defs/Seats"}, "42", 42),
        ({"$ref": "#/$defs/Seats"}, "null", None),
        ({"$ref": "#/$defs/a~1b~0c%20d"}, "True", True),
        ({"const": "42"}, "42", "42"),
        ({"const": 42}, "42", 42),
        ({"oneOf": [{"const": "1"}, {"const": "2"}]}, "2", "2"),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"type": "number", "enum": [1, 2.5]}, "2.5", 2.5),
        ({"type": "string", "enum": [1]}, "1", "1"),
        ({"$ref": "#/$defs/Missing"}, "42", 42),
        ({"$ref": "#/$defs/Loop"}, "042", "042"),
        ({"$ref": "https://example.org/schema"}, "42", 42),
        ({"$ref": 7}, "42", 42),
    ],
)
def test_value_gets_its_declared_type(schema, text, value):
    read = parsed({"properties": {"x": schema}, "$defs": DEFINITIONS}, x=text)["x"]
    assert (read, type(read)) == (value, type(value))


def test_properties_behind_references():
    base = {"type": "object", "properties": {"plate": {"type": "string"}}}
    parts = [{"$ref": "#/$defs/Base"}, {"properties": {"seats": {"type": "string"}}}]
    assert parsed({"allOf": parts, "$defs": {"Base": base}}, plate="42", seats="5") == {"plate": "42", "seats": "5"}
    assert parsed({"$ref": "#/$defs/Base", "$defs": {"Base": base}}, plate="42") == {"plate": "42"}
    assert parsed({"$ref": "#"}, plate="42") == {"plate": 42}


def test_an_open_option_declares_nothing():
    assert declared_types({"anyOf": [{"type": "string"}, {}]}) == set()
    assert declared_types({"type": "number"}) == {"number", "integer"}
    assert declared_types([]) == declared_types({}) == set()
