"""Schemas of other dialects: right arguments pass, wrong ones do not, keywords that cannot be checked are named."""

from __future__ import annotations

import pytest

from finetune.json_schema import schema_errors, unchecked_keywords


def outcome(schema: dict, *arguments: dict) -> list[bool]:
    """Whether each of the arguments satisfies the schema."""
    results = []
    for one in arguments:
        errors, broken = schema_errors(schema, one)
        assert broken is None
        results.append(not errors)
    return results


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"properties": {"a": {"pattern": r"^\p{L}+$"}}}, {"a": "Öl"}, {"a": "4"}),
        ({"properties": {"a": {"minimum": 0, "exclusiveMinimum": True}}}, {"a": 1}, {"a": 0}),
        ({"properties": {"a": {"maximum": 9, "exclusiveMaximum": False}}}, {"a": 9}, {"a": 10}),
        ({"properties": {"a": {"type": "string", "required": True}}}, {"a": "x"}, {}),
        ({"properties": {"a": {"type": "string", "nullable": True}}}, {"a": None}, {"a": 1}),
        ({"properties": {"a": {"enum": ["x"], "nullable": True}}}, {"a": None}, {"a": "y"}),
        ({"properties": {"a": {"items": [{"type": "integer"}, {"type": "string"}]}}}, {"a": [1, "x"]}, {"a": ["x", 1]}),
        (
            {"patternProperties": {r"^\p{Lu}": {"type": "integer"}}, "additionalProperties": False},
            {"Ärger": 1},
            {"ärger": 1},
        ),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "properties": {"a": {"minimum": 0,
             "exclusiveMinimum": True}}},
            {"a": 1},
            {"a": 0},
        ),
    ],
)  # fmt: skip
def test_dialects(schema, right, wrong):
    assert outcome(schema, right, wrong) == [True, False]
    assert unchecked_keywords(schema) == ()


def test_empty_properties_of_php():
    assert outcome({"type": "object", "properties": []}, {}) == [True]


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"pattern": "(unclosed"}, "/properties/a/pattern"),
        ({"exclusiveMinimum": True}, "/properties/a/exclusiveMinimum"),
        ({"minLength": "three"}, "/properties/a/minLength"),
        ({"divisibleBy": 2}, "/properties/a/divisibleBy"),
    ],
)
def test_unchecked_keyword_is_named(keywords, name):
    schema = {"properties": {"a": keywords, "b": {"type": "integer"}}}
    assert [keyword.startswith(name) for keyword in unchecked_keywords(schema)] == [True]
    assert outcome(schema, {"a": "x", "b": 1}, {"a": "x", "b": "1"}) == [True, False]


def test_schema_without_a_readable_type_is_broken():
    assert schema_errors({"properties": {"a": {"type": 7}}}, {"a": 1})[1].startswith("is not a valid JSON Schema")
