"""The one way in which arguments are checked against a tool's JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def validator_of(schema_text: str) -> tuple[Any, str | None]:
    """(jsonschema validator, None) of a schema as JSON text, or (None, why it is no JSON Schema).

    The draft is the one that its "$schema" names (tools of MCP servers say draft-07), else 2020-12. Cached, because a
    data set repeats its tools in every row.
    """
    import jsonschema
    import referencing

    schema = json.loads(schema_text)
    kind = jsonschema.Draft202012Validator
    if isinstance(schema, dict) and isinstance(schema.get("$schema"), str):
        kind = jsonschema.validators.validator_for(schema, default=kind)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        return None, error.message[:200]
    # An empty registry: a "$ref" must not make this machine fetch addresses.
    return kind(schema, registry=referencing.Registry()), None


class ToolSchemas:
    """The declared tools of an item, for checking calls against them."""

    def __init__(self, tools: list[dict[str, Any]]):
        self.parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def unknown_arguments(self, call: dict[str, Any]) -> list[str]:
        """Paths of arguments that the tool's schema does not know; the tool must be declared."""
        return list(_unknown(self.parameters[call["name"]], call["arguments"], ""))

    def is_valid(self, call: dict[str, Any]) -> bool | None:
        """Whether the arguments satisfy the tool's JSON Schema; None when the schema itself is none."""
        validator, _ = validator_of(json.dumps(self.parameters[call["name"]]))
        try:
            return None if validator is None else validator.is_valid(call["arguments"])
        except Exception:  # an unresolvable $ref or a wrong regular expression inside the schema
            return None

    def problems(self, call: dict[str, Any]) -> list[str]:
        """What is wrong with a call, one line each, for a person or for the model to read; empty when nothing is."""
        name = call["name"]
        if name not in self.parameters:
            return [f"no tool is called {name!r}; declared: {', '.join(self.parameters) or 'none'}"]
        found = [f"the schema knows no argument {path}" for path in self.unknown_arguments(call)]
        validator, _ = validator_of(json.dumps(self.parameters[name]))
        if validator is None:
            return [*found, f"the parameters of {name} are no JSON Schema, so its arguments cannot be checked"]
        try:
            for error in validator.iter_errors(call["arguments"]):
                if error.validator not in ("additionalProperties", "unevaluatedProperties") or not found:
                    found.append(f"{error.json_path.removeprefix('$').lstrip('.') or 'arguments'}: {error.message}")
        except Exception as error:  # as above
            found.append(f"the schema of {name} cannot be followed: {' '.join(str(error).split())}")
        return found


def _unknown(schema: Any, value: Any, path: str) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if isinstance(value, list):
        for at, element in enumerate(value):
            yield from _unknown(schema.get("items"), element, f"{path}[{at}]")
    if not isinstance(value, dict):
        return
    properties, extra = schema.get("properties"), schema.get("additionalProperties")
    declared = properties if isinstance(properties, dict) else {}
    # A schema without properties of its own leaves the names open, unless it says that there are none.
    closed = extra is False or (extra is None and isinstance(properties, dict))
    for key, inner in value.items():
        at = f"{path}.{key}".lstrip(".")
        if key in declared:
            yield from _unknown(declared[key], inner, at)
        elif closed and not _names_elsewhere(schema):
            yield at
        else:
            yield from _unknown(extra, inner, at)


def _names_elsewhere(schema: dict[str, Any]) -> bool:
    """Whether other places of a schema may name properties; a branch that only says what is required does not."""
    lists = [schema[word] for word in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(word), list)]
    branches = [one for branch in lists for one in branch]
    return any(word in schema for word in ("$ref", "patternProperties")) or any(
        not isinstance(one, dict) or one.keys() - {"required", "title", "description"} for one in branches
    )
