"""Values that a JSON Schema accepts, drawn with a seeded generator and readable in a request.

Types, enums, ranges, formats, patterns, nested objects, arrays, maps and local `$ref`s are followed; what words a
string gets is told by its property's name, by its description's own examples, or by the schema's `examples`. Rules
that no construction follows (`not`, `if`, `contains` ...) are met by drawing again until the schema accepts.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from referencing.exceptions import Unresolvable

from finetune.errors import UserError
from finetune.json_schema import validator_of

MAX_DEPTH = 6  # of recursive schemas: below it only what is required is filled in
LONGEST_TEXT = 10_000  # characters: nobody types more into a request
MOST_VALUES = 5_000  # in one call's arguments
TRIES = 300  # draws before a schema is given up
OPTIONAL_SHARE = 0.35  # how often an optional property is given
# "e.g. Seoul, Paris" and "for example: a, b" in a description: the schema's author says what values look like.
_EXAMPLES = re.compile(r"(?:e\.g\.,?|for example:?|for instance:?|such as|예:|예를 들어)\s+([^.;)\n]+)", re.IGNORECASE)
_BRANCHES = ("anyOf", "oneOf")


def humanised(name: str) -> str:
    """`top_k` -> `top k`, `startDate` -> `start date`; names with signs of their own stay."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_\-]*", name):
        return name
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", re.sub(r"[_\-]+", " ", name)).strip()
    return words if words.isupper() else words.lower()


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """UserErrors of the block begin with `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class SchemaValues:
    """Draws values for one schema; `words` is the `values` part of a file in finetune/phrasings."""

    def __init__(self, schema: dict[str, Any], words: dict[str, list[str]], rng: random.Random):
        self.root, self.words, self.rng = schema, words, rng
        self._validator, self._broken = validator_of(json.dumps(schema))

    def draw(self, what: str) -> dict[str, Any]:
        """An object that the whole schema accepts; raises UserError naming `what` when none is found."""
        with named(what):
            return self._draw()

    def _draw(self) -> dict[str, Any]:
        if self._broken:
            raise UserError(f"its parameters are no JSON Schema ({self._broken})")
        reason = "no value"
        for _ in range(TRIES):
            self._drawn = 0
            try:
                value = self._value(self.root, "", 0)
                error = next(self._validator.iter_errors(value), None)
            except RecursionError as endless:
                raise UserError("its schema demands objects inside objects without end") from endless
            except Unresolvable as missing:  # below `not`, `if` and their like, which only the validator reads
                raise UserError(
                    _not_in_it(f"#{missing.ref}" if missing.ref[:1] in ("", "/") else missing.ref)
                ) from None
            except OverflowError as error:
                raise UserError(f"its schema holds a number that is too large to draw from ({error})") from error
            if error is None and isinstance(value, dict):
                return value
            reason = error.message if error is not None else "it describes no object"
        raise UserError(f"no arguments found that fit its schema ({reason[:200]}); add `examples` to it")

    def resolved(self, schema: Any) -> dict[str, Any]:
        """The schema with `$ref`, `allOf` and one branch of `anyOf`/`oneOf` merged in."""
        schema = schema if isinstance(schema, dict) else {}
        for _ in range(20):
            if isinstance(schema.get("$ref"), str):
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = _merged(self._pointed(schema["$ref"]), rest)
            elif schema.get("allOf"):
                parts = [self.resolved(part) for part in schema["allOf"]]
                schema = {key: value for key, value in schema.items() if key != "allOf"}
                for part in parts:
                    schema = _merged(schema, part)
            elif name := next((name for name in _BRANCHES if schema.get(name)), None):
                # null is a branch for "leave it out", which optional properties do anyway
                branches = [part for part in schema[name] if part != {"type": "null"}] or schema[name]
                rest = {key: value for key, value in schema.items() if key != name}
                schema = _merged(rest, self.rng.choice(branches) if isinstance(branches[0], dict) else {})
            else:
                return schema
        return {}

    def _pointed(self, reference: str) -> dict[str, Any]:
        target: Any = self.root
        for part in reference.split("/")[1:] if reference.startswith("#/") else ["?"] * (reference != "#"):
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                raise UserError(_not_in_it(reference))
        return target if isinstance(target, dict) else {}

    def _value(self, schema: Any, name: str, depth: int) -> Any:
        self._drawn += 1
        if self._drawn > MOST_VALUES:
            raise UserError(f"its schema wants more than {MOST_VALUES:,} values in one call, which no request states")
        schema = self.resolved(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self.rng.choice(schema["enum"])
        kind = self._kind(schema)
        if kind != "object" and isinstance(schema.get("examples"), list) and schema["examples"]:
            return self.rng.choice(schema["examples"])
        return getattr(self, f"_{kind}")(schema, name, depth)

    def _kind(self, schema: dict[str, Any]) -> str:
        kinds = schema.get("type")
        if isinstance(kinds, list):
            kinds = self.rng.choice([kind for kind in kinds if kind != "null"] or ["null"])
        if kinds:
            return kinds
        if any(key in schema for key in ("properties", "additionalProperties", "patternProperties", "required")):
            return "object"
        if any(key in schema for key in ("items", "prefixItems", "minItems")):
            return "array"
        if any(key in schema for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")):
            return "number"
        return "string"

    def _null(self, schema: dict[str, Any], name: str, depth: int) -> None:
        return None

    def _boolean(self, schema: dict[str, Any], name: str, depth: int) -> bool:
        return self.rng.random() < 0.5

    def _integer(self, schema: dict[str, Any], name: str, depth: int) -> int:
        low, high = _bounds(schema, 1)
        step = schema.get("multipleOf", 1)
        if float(step) != int(step):  # the whole multiples of 2.5 are the multiples of 5
            step = next((whole for k in range(1, 1001) if (whole := step * k) == int(whole)), 1)
        step = int(step)
        first, last = math.ceil(low / step), math.floor(high / step)
        return self.rng.randint(first, max(first, last)) * step

    def _number(self, schema: dict[str, Any], name: str, depth: int) -> float | int:
        low, high = _bounds(schema, 0)
        step = schema.get("multipleOf") or (0.5 if high - low > 4 else (high - low) / 20 or 1)
        first, last = math.ceil(low / step), math.floor(high / step)
        value = min(max(round(self.rng.randint(first, max(first, last)) * step, 6), low), high)
        return int(value) if value == int(value) else value

    def _string(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if "pattern" in schema:
            return min((_from_pattern(schema["pattern"], self.rng) for _ in range(8)),
                       key=lambda text: (not low <= len(text) <= high, len(text)))  # fmt: skip
        if low > LONGEST_TEXT:
            raise UserError(
                f"its schema wants a text of at least {low:,} characters for {name or 'a value'}, which no request "
                "states; add `examples` beside it, or leave the tool out"
            )
        text = self.rng.choice(self._pool(schema, name))
        while len(text) < low:
            text = f"{text} {self.rng.choice(self.words['word'])}"
        if len(text) > high:
            fitting = [word for word in self.words["word"] + list("abcdefgh") if low <= len(word) <= high]
            text = self.rng.choice(fitting) if fitting else text[: int(high)].ljust(low, "x")
        return text

    def _pool(self, schema: dict[str, Any], name: str) -> list[str]:
        """Texts for a property: by its format, by its description's examples, else by a word in its name."""
        if schema.get("format") in self.words:
            return self.words[schema["format"]]
        if match := _EXAMPLES.search(str(schema.get("description", ""))):
            parts = re.split(r",\s*(?:or|and)?\s*|\s+or\s+|\s+and\s+", match[1])
            if examples := [part.strip(" '\"`") for part in parts if 0 < len(part.strip(" '\"`")) <= 40]:
                return examples
        for word in reversed(humanised(name).lower().split()):
            if pool := self.words.get(word) or self.words.get(word.removesuffix("s")):
                return pool
        return self.words["word"]

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        values = [self._value(part, name, depth + 1) for part in schema.get("prefixItems", [])]
        items = schema.get("items", {})
        low = max(schema.get("minItems", 1 if depth < MAX_DEPTH else 0), 0)
        high = min(schema.get("maxItems", max(low, 3)), max(low, 4))
        wanted = self.rng.randint(min(low, high), high) if items is not False else len(values)
        for _ in range(TRIES):
            if len(values) >= wanted:
                break
            value = self._value(items, name, depth + 1)
            # repeated elements make an odd request even where the schema allows them
            if value not in values or (not schema.get("uniqueItems") and self.rng.random() < 0.2):
                values.append(value)
        return values

    def _object(self, schema: dict[str, Any], name: str, depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        share = OPTIONAL_SHARE if depth < MAX_DEPTH else 0
        least = schema.get("minProperties", 0)
        optional = [key for key in properties if key not in required and self._useful(properties[key])]
        given = {key for key in optional if self.rng.random() < share}
        while len(given) + len(required) < least and len(given) < len(optional):
            given.add(next(key for key in optional if key not in given))
        if not given and not required and optional and depth < MAX_DEPTH:
            given.add(self.rng.choice(optional))
        while given and len(given) + len(required) > schema.get("maxProperties", math.inf):
            given.remove(max(given))
        keys = [key for key in properties if key in required or key in given]
        keys += [key for key in required if key not in properties]
        result = {key: self._value(properties.get(key, {}), key, depth + 1) for key in keys}
        result.update(self._extra(schema, result, least, name, depth))
        return result

    @staticmethod
    def _useful(schema: Any) -> bool:
        return schema is not False and not (isinstance(schema, dict) and schema.get("type") == "null")

    def _extra(self, schema: dict, result: dict, least: int, name: str, depth: int) -> Iterator[tuple[str, Any]]:
        """Entries of a map: keys of `patternProperties` or numbers, values of `additionalProperties`."""
        patterns = schema.get("patternProperties") or {}
        additional = schema.get("additionalProperties")
        is_map = not schema.get("properties") and (isinstance(additional, dict) or patterns) and depth < MAX_DEPTH
        wanted = max(least - len(result), self.rng.randint(1, 2) if is_map else 0)
        wanted = min(wanted, schema.get("maxProperties", math.inf) - len(result))
        made: set[str] = set(result)
        for _ in range(TRIES):
            if wanted <= 0:
                return
            if patterns:
                pattern, inner = self.rng.choice(list(patterns.items()))
                key = _from_pattern(pattern, self.rng)
            else:
                inner, key_schema = additional, schema.get("propertyNames")
                key = self._value(key_schema, name, depth) if key_schema else str(self.rng.randint(1, 99))
            if key not in made and isinstance(key, str):
                made.add(key)
                wanted -= 1
                yield key, self._value(inner, key, depth + 1)


def _not_in_it(reference: str) -> str:
    return f"its schema refers to {reference}, which is not found in it; write that part in"


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both schemas at once: keys of the second win, properties and required are joined."""
    result = {**first, **second}
    if isinstance(first.get("properties"), dict) and isinstance(second.get("properties"), dict):
        result["properties"] = {**first["properties"], **second["properties"]}
    if isinstance(first.get("required"), list) and isinstance(second.get("required"), list):
        result["required"] = list(dict.fromkeys(first["required"] + second["required"]))
    return result


def _bounds(schema: dict[str, Any], nudge: float) -> tuple[float, float]:
    """Lowest and highest value to draw; an open end lies some tens away. `nudge` steps off exclusive bounds."""
    ends = [schema.get("minimum"), schema.get("maximum")]
    # draft 4 wrote exclusiveMinimum: true beside minimum
    for place, (name, sign) in enumerate((("exclusiveMinimum", 1), ("exclusiveMaximum", -1))):
        limit = schema.get(name)
        if limit is True:
            limit = ends[place]
        if isinstance(limit, (int, float)) and not isinstance(limit, bool):
            inside = (math.floor(limit) + 1 if sign > 0 else math.ceil(limit) - 1) if nudge else limit + sign * 1e-3
            ends[place] = inside if ends[place] is None else (max if sign > 0 else min)(inside, ends[place])
    low, high = ends
    if low is None:
        low = 1 if high is None or high >= 1 else high - 50
    if high is None:
        high = max(low, 0) + 50
    return low, high


def _from_pattern(pattern: str, rng: random.Random) -> str:
    try:
        import rstr
    except ImportError as error:
        raise UserError("a schema has a `pattern`; install the generator for it: pip install rstr") from error
    try:
        return rstr.Rstr(rng).xeger(pattern)
    except (re.error, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"no text fits the pattern {pattern!r} ({error}); add `examples` beside it") from error
