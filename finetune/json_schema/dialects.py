"""JSON Schemas of other dialects, rewritten for a validator of JSON Schema 2020-12 or draft-07.

Read are booleans of draft-03 and draft-04 (`"exclusiveMinimum": true`, `"required": true` in a property), OpenAPI 3.0
(`nullable`), empty objects that PHP writes as `[]`, tuples under `items`, and ECMA regular expressions (`\\p{L}`). What
cannot be checked is omitted and named; the rest of the schema is still checked.
"""

from __future__ import annotations

from typing import Any

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SUBSCHEMAS = (
    "items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
    "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
# Keywords of draft-03 that later drafts do not know.
_OLD_KEYWORDS = ("divisibleBy", "disallow", "extends")
# Without these a schema says too little to be checked at all.
_NEEDED = ("type", "properties", "$ref", "$defs", "definitions")
_MAX_UNCHECKED = 50


def rewritten(schema: Any, *, tuples: bool, unchecked: list[str], path: str = "") -> Any:
    """The schema with the keywords of other dialects replaced; the schema that is given is not changed.

    tuples     a list under `items` becomes `prefixItems` (2020-12)
    unchecked  gets "path/keyword: reason" for each keyword that had to be omitted
    """
    if not isinstance(schema, dict):
        return schema

    def inner(value: Any, *names: str) -> Any:
        return rewritten(value, tuples=tuples, unchecked=unchecked, path="/".join((path, *names)))

    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in SCHEMA_MAPS and value == []:
            result[key] = {}
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            result[key] = {name: inner(sub, key, name) for name, sub in value.items()}
        elif (key in SCHEMA_LISTS or key == "items") and isinstance(value, list):
            result[key] = [inner(sub, key, str(number)) for number, sub in enumerate(value)]
        elif key in SUBSCHEMAS:
            result[key] = inner(value, key)
        elif key in _OLD_KEYWORDS:
            unchecked.append(f"{path}/{key}: a keyword of draft-03")
        else:
            result[key] = value
    _read_required(schema, result)
    _read_limits(result, path, unchecked)
    if result.get("type") == "any":
        del result["type"]
    if tuples and isinstance(result.get("items"), list):
        result["prefixItems"] = result.pop("items")
        if "additionalItems" in result:
            result["items"] = result.pop("additionalItems")
    _check_patterns(result, path, unchecked)
    return _nullable(result) if schema.get("nullable") is True else result


def _read_required(schema: dict[str, Any], result: dict[str, Any]) -> None:
    """Draft-03: a property says of itself whether it is required."""
    if isinstance(result.get("required"), bool):
        del result["required"]
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return
    required = [name for name, sub in properties.items() if isinstance(sub, dict) and sub.get("required") is True]
    given = result.get("required", [])
    if required and isinstance(given, list):
        result["required"] = [*given, *(name for name in required if name not in given)]


def _read_limits(result: dict[str, Any], path: str, unchecked: list[str]) -> None:
    """Draft-04 and OpenAPI 3.0: `exclusiveMinimum` is a boolean beside `minimum`."""
    for exclusive, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if not isinstance(result.get(exclusive), bool):
            continue
        if result.pop(exclusive):
            if limit in result:
                result[exclusive] = result.pop(limit)
            else:
                unchecked.append(f"{path}/{exclusive}: true without {limit}")


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0: the schema or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def compiled(pattern: str) -> Any:
    """A regular expression of ECMA 262, as JSON Schema wants it. Raises ValueError."""
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error) or "nested too deeply") from error


def _check_patterns(result: dict[str, Any], path: str, unchecked: list[str]) -> None:
    """Omit regular expressions that cannot be read."""
    if isinstance(pattern := result.get("pattern"), str) and (reason := _unreadable(pattern)):
        unchecked.append(f"{path}/pattern {pattern!r}: {reason}")
        del result["pattern"]
    patterns = result.get("patternProperties")
    for pattern in list(patterns) if isinstance(patterns, dict) else ():
        if reason := _unreadable(pattern):
            unchecked.append(f"{path}/patternProperties {pattern!r}: {reason}")
            result["patternProperties"] = {key: sub for key, sub in patterns.items() if key != pattern}
            # A property that this pattern allows would count as one too many.
            for key in ("additionalProperties", "unevaluatedProperties"):
                if key in result:
                    unchecked.append(f"{path}/{key}: is next to that pattern")
                    del result[key]
            patterns = result["patternProperties"]


def _unreadable(pattern: str) -> str:
    try:
        compiled(pattern)
    except ValueError as error:
        return f"not a regular expression that can be read ({error})"
    return ""


def without_invalid_keywords(schema: Any, kind: Any, unchecked: list[str]) -> tuple[Any, str | None]:
    """(schema without the keywords that the metaschema refuses, None), or (schema, why it cannot be used at all)."""
    import jsonschema

    for _ in range(_MAX_UNCHECKED):
        try:
            kind.check_schema(schema, format_checker=jsonschema.FormatChecker(formats=()))
        except jsonschema.SchemaError as error:
            # The path in the schema up to the value that is refused; its last name is the keyword.
            names = list(error.absolute_path)
            while names and isinstance(names[-1], int):
                names.pop()
            if not names or names[-1] in _NEEDED or _is_name(names):
                return schema, error.message[:200]
            unchecked.append(f"/{'/'.join(map(str, names))}: {error.message[:100]}")
            schema = _without(schema, names)
        else:
            return schema, None
    return schema, "too many keywords cannot be read"


def _is_name(names: list[Any]) -> bool:
    """Whether the last name is that of a property, whose value is not a schema."""
    return len(names) > 1 and names[-2] in SCHEMA_MAPS and not (len(names) > 2 and names[-3] in SCHEMA_MAPS)


def _without(schema: Any, names: list[Any]) -> Any:
    first, *rest = names
    copy = list(schema) if isinstance(schema, list) else dict(schema)
    if rest:
        copy[first] = _without(copy[first], rest)
    else:
        del copy[first]
    return copy
