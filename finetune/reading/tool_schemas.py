"""Tool declarations in their many spellings, brought to `{"type": "function", "function": {name, …}}`."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from finetune.reading.row_files import json_type, strict_json

# Type names of Python and of BFCL that JSON Schema spells differently; "any" is JSON Schema's absence of a type.
_TYPES = {
    "dict": "object",
    "float": "number",
    "int": "integer",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "double": "number",
    "long": "integer",
}
_JSON_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_GENERIC = re.compile(r"(?P<outer>\w+)\[(?P<inner>.*)\]")


def normalize_tools(value: Any, notes: Counter | None = None) -> list[dict[str, Any]]:
    """Accepts a list of dicts, a list of JSON strings, one JSON string, bare functions, or nothing.

    Keys keep their order and unknown keys stay. The tools may be shared between rows: never change them in place.
    Raises ValueError naming the tool that cannot be read.
    """
    if isinstance(value, str):
        tools, changed = _from_text(value)
        if notes is not None:
            notes.update(changed)
        return list(tools)
    return _tools(value, notes)


@lru_cache(maxsize=1024)
def _from_text(text: str) -> tuple[tuple[dict[str, Any], ...], Counter]:
    """Tools written as one text repeat row after row: read once, shared by all rows that carry the same text."""
    notes: Counter = Counter()
    return tuple(_tools(_decoded(text, "tools"), notes)), notes


def _tools(value: Any, notes: Counter | None) -> list[dict[str, Any]]:
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"tools are a JSON {json_type(value)}, not a list")
    return [_tool(_decoded(item, f"tool {number}"), number, notes) for number, item in enumerate(value, start=1)]


def _decoded(value: Any, what: str) -> Any:
    for _ in range(2):
        if not isinstance(value, str) or not value.strip():
            break
        try:
            value = strict_json(value)
        except ValueError as error:
            raise ValueError(f"{what}: no JSON ({error})") from error
    return value


def _tool(item: Any, number: int, notes: Counter | None) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"tool {number} is a JSON {json_type(item)}, not an object")
    if isinstance(item.get("function"), dict):
        function, wrapper = dict(item["function"]), item
    else:
        function, wrapper = dict(item), {"type": "function"}
        function.pop("type", None) if function.get("type") in ("function", "custom") else None
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"tool {number} has no name")
    for key in ("input_schema", "inputSchema"):  # Anthropic's API, servers of MCP
        if isinstance(function.get(key), dict) and "parameters" not in function:
            function = {"parameters" if name == key else name: value for name, value in function.items()}
            if notes is not None:
                notes[f"{key} of a tool -> parameters"] += 1
    if "parameters" in function:
        parameters = _decoded(function["parameters"], f"parameters of tool {function['name']}")
        if parameters is None or parameters == "":
            del function["parameters"]
        elif not isinstance(parameters, dict):
            raise ValueError(f"parameters of tool {function['name']} are a JSON {json_type(parameters)}, not an object")
        else:
            function["parameters"] = _json_schema(parameters, notes)
    if wrapper.get("type") == "function":
        return {key: function if key == "function" else inner for key, inner in wrapper.items()} | {
            "function": function
        }
    return {"type": "function", "function": function}


def _json_schema(parameters: dict[str, Any], notes: Counter | None) -> dict[str, Any]:
    """Parameters as a JSON Schema: as they are, with Python's type names translated, or made from a flat list."""
    flat = parameters and all(map(_describes_one, parameters.values()))
    if flat and not isinstance(parameters.get("type"), str):
        if notes is not None:
            notes["tool with a flat parameter list rewritten as JSON Schema"] += 1
        optional = {
            name
            for name, prop in parameters.items()
            if "default" in prop or (isinstance(prop.get("type"), str) and "optional" in prop["type"].lower())
        }
        return {
            "type": "object",
            "properties": {name: _translated(prop) for name, prop in parameters.items()},
            "required": [name for name in parameters if name not in optional],
        }
    if _foreign_type(parameters):
        if notes is not None:
            notes["tool with foreign type names translated to JSON Schema"] += 1
        return _translated(parameters)
    return parameters


def _describes_one(value: Any) -> bool:
    """Whether `value` describes one parameter; `properties` may hold parameters called "type" or "description"."""
    return isinstance(value, dict) and (
        isinstance(value.get("type"), (str, list)) or isinstance(value.get("description"), str)
    )


def _foreign_type(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_foreign_type, schema))
    if not isinstance(schema, dict):
        return False
    name = schema.get("type")
    if isinstance(name, str) and name not in _JSON_TYPES:
        return True
    inner = [schema.get(key) for key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties")]
    properties = schema.get("properties")
    return any(map(_foreign_type, inner + (list(properties.values()) if isinstance(properties, dict) else [])))


def _translated(schema: Any) -> Any:
    """A schema with each foreign `type` replaced; all else as it is. The source's own words stay in no other place."""
    if isinstance(schema, list):
        return [_translated(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            result.update(_type(value))
        elif key == "properties" and isinstance(value, dict):
            result[key] = {name: _translated(prop) for name, prop in value.items()}
        elif key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties"):
            result[key] = _translated(value)
        else:
            result[key] = value
    return result


def _type(name: str) -> dict[str, Any]:
    """`List[int], optional` -> {"type": "array", "items": {"type": "integer"}}; an unknown name sets no type."""
    bare = re.sub(r",?\s*optional\s*$", "", name.strip(), flags=re.IGNORECASE)
    if match := _GENERIC.fullmatch(bare):
        outer, inner = match["outer"].lower(), match["inner"]
        if outer == "optional":
            return _type(inner)
        base = _type(outer)
        if base.get("type") == "array" and "," not in inner and (items := _type(inner)):
            base["items"] = items
        return base
    lowered = bare.lower()
    if lowered in _JSON_TYPES:
        return {"type": lowered}
    return {"type": _TYPES[lowered]} if lowered in _TYPES else {}


def load_tools_file(path) -> list[dict[str, Any]]:
    """Tool schemas of a JSON file (`--tools FILE`). Raises UserError."""
    from pathlib import Path

    from finetune.errors import UserError

    try:
        return normalize_tools(strict_json(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSON file with tool schemas") from error
    except (ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}; give a JSON array of tool schemas") from error
