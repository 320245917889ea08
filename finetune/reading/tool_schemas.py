"""Tool declarations in any common spelling, converted to `{"type": "function", "function": {name, …}}`."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import read_text
from finetune.reading.null_padding import without_null_keywords
from finetune.reading.row_files import RowError, decode_json, json_stream, json_type, strict_json
from formats.calls import MAX_JSON_DEPTH, json_depth, reject_lone_surrogates

# Type names of Python and of BFCL -> those of JSON Schema.
_TYPES = {
    **{"dict": "object", "str": "string", "bool": "boolean"},
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("int", "long"), "integer"),
    **dict.fromkeys(("list", "tuple", "set"), "array"),
}
_JSON_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_SUBSCHEMAS = ("items", "anyOf", "oneOf", "allOf", "additionalProperties")
MAX_TYPE_LENGTH = 1000
_GENERIC = re.compile(r"(?P<outer>\w+)\[(?P<inner>.*)\]")


def normalize_tools(value: Any, notes: Counter | None = None) -> list[dict[str, Any]]:
    """Tools from a list of dicts, a list of JSON strings, one JSON string, bare functions, or nothing.

    Key order and unknown keys are kept. The tools may be shared between rows: never change them in place.
    Raises RowError naming the tool that cannot be read.
    """
    if value is None:
        return []
    try:
        tools, changed = _tools_of_text(value) if isinstance(value, str) else _tools(value)
    except RecursionError as error:
        raise RowError("tools are nested too deeply") from error
    if notes is not None:
        notes.update(changed)
    return list(tools)


@lru_cache(maxsize=1024)
def _tools_of_text(text: str) -> tuple[list[dict[str, Any]], Counter]:
    """Cached, because most rows of a data set carry the same text."""
    try:
        value = decode_json(text, "tools", times=2)
    except RowError:
        if not text.lstrip().startswith("{"):
            raise
        value = json_stream(text, "tools")  # one object after the other
    return _tools(value)


def _tools(value: Any) -> tuple[list[dict[str, Any]], Counter]:
    """(canonical tools, notes)."""
    notes: Counter = Counter()
    if value is None:  # blank text
        value = []
    if isinstance(value, dict):
        value = _list_inside(value, notes)
    if not isinstance(value, list):
        raise RowError(f"tools are a JSON {json_type(value)}, not a list")
    items = [decode_json(item, f"tool {number}", times=2) for number, item in enumerate(value, start=1)]
    items = [inner for item in items for inner in _declarations(item, notes)]
    return [_tool(item, number, notes) for number, item in enumerate(items, start=1)], notes


def _beside(value: dict[str, Any], key: str, notes: Counter) -> Any:
    """The tools under `key`; what else the object holds is not read, and noted."""
    notes.update(f"not read, key {str(other)[:40]!r} beside tools" for other in value if other != key and value[other])
    return value[key]


def _list_inside(value: dict[str, Any], notes: Counter) -> Any:
    """The list of a document that holds one: MCP's `tools/list` (in JSON-RPC or not), Converse's toolConfig."""
    result = value.get("result")
    if isinstance(result, dict) and "tools" in result and "name" not in value:
        value = _beside({key: value[key] for key in value if key not in ("jsonrpc", "id")}, "result", notes)
    if "name" not in value and isinstance(value.get("tools"), list):
        return _beside(value, "tools", notes)
    is_named = not value.keys() & {"name", "function", "type"} and all(
        isinstance(tool, dict) and tool.keys() & {"parameters", "description", "input_schema"}
        for tool in value.values()
    )
    return [{"name": name, **tool} for name, tool in value.items()] if value and is_named else [value]


def _declarations(item: Any, notes: Counter) -> list[Any]:
    """The tools that an item of a list declares: several in Gemini's `functionDeclarations`, else the item itself."""
    if isinstance(item, dict) and "name" not in item:
        for key in ("functionDeclarations", "function_declarations"):
            if isinstance(item.get(key), list):
                return _beside(item, key, notes)
        for key in ("toolSpec", "tool_spec"):
            if isinstance(item.get(key), dict):
                return [_beside(item, key, notes)]
        if item.keys() & {"cachePoint", "cache_point"}:
            return []
    return [item]


def _tool(item: Any, number: int, notes: Counter) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(f"tool {number} is a JSON {json_type(item)}, not an object")
    wrapper: dict[str, Any] = {"type": "function"}
    if isinstance(item.get("function"), dict):
        function = dict(item["function"])
        wrapper = {**(wrapper if "type" not in item else {}), **item, "type": "function"}
        if item.get("type") not in (None, "function"):
            notes["type of a tool -> function"] += 1
    else:
        function = dict(item)
        if function.get("type") in ("function", "custom"):
            del function["type"]
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"tool {number} has no name")
    for key in ("input_schema", "inputSchema"):  # Anthropic's API, MCP servers
        if isinstance(function.get(key), dict) and "parameters" not in function:
            schema = function[key]["json"] if isinstance(function[key].get("json"), dict) else function[key]  # Converse
            function = {
                "parameters" if name == key else name: schema if name == key else value
                for name, value in function.items()
            }
            notes[f"{key} of a tool -> parameters"] += 1
    if "parameters" in function:
        what = f"parameters of tool {function['name']}"
        parameters = decode_json(function["parameters"], what, times=2)
        if parameters is None:
            del function["parameters"]
        elif isinstance(parameters, dict):
            function["parameters"] = _json_schema(parameters, notes)
        else:
            raise RowError(f"{what} are a JSON {json_type(parameters)}, not an object")
    return without_null_keywords({**wrapper, "function": function}, notes)


def _json_schema(parameters: dict[str, Any], notes: Counter) -> dict[str, Any]:
    """Parameters as a JSON Schema: built from a flat list, or with Python's type names translated, or unchanged."""
    given = {name: schema for name, schema in parameters.items() if schema is not None}  # Arrow pads with nulls
    is_flat = given and all(map(_describes_parameter, given.values()))
    if is_flat and not isinstance(parameters.get("type"), str):
        notes["tool with a flat parameter list rewritten as JSON Schema"] += 1
        return {
            "type": "object",
            "properties": {name: _translated(schema) for name, schema in given.items()},
            "required": [
                name for name, schema in parameters.items() if schema is not None and not _is_optional(schema)
            ],
        }
    translated = _translated(parameters)
    if translated != parameters:
        notes["tool with type names of other languages translated to JSON Schema"] += 1
    return translated


def _describes_parameter(value: Any) -> bool:
    """Whether `value` describes one parameter; `properties` may hold parameters called "type" or "description"."""
    return isinstance(value, dict) and (
        isinstance(value.get("type"), (str, list)) or isinstance(value.get("description"), str)
    )


def _is_optional(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    return "default" in schema or (isinstance(kind, str) and "optional" in kind.lower())


def _translated(schema: Any) -> Any:
    """A schema with each `type` that JSON Schema does not know replaced."""
    if isinstance(schema, list):
        return [_translated(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            result.update(_type(value))
        elif key == "properties" and isinstance(value, dict):
            result[key] = {name: _translated(inner) for name, inner in value.items()}
        else:
            result[key] = _translated(value) if key in _SUBSCHEMAS else value
    return result


def _type(name: str) -> dict[str, Any]:
    """`List[int], optional` -> {"type": "array", "items": {"type": "integer"}}; {} for an unknown name."""
    if len(name) > MAX_TYPE_LENGTH:
        return {}
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
    kind = lowered if lowered in _JSON_TYPES else _TYPES.get(lowered)
    return {"type": kind} if kind else {}


def load_tools_file(path: str | Path) -> list[dict[str, Any]]:
    """The tools of a file (`--tools FILE`), as `parse_tools` reads them. Raises UserError, also where it has none."""
    if not (tools := parse_tools(read_text(path, "tools"), str(path))):
        raise UserError(f"{path}: contains no tool schema; give a JSON array of tool schemas")
    return tools


def parse_tools(text: str, where: str = "tools") -> list[dict[str, Any]]:
    """Tools as JSON text in any usual notation, or as the first row of a data set. UserError, starting with `where`."""
    value: Any = text
    with contextlib.suppress(ValueError):
        row = strict_json(text.lstrip().partition("\n")[0])
        value = row["tools"] if isinstance(row, dict) and "tools" in row else text
    try:
        tools = normalize_tools(value)
        reject_lone_surrogates(tools)
        if json_depth(tools) > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    except ValueError as error:
        raise UserError(f"{where}: {error}; give a JSON array of tool schemas") from error
    ((name, count),) = Counter(tool["function"]["name"] for tool in tools).most_common(1) or [("", 0)]
    if count > 1:
        raise UserError(f"{where}: {count} tools have the same name, {name}; keep one of them")
    return tools
