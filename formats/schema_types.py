"""The JSON types that a tool's schema allows for a parameter, also behind `$ref`, `allOf`, `oneOf`, `const`, `enum`.

For formats that write values without their type: 7 and "7" look alike.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

KINDS = {dict: "object", list: "array", bool: "boolean", type(None): "null", str: "string"}
MAX_REFERENCES = 32  # followed one behind another


def declared_properties(tools: list[dict] | None) -> dict[str, dict[str, Any]]:
    """{tool's name: {parameter: its schema}}; a schema that is not an object with properties declares nothing.

    A parameter's schema with references is replaced by the types that they lead to.
    """
    types = {}
    for tool in tools or []:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        types[function.get("name")] = {
            key: _without_references(value, parameters) for key, value in _properties(parameters, parameters, 0).items()
        }
    return types


def _properties(schema: Any, root: Any, depth: int) -> dict[str, Any]:
    """The properties of `schema`, and those of what it refers to or consists of."""
    if not isinstance(schema, dict) or depth > MAX_REFERENCES:
        return {}
    found: dict[str, Any] = {}
    parts = schema.get("allOf")
    for part in [_referenced(schema.get("$ref"), root), *(parts if isinstance(parts, list) else [])]:
        found |= _properties(part, root, depth + 1)
    properties = schema.get("properties")
    return found | properties if isinstance(properties, dict) else found


def _without_references(schema: Any, root: Any) -> Any:
    if not _refers(schema):
        return schema
    return {"type": sorted(declared_types(schema, root))}


def _refers(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    options = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    return "$ref" in schema or any(_refers(option) for some in options if isinstance(some, list) for option in some)


def declared_types(schema: Any, root: Any = None, followed: int = 0) -> set[str]:
    """The types that a parameter's schema allows; empty when it says nothing about them.

    All keywords of one schema must hold, `allOf` included; of `anyOf` and `oneOf`, one option. `$ref` leads into
    `root`, the schema of all parameters.
    """
    if not isinstance(schema, dict) or followed > MAX_REFERENCES:
        return set()
    kind = schema.get("type")
    found = [{name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}]
    if "$ref" in schema:
        found.append(declared_types(_referenced(schema["$ref"], root), root, followed + 1))
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list):
            allowed = [declared_types(option, root, followed + 1) for option in options]
            found.append(set().union(*allowed) if all(allowed) else set())
    if isinstance(parts := schema.get("allOf"), list):
        found += [declared_types(part, root, followed + 1) for part in parts]
    if "const" in schema:
        found.append({_kind(schema["const"])})
    if isinstance(schema.get("enum"), list):
        found.append({_kind(value) for value in schema["enum"]})
    said = [types | {"integer"} if "number" in types else types for types in found if types]
    if not said:
        return set()
    return set.intersection(*said) or said[0]  # of a contradiction, what stands first


def _referenced(reference: Any, root: Any) -> Any:
    """What a JSON pointer such as `#/$defs/Code` names in `root`; None for anything else."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node = root
    for part in reference[1:].split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and part.isascii() and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.get(part)
        else:
            return None
    return node


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "integer" if isinstance(value, int) else "number")
