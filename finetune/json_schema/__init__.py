"""Checks of arguments against a tool's JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from finetune.json_schema.dialects import rewritten, without_invalid_keywords
from finetune.json_schema.limits import LimitedValidator, TooExpensive


@lru_cache(maxsize=4096)
def _read_schema(schema_text: str) -> tuple[Any, str | None, tuple[str, ...]]:
    """(validator or None, why there is none, keywords that are not checked) of a schema as JSON text."""
    import jsonschema
    import referencing

    schema = json.loads(schema_text)
    kind = jsonschema.Draft202012Validator
    if isinstance(schema, dict) and isinstance(schema.get("$schema"), str):
        kind = jsonschema.validators.validator_for(schema, default=kind)
    if kind in (jsonschema.Draft3Validator, jsonschema.Draft4Validator):
        kind = jsonschema.Draft7Validator  # their booleans are rewritten
    unchecked: list[str] = []
    schema = rewritten(schema, tuples=kind is jsonschema.Draft202012Validator, unchecked=unchecked)
    schema, broken = without_invalid_keywords(schema, kind, unchecked)
    if broken:
        return None, broken, ()
    # The empty registry keeps a "$ref" from fetching URLs.
    return LimitedValidator(kind, schema, referencing.Registry()), None, tuple(unchecked)


def validator_of(schema_text: str) -> tuple[Any, str | None]:
    """(jsonschema validator, None) of a schema as JSON text, or (None, why it is not a valid JSON Schema).

    The draft is the one that "$schema" names (tools of MCP servers name draft-07), else 2020-12; keywords of other
    dialects are rewritten (finetune.json_schema.dialects). Cached, because a data set repeats its tools in every row.
    """
    return _read_schema(schema_text)[:2]


def unchecked_keywords(schema: Any) -> tuple[str, ...]:
    """The keywords of a schema that `schema_errors` cannot check, each with its path and the reason."""
    return _read_schema(json.dumps(schema))[2]


def schema_errors(schema: Any, arguments: dict[str, Any]) -> tuple[list[Any], str | None]:
    """(validation errors, None), or ([], "is not a valid JSON Schema: …" or "cannot be evaluated: …")."""
    validator, broken = validator_of(json.dumps(schema))
    if validator is None:
        return [], f"is not a valid JSON Schema: {broken}"
    errors: list[Any] = []
    try:
        for error in validator.iter_errors(arguments):
            errors.append(error)
    except TooExpensive as failure:
        return [], f"cannot be evaluated: {failure}"
    except Exception as failure:  # an unresolvable $ref or an invalid regular expression in the schema
        if not errors:
            return [], f"cannot be evaluated: {' '.join(str(failure).split())[:200]}"
    return errors, None


def allows_null(schema: Any, root: Any) -> bool:
    """Whether null satisfies a part of the schema `root`; True where it cannot be evaluated."""
    if schema is True or schema is False:
        return schema
    # The definitions stay where they are, so that "$ref" still finds them.
    definitions = {key: root[key] for key in ("$defs", "definitions", "$schema") if key in root}
    try:
        validator, broken = validator_of(json.dumps({**definitions, "allOf": [schema]}))
        return bool(broken) or validator.is_valid(None)
    except Exception:  # an unresolvable $ref, or a schema that is not JSON
        return True


class ToolSchemas:
    """The declared tools of an item, for checking calls against them."""

    def __init__(self, tools: list[dict[str, Any]]):
        self.parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def unknown_arguments(self, call: dict[str, Any]) -> list[str]:
        """Paths of arguments that the tool's schema does not declare; the tool itself must be declared."""
        return list(_unknown(self.parameters[call["name"]], call["arguments"], ""))

    def is_valid(self, call: dict[str, Any]) -> bool | None:
        """Whether the arguments satisfy the tool's JSON Schema; None when the schema cannot be used."""
        errors, broken = schema_errors(self.parameters[call["name"]], call["arguments"])
        return None if broken else not errors

    def problems(self, call: dict[str, Any]) -> list[str]:
        """All problems of a call, one line each, for a person or for the model to read."""
        name = call["name"]
        if name not in self.parameters:
            return [f"no tool is called {name!r}; declared: {', '.join(self.parameters) or 'none'}"]
        found = [f"unknown argument {path}" for path in self.unknown_arguments(call)]
        errors, broken = schema_errors(self.parameters[name], call["arguments"])
        if broken:
            return [*found, f"cannot check the arguments of {name}: its schema {broken}"]
        for error in errors:
            if error.validator not in ("additionalProperties", "unevaluatedProperties") or not found:
                found.append(f"{error.json_path.removeprefix('$').lstrip('.') or 'arguments'}: {error.message}")
        return found


def _unknown(schema: Any, value: Any, path: str) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if isinstance(value, list):
        for index, element in enumerate(value):
            yield from _unknown(schema.get("items"), element, f"{path}[{index}]")
    if not isinstance(value, dict):
        return
    properties, extra = schema.get("properties"), schema.get("additionalProperties")
    declared = properties if isinstance(properties, dict) else {}
    # A schema without properties allows any name, unless it says that there are none.
    is_closed = extra is False or (extra is None and isinstance(properties, dict))
    for key, inner in value.items():
        inner_path = f"{path}.{key}".lstrip(".")
        if key in declared:
            yield from _unknown(declared[key], inner, inner_path)
        elif is_closed and not _declares_elsewhere(schema):
            yield inner_path
        else:
            yield from _unknown(extra, inner, inner_path)


def _declares_elsewhere(schema: dict[str, Any]) -> bool:
    """Whether a schema may declare properties by reference, by pattern or in a branch that does more than require."""
    lists = [schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)]
    return any(key in schema for key in ("$ref", "patternProperties")) or any(
        not isinstance(branch, dict) or branch.keys() - {"required", "title", "description"}
        for branches in lists
        for branch in branches
    )
