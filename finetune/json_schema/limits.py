"""Limits for schemas of others: a few hundred bytes of schema could keep a validator busy for hours.

jsonschema is made to count its work (keywords, comparisons, searches, errors), to search regular expressions with a
time limit (by `regex`, which also reads those of ECMA 262), and to compare the items of a list in linear time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any

MAX_CHECKS = 300_000  # simple keywords evaluated for one value: about a second
# What else takes time, in simple keywords.
ENTRY, REFERENCE, ERROR, MESSAGE_CHARACTER, PATTERN_CHARACTER = 1 / 8, 5, 2, 1 / 500, 1 / 200
MAX_DEPTH = 200  # of keywords within keywords; far below Python's limit, where jsonschema's library of maps panics
SMALL_VALUE = 10_000  # characters of JSON
MAX_PATTERN_SECONDS = 1.0  # for all searches of one value
MAX_PATTERN_LENGTH = 10_000
MAX_BRANCH_LENGTH = 1_000  # between two "|": regex prepares the search of a long text in cubic time, without a limit
_SLOW_PATTERNS: set[str] = set()
_state = threading.local()


class TooExpensive(Exception):
    """The check of a value was stopped."""


def _spend(checks: float) -> None:
    """Count work for the value that this thread checks. Raises TooExpensive."""
    left = getattr(_state, "left", None)
    if left is not None:
        if left <= 0:
            raise TooExpensive(f"it needs more than {MAX_CHECKS:,} checks for one call")
        _state.left = left - checks


class _TimedPatterns:
    """The part of `re` that jsonschema uses, with a time limit."""

    @staticmethod
    def search(pattern: str, text: str) -> Any:
        import regex

        if len(pattern) > MAX_PATTERN_LENGTH:
            raise TooExpensive(f"its pattern has more than {MAX_PATTERN_LENGTH:,} characters")
        if max(map(len, pattern.split("|"))) > MAX_BRANCH_LENGTH:
            raise TooExpensive(f"an alternative of its pattern has more than {MAX_BRANCH_LENGTH:,} characters")
        slow = f"its pattern {pattern[:100]!r} takes more than {MAX_PATTERN_SECONDS:g} s"
        if pattern in _SLOW_PATTERNS:
            raise TooExpensive(slow)
        _spend(1 + len(pattern) * PATTERN_CHARACTER)
        is_counted = getattr(_state, "left", None) is not None
        began, left = time.thread_time(), _state.pattern_seconds if is_counted else MAX_PATTERN_SECONDS
        try:
            return regex.search(pattern, text, timeout=max(left, 0.001))
        except TimeoutError as error:
            if left > MAX_PATTERN_SECONDS / 2:
                _SLOW_PATTERNS.add(pattern)  # the next row with this tool need not wait
            raise TooExpensive(slow) from error
        finally:
            if is_counted:
                _state.pattern_seconds = left - (time.thread_time() - began)


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

    equal = _utils.equal

    def counted_equal(one: Any, two: Any) -> bool:
        _spend(ENTRY)
        return equal(one, two)

    for module in (_keywords, _legacy_keywords, _utils):
        module.re = _TimedPatterns
        module.equal = counted_equal  # of an enum, and by its own recursion
    _keywords.uniq = _is_unique


@cache
def limited_class(kind: Any) -> Any:
    """A jsonschema validator class that counts its work."""
    from jsonschema import validators

    _patch_jsonschema()
    return validators.extend(kind, {name: _counted(name, check) for name, check in kind.VALIDATORS.items()})


def _counted(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
    def counting(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        entries = len(value) if isinstance(value, list | dict) and name != "enum" else 0  # whose comparisons count
        if name.startswith("unevaluated") and isinstance(instance, list | dict):  # in quadratic time
            entries += len(instance) ** 2 // 16
        _spend(REFERENCE if name.endswith("Ref") or name == "$ref" else 1 + entries * ENTRY)
        depth = getattr(_state, "depth", 0)
        if depth >= MAX_DEPTH:
            raise TooExpensive(f"its keywords are nested deeper than {MAX_DEPTH} levels")
        _state.depth = depth + 1
        try:
            for error in check(validator, value, instance, schema) or ():
                _spend(ERROR + len(error.message) * MESSAGE_CHARACTER)
                yield error
        finally:
            _state.depth = depth

    return counting


class LimitedValidator:
    """A jsonschema validator whose checks end with TooExpensive once they have taken `MAX_CHECKS` steps."""

    def __init__(self, kind: Any, schema: Any, registry: Any):
        self.schema = without_dialects(schema)
        self._validator = limited_class(kind)(self.schema, registry=registry)
        self._refused: str | None = None

    def iter_errors(self, value: Any) -> Iterator[Any]:
        """The validation errors, as jsonschema yields them. Raises TooExpensive."""
        if self._refused:
            raise TooExpensive(self._refused)
        before = getattr(_state, "left", None)
        _state.left, _state.pattern_seconds, _state.depth = MAX_CHECKS, MAX_PATTERN_SECONDS, 0
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

    def is_valid(self, value: Any) -> bool:
        """Whether there is no validation error. Raises TooExpensive."""
        return next(iter(self.iter_errors(value)), None) is None


def without_dialects(schema: Any) -> Any:
    """The schema without "$schema": jsonschema would continue with a class of that draft, which has no limits."""
    if isinstance(schema, list):
        return [without_dialects(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("const", "enum", "default", "examples") else without_dialects(value)
        for key, value in schema.items()
        if not (key == "$schema" and isinstance(value, str))
    }
