"""Checks of arguments against a tool's JSON Schema, with limits for the schemas of others.

jsonschema matches patterns with `re`, follows every `$ref` again, and compares unique items in pairs: a schema of a few
hundred bytes could keep it busy for hours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import cache, lru_cache
from typing import Any

MAX_CHECKS = 300_000  # keywords evaluated for one value: about a second
SMALL_VALUE = 10_000  # characters of JSON
MAX_PATTERN_SECONDS = 1.0
MAX_PATTERN_LENGTH = 10_000
_SLOW_PATTERNS: set[str] = set()
_state = threading.local()


class TooExpensive(Exception):
    """The check of a value was stopped."""


class _TimedPatterns:
    """The part of `re` that jsonschema uses, with a time limit."""

    @staticmethod
    def search(pattern: str, text: str) -> Any:
        import regex

        if len(pattern) > MAX_PATTERN_LENGTH:
            raise TooExpensive(f"its pattern has more than {MAX_PATTERN_LENGTH:,} characters")
        slow = f"its pattern {pattern[:100]!r} takes more than {MAX_PATTERN_SECONDS:g} s"
        if pattern in _SLOW_PATTERNS:
            raise TooExpensive(slow)
        try:
            return regex.search(pattern, text, timeout=MAX_PATTERN_SECONDS)
        except TimeoutError as error:
            _SLOW_PATTERNS.add(pattern)  # the next row with this tool need not wait
            raise TooExpensive(slow) from error


def _frozen(value: Any) -> Hashable:
    """Equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((key, _frozen(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_frozen, value))
    return ("boolean", value) if isinstance(value, bool) else value


def _is_unique(items: list[Any]) -> bool:
    return len(set(map(_frozen, items))) == len(items)


@cache
def _patch_jsonschema() -> None:
    from jsonschema import _keywords, _legacy_keywords, _utils

    for module in (_keywords, _legacy_keywords, _utils):
        module.re = _TimedPatterns
    _keywords.uniq = _is_unique


@cache
def limited_class(kind: Any) -> Any:
    """A jsonschema validator class that counts the keywords it evaluates."""
    from jsonschema import validators

    _patch_jsonschema()
    counted = {name: _counted(check) for name, check in kind.VALIDATORS.items()}
    return validators.extend(kind, counted)


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        left = getattr(_state, "left", None)
        if left is not None:
            if left <= 0:
                raise TooExpensive(f"it needs more than {MAX_CHECKS:,} checks for one call")
            _state.left = left - 1
        return check(*arguments)

    return counting


class LimitedValidator:
    """A jsonschema validator whose checks end with TooExpensive once they have taken `MAX_CHECKS` steps."""

    def __init__(self, kind: Any, schema: Any, registry: Any):
        self._validator = limited_class(kind)(without_dialects(schema), registry=registry)
        self._refused: str | None = None

    def iter_errors(self, value: Any) -> Iterator[Any]:
        """The validation errors, as jsonschema yields them. Raises TooExpensive."""
        if self._refused:
            raise TooExpensive(self._refused)
        before = getattr(_state, "left", None)
        _state.left = MAX_CHECKS
        try:
            for error in self._validator.iter_errors(value):
                left, _state.left = _state.left, before
                yield error
                _state.left = left
        except TooExpensive as error:
            if len(json.dumps(value, default=str)) < SMALL_VALUE:
                self._refused = str(error)  # not the value's fault: the next call need not wait
            raise
        finally:
            _state.left = before


def without_dialects(schema: Any) -> Any:
    """The schema without "$schema": jsonschema would go on with a class of that draft, which has no limits."""
    if isinstance(schema, list):
        return [without_dialects(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("const", "enum", "default", "examples") else without_dialects(value)
        for key, value in schema.items()
        if not (key == "$schema" and isinstance(value, str))
    }


@lru_cache(maxsize=4096)
def validator_of(schema_text: str) -> tuple[Any, str | None]:
    """(jsonschema validator, None) of a schema as JSON text, or (None, why it is not a valid JSON Schema).

    The draft is the one that "$schema" names (tools of MCP servers name draft-07), else 2020-12. Cached, because a
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
    # The empty registry keeps a "$ref" from fetching URLs.
    return LimitedValidator(kind, schema, referencing.Registry()), None


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
