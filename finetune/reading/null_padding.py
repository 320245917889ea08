"""Nulls with which Arrow and pandas fill up structs, removed from schemas and arguments of JSON rows.

Parquet tells padding by its types. In JSON Lines it is told by the tools: a null where JSON Schema wants a schema or
a keyword's value is padding, and so is a null argument that the tool does not declare, or that may be omitted but not
be null. Nulls inside lists and in arguments that were JSON text are data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetune.json_schema import allows_null
from finetune.json_schema.dialects import SCHEMA_LISTS, SCHEMA_MAPS, SUBSCHEMAS

_NULL_VALUES = ("default", "const", "example")  # keywords whose value may be null


def remove_null_padding(conversation: dict[str, Any], raw: Any, notes: Counter) -> None:
    """Remove padding from the calls of a canonical conversation in place, and count it in the notes.

    raw  the row as it was read; it tells which arguments were objects and which were JSON text
    """
    removed: Counter = Counter()
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in conversation["tools"]}
    objects: list[dict] | None = None
    for message in conversation["messages"]:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["name"] in schemas and _holds_null(function["arguments"]):
                objects = list(_dicts(raw)) if objects is None else objects
                if function["arguments"] in objects:
                    root = schemas[function["name"]]
                    function["arguments"] = _arguments(function["arguments"], [root], root, removed)
    notes.update(removed)


def without_null_keywords(tool: dict[str, Any], notes: Counter) -> dict[str, Any]:
    """A canonical tool without padding, which is counted in the notes; the tool that is given is not changed."""
    if not _holds_null(tool):
        return tool
    count: Counter = Counter()
    function = {key: value for key, value in tool["function"].items() if value is not None}
    if isinstance(function.get("parameters"), dict):
        function["parameters"] = _schema(function["parameters"], count)
    cleaned = {key: value for key, value in tool.items() if value is not None} | {"function": function}
    number = count["keys"] + len(tool["function"]) - len(function) + len(tool) - len(cleaned)
    if number:
        notes["null padding in tool schemas removed"] += number
    return cleaned


def _schema(schema: Any, count: Counter) -> Any:
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and key not in _NULL_VALUES:
            count["keys"] += 1
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            result[key] = {name: _schema(sub, count) for name, sub in value.items() if sub is not None}
            count["keys"] += len(value) - len(result[key])
        elif (key in SCHEMA_LISTS or key == "items") and isinstance(value, list):
            result[key] = [_schema(sub, count) for sub in value]
        else:
            result[key] = _schema(value, count) if key in SUBSCHEMAS else value
    return result


def _arguments(value: Any, schemas: list[Any], root: Any, removed: Counter) -> Any:
    """The value without padding; `schemas` are all that describe it, references and branches resolved."""
    if not isinstance(value, (list, dict)):
        return value
    branches = [branch for schema in schemas for branch in _branches(schema, root)]
    if isinstance(value, list):
        items = [branch["items"] for branch in branches if isinstance(branch.get("items"), dict)]
        return [_arguments(element, items, root, removed) for element in value]
    result: dict[str, Any] = {}
    for key, inner_value in value.items():
        declared = [sub for branch in branches for sub in _declarations(branch, key)]
        required = any(isinstance(b.get("required"), list) and key in b["required"] for b in branches)
        # Of several branches one that allows null is enough.
        if inner_value is None and not (required or any(allows_null(sub, root) for sub in declared)):
            removed["null padding in arguments removed"] += 1
        else:
            result[key] = _arguments(inner_value, declared, root, removed)
    return result


def _branches(schema: Any, root: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The schema, and those that it names by reference or lists as branches."""
    if not isinstance(schema, dict) or depth > 8:
        return
    yield schema
    if isinstance(reference := schema.get("$ref"), str):
        yield from _branches(_resolved(reference, root), root, depth + 1)
    for key in ("allOf", "anyOf", "oneOf"):
        for sub in schema[key] if isinstance(schema.get(key), list) else ():
            yield from _branches(sub, root, depth + 1)
    for key in ("then", "else"):
        yield from _branches(schema.get(key), root, depth + 1)


def _resolved(reference: str, root: Any) -> Any:
    """What a reference such as `#/$defs/point` names; None if it leads nowhere."""
    if not reference.startswith("#"):
        return None
    for name in filter(None, reference[1:].split("/")):
        name = name.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, dict) else None
    return root


def _declarations(branch: dict[str, Any], key: str) -> list[Any]:
    properties = branch.get("properties")
    if isinstance(properties, dict) and key in properties:
        return [properties[key]]
    return [branch["additionalProperties"]] if "additionalProperties" in branch else []


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(inner)
