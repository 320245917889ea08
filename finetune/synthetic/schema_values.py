"""Readable random values that a JSON Schema accepts.

Follows types, enums, ranges, formats, patterns, nested objects, arrays, maps and local `$ref`s. Texts come from the
schema's `examples`, the examples in its description, or word lists chosen by format and property name. Rules that are
not followed (`not`, `if`, `contains` ...) are met by redrawing until the schema accepts.

Not jsf (Lorem ipsum texts) or hypothesis-jsonschema (random characters, fails with Hypothesis 6.170): a request needs
values that a person would write.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from referencing.exceptions import Unresolvable

from finetune.errors import UserError
from finetune.json_schema import validator_of
from finetune.json_schema.limits import TooExpensive
from finetune.synthetic.descriptions import told_numbers, told_range
from finetune.synthetic.schema_texts import humanised, texts_for

MAX_DEPTH = 4  # of recursive schemas: deeper objects get their required properties, or one that holds no others
MAX_CHARACTERS = 10_000  # of one text
MAX_VALUES = 5_000  # in one call's arguments
MAX_REFERENCES = 20  # followed in a row
MAX_TRIES = 300
MAX_PATTERN_STEPS = 20_000  # of drawing one text that fits a pattern
OPTIONAL_SHARE = 0.35  # of optional properties that are given
# Words in names of numbers that are measured: other numbers are counts, ids and pages, and drawn whole.
_MEASURED = re.compile(
    r"\b(?:price|amount|cost|rate|temperature|weight|height|width|length|latitude|longitude|lat|lon|lng|distance|radius|"
    r"score|ratio|percent|percentage|threshold|factor|balance|salary|fee|budget|value|speed|confidence|probability|volume)"
    r"s?\b"
)
# Words of names for the two ends of one span.
_LIMITS = {
    "min": "max", "minimum": "maximum", "start": "end", "from": "to", "lower": "upper", "since": "until",
    "after": "before", "gte": "lte", "check in": "check out", "departure": "return", "pickup": "dropoff",
}  # fmt: skip
_DATED = re.compile(r"\d[\d\s:/.T-]{3,}")  # the beginning of dates and times
_HAS_DEFAULT = re.compile(r"\bdefaults?\b|\bif omitted\b|기본값", re.IGNORECASE)
# The type of a schema without `type`, by the keywords it has.
_TYPE_KEYWORDS = {
    "object": {"properties", "additionalProperties", "patternProperties", "required"},
    "array": {"items", "prefixItems", "minItems"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}


@contextlib.contextmanager
def schema_errors(tool: str) -> Iterator[None]:
    """Errors of the block, also those of a schema that cannot be followed, become UserErrors that name the tool."""
    try:
        yield
    except UserError as error:
        raise UserError(f"tool {tool}: {error}") from error
    except (RecursionError, Unresolvable, OverflowError, TooExpensive) as error:  # also below `not`, `if` and others
        what = f"its schema cannot be followed ({type(error).__name__}: {error})"
        raise UserError(f"tool {tool}: {what}; simplify it or remove the tool") from error


class SchemaValues:
    """Draws values for one schema; words and about: as in `texts_for`."""

    def __init__(self, schema: dict[str, Any], words: dict[str, Any], rng: random.Random, about: str = ""):
        self.words, self.rng, self.about = words, rng, about
        self._reads_descriptions = True
        self._position: dict[str, int] = {}  # of a text in its list, in which dates ascend
        self._texts: dict[Any, list[str]] = {}
        self._validator, self._invalid = validator_of(json.dumps(schema))
        # Without the keywords that are not valid: a minimum that is a text, a list of required names that is an object.
        self.root = {} if self._invalid else self._validator.schema
        parts = list(_parts(self.root))
        self.declared = {
            name for part in parts if isinstance(part.get("properties"), dict) for name in part["properties"]
        }
        enums = [part["enum"] for part in parts if isinstance(part.get("enum"), list)]
        self.reserved = self.declared | {value for values in enums for value in values if isinstance(value, str)}

    def draw(self, tool: str) -> dict[str, Any]:
        """An object that the schema accepts; raises UserError naming `tool` when none is found."""
        with schema_errors(tool):
            if self._invalid:
                raise UserError(f"its parameters are not a valid JSON Schema ({self._invalid})")
            return self._draw()

    def _draw(self) -> dict[str, Any]:
        reason = "it does not describe an object"
        for attempt in range(MAX_TRIES):
            self._drawn = 0
            self._reads_descriptions = attempt < MAX_TRIES // 2  # they may contradict the schema
            value = self._value(self.root, "", 0)
            error = next(self._validator.iter_errors(value), None)
            if error is None and isinstance(value, dict):
                return value
            if error is not None:
                reason = error.message[:200]
        if examples := [one for one in self._examples(self.root) if self._validator.is_valid(one)]:
            return self.rng.choice(examples)
        raise UserError(f"no arguments found that fit its schema ({reason}); add `examples` to it")

    @staticmethod
    def _examples(schema: dict[str, Any]) -> list[dict[str, Any]]:
        found = schema.get("examples")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def can_be_asked_for(self, arguments: dict[str, Any], key: str) -> bool:
        """Whether the call is incomplete without this argument, and its value is not the only possible one."""
        rest = {name: value for name, value in arguments.items() if name != key}
        if self._validator.is_valid(rest) or self._validator.is_valid({**rest, key: None}):
            return False
        schema = self.resolved(self.resolved(self.root).get("properties", {}).get(key))
        if "default" in schema or _HAS_DEFAULT.search(str(schema.get("description"))):
            return False
        return "const" not in schema and not ("enum" in schema and len(schema["enum"]) == 1)

    def resolved(self, schema: Any) -> dict[str, Any]:
        """The schema merged with its `$ref`, its `allOf` and one branch of its `anyOf` or `oneOf`."""
        schema = schema if isinstance(schema, dict) else {}
        for _ in range(MAX_REFERENCES):
            if isinstance(schema.get("$ref"), str):
                schema = _merged(self._referenced(schema["$ref"]), _without(schema, "$ref"))
            elif schema.get("allOf"):
                parts = [self.resolved(part) for part in schema["allOf"]]
                schema = _without(schema, "allOf")
                for part in parts:
                    schema = _merged(schema, part)
            elif name := next((name for name in ("anyOf", "oneOf") if schema.get(name)), None):
                # null means that the property may be omitted, which optional properties are anyway
                branches = [part for part in schema[name] if part != {"type": "null"}] or schema[name]
                branch = self.rng.choice(branches)
                schema = _merged(_without(schema, name), branch if isinstance(branch, dict) else {})
            else:
                return schema
        return {}

    def _referenced(self, reference: str) -> dict[str, Any]:
        """The part of the schema that a local `$ref` points to."""
        target: Any = self.root
        for part in reference.split("/")[1:] if reference.startswith("#/") else ["?"] * (reference != "#"):
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                raise UserError(f"its schema refers to {reference}, which it does not contain; add that part")
        return target if isinstance(target, dict) else {}

    def _value(self, schema: Any, name: str, depth: int) -> Any:
        self._drawn += 1
        if self._drawn > MAX_VALUES:
            raise UserError(f"its schema requires more than {MAX_VALUES:,} values in one call, too many for a request")
        if depth >= MAX_DEPTH and isinstance(schema, dict) and {"type": "null"} in schema.get("anyOf", ()):
            return None  # the end of a list whose elements contain the next one
        schema = self.resolved(schema)
        if not self._reads_descriptions:
            schema = _without(schema, "description")
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return self.rng.choice([value for value in schema["enum"] if value is not None] or [None])
        kind = self._type(schema)
        if kind != "object" and isinstance(schema.get("examples"), list) and schema["examples"]:
            return self.rng.choice(schema["examples"])
        if kind == "object" and not schema.get("properties") and (examples := self._examples(schema)):
            return self.rng.choice(examples)
        match kind:
            case "null":
                return None
            case "boolean":
                return self.rng.random() < 0.5
            case "integer" | "number" if numbers := told_numbers(str(schema.get("description"))):
                return self.rng.choice(numbers)
            case "integer":
                return self._integer(schema)
            case "number":
                return self._number(schema, name)
            case "string":
                return self._string(schema, name)
            case "array":
                return self._array(schema, name, depth)
        return self._object(schema, name, depth)

    def _type(self, schema: dict[str, Any]) -> str:
        kinds = schema.get("type")
        if isinstance(kinds, list):
            kinds = self.rng.choice([kind for kind in kinds if kind != "null"] or ["null"])
        return kinds or next((kind for kind, keywords in _TYPE_KEYWORDS.items() if keywords & schema.keys()), "string")

    def _integer(self, schema: dict[str, Any]) -> int:
        low, high = _bounds(schema, integer=True)
        step = Fraction(str(schema.get("multipleOf", 1))).numerator  # whole multiples of 2.5 are multiples of 5
        return self._multiple(step, low, high)

    def _number(self, schema: dict[str, Any], name: str) -> float | int:
        low, high = _bounds(schema, integer=False)
        shown = [schema.get(key) for key in ("default", "minimum", "maximum")]
        is_measured = _MEASURED.search(humanised(name).lower()) or any(isinstance(n, float) and n % 1 for n in shown)
        step = schema.get("multipleOf") or ((0.5 if is_measured else 1) if high - low > 4 else (high - low) / 20 or 1)
        value = min(max(round(self._multiple(step, low, high), 6), low), high)
        return int(value) if value == int(value) else value

    def _multiple(self, step: float, low: float, high: float) -> Any:
        first, last = math.ceil(low / step), math.floor(high / step)
        return self.rng.randint(first, max(first, last)) * step

    def _string(self, schema: dict[str, Any], name: str) -> str:
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        key = (name, str(schema.get("format")), str(schema.get("description")))
        if key not in self._texts:
            self._texts[key] = texts_for(schema, name, self.words, about=self.about, reserved=self.reserved)
            self._position |= {text: at for at, text in enumerate(self._texts[key])}
        all_texts = self._texts[key]
        texts = [text for text in all_texts if low <= len(text) <= high]
        if "pattern" in schema:
            # By jsonschema, which limits the time of a pattern and reads those of ECMA 262.
            fits = validator_of(json.dumps({"pattern": schema["pattern"]}))[0].is_valid
            if fitting := [text for text in texts if fits(text)]:
                return self.rng.choice(fitting)
            drawn = [_from_pattern(schema["pattern"], self.rng) for _ in range(8)]
            return min(drawn, key=lambda text: (not low <= len(text) <= high, _odd_characters(text), len(text)))
        if low > MAX_CHARACTERS:
            raise UserError(f"its schema requires {low:,} characters for {name or 'a value'}; add `examples` beside it")
        text = self.rng.choice(texts or all_texts)
        while len(text) < low:
            text = f"{text} {self.rng.choice(self.words['word'])}"
        if len(text) > high:
            fitting = [word for word in self.words["word"] + list("abcdefgh") if low <= len(word) <= high]
            text = self.rng.choice(fitting) if fitting else text[: int(high)].ljust(low, "x")
        return text

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        values = [self._value(part, name, depth + 1) for part in schema.get("prefixItems", [])]
        items = schema.get("items", {})
        if isinstance(items, dict) and "description" in schema:  # often the only one: "Doors, such as front, rear"
            items = {"description": schema["description"], **items}
        low = max(schema.get("minItems", 1 if depth <= MAX_DEPTH else 0), 0)
        high = min(schema.get("maxItems", max(low, 3)), max(low, 4))
        wanted = self.rng.randint(min(low, high), high) if items is not False else len(values)
        for _ in range(20 * wanted):
            if len(values) >= wanted:
                break
            value = self._value(items, name, depth + 1)
            # Few repeated numbers and no other repeated elements, where there are enough: they make an odd request.
            may_repeat = not schema.get("uniqueItems") and (isinstance(value, int | float) or len(values) < low)
            if value not in values or (may_repeat and self.rng.random() < 0.2):
                values.append(value)
        return values

    def _object(self, schema: dict[str, Any], name: str, depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        share = OPTIONAL_SHARE if depth < MAX_DEPTH else 0
        minimum, maximum = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
        optional = [key for key in properties if key not in required and _is_useful(properties[key])]
        given = {key for key in optional if self.rng.random() < share}
        while len(given) + len(required) < minimum and len(given) < len(optional):
            given.add(next(key for key in optional if key not in given))
        if depth >= MAX_DEPTH:
            kinds = {key: self._type(self.resolved(properties[key])) for key in optional}
            optional = [key for key, kind in kinds.items() if kind not in ("object", "array")]
        if not given and not required and optional:
            given.add(self.rng.choice(optional))
        while given and len(given) + len(required) > maximum:
            given.remove(max(given))
        keys = [key for key in properties if key in required or key in given]
        keys += [key for key in required if key not in properties]
        result = {key: self._value(properties.get(key, {}), key, depth + 1) for key in keys}
        self._order_limits(result)
        # An object of any content gets some; the parameters of a tool that declares none do not.
        values = schema.get("additionalProperties", {})
        is_free = depth > 0 if values in ({}, True) else isinstance(values, dict)
        is_map = not properties and (is_free or schema.get("patternProperties"))
        extra = max(minimum - len(result), self.rng.randint(1, 2) if is_map and depth < MAX_DEPTH else 0)
        self._add_entries(result, schema, len(result) + min(extra, maximum - len(result)), name, depth)
        return result

    def _order_limits(self, values: dict[str, Any]) -> None:
        """Exchange a lower limit that is above its upper one, such as `min_price` 9 and `max_price` 5, or two dates."""
        names = {humanised(key).lower(): key for key in values}
        for name, key in names.items():
            for low, high in _LIMITS.items():
                other = names.get(re.sub(rf"\b{low}\b", high, name), key)
                ends = [values[key], values[other]]
                if all(isinstance(end, str) and _DATED.match(end) for end in ends):
                    ends = [self._position.get(end, 0) for end in ends]
                if other != key and all(isinstance(end, int | float) for end in ends) and ends[0] > ends[1]:
                    values[key], values[other] = values[other], values[key]

    def _add_entries(self, result: dict[str, Any], schema: dict[str, Any], size: float, name: str, depth: int) -> None:
        """Fill a map up to `size`: keys by `patternProperties`, by `propertyNames`, or words."""
        patterns = schema.get("patternProperties")
        for _ in range(MAX_TRIES):
            if len(result) >= size:
                return
            if patterns:
                pattern, inner = self.rng.choice(list(patterns.items()))
                key = _from_pattern(pattern, self.rng)
            else:
                inner, names = schema.get("additionalProperties"), schema.get("propertyNames")
                key = self._value(names, name, depth) if names else self.rng.choice(self.words["word"])
            if isinstance(key, str) and key not in result:
                result[key] = self._value(inner, key, depth + 1)


def _is_useful(schema: Any) -> bool:
    """Whether a property's schema allows more than null."""
    return schema is not False and not (isinstance(schema, dict) and schema.get("type") == "null")


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects in a schema, its own included."""
    if isinstance(schema, dict):
        yield schema
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        yield from _parts(part)


def _odd_characters(text: str) -> int:
    """The number of characters that people rarely write in a value."""
    return len(re.sub(r"[\w .:/@+-]", "", text))


def _without(schema: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both schemas: keys of the second win, properties and required are joined."""
    result = {**first, **second}
    if isinstance(first.get("properties"), dict) and isinstance(second.get("properties"), dict):
        result["properties"] = {**first["properties"], **second["properties"]}
    if isinstance(first.get("required"), list) and isinstance(second.get("required"), list):
        result["required"] = list(dict.fromkeys(first["required"] + second["required"]))
    return result


def _bounds(schema: dict[str, Any], *, integer: bool) -> tuple[float, float]:
    """Lowest and highest value to draw, also those of the description; an open end is some tens away."""
    low, high = schema.get("minimum"), schema.get("maximum")
    told_low, told_high = told_range(str(schema.get("description")))
    # The exclusive bounds of draft 4 are booleans: there values on the bound are drawn and rejected by the validator.
    if not isinstance(above := schema.get("exclusiveMinimum", True), bool):
        inside = math.floor(above) + 1 if integer else above + 1e-3
        low = inside if low is None else max(inside, low)
    if not isinstance(below := schema.get("exclusiveMaximum", True), bool):
        inside = math.ceil(below) - 1 if integer else below - 1e-3
        high = inside if high is None else min(inside, high)
    if low is None and told_low is not None and (high is None or told_low <= high):
        low = math.ceil(told_low) if integer else told_low
    if high is None and told_high is not None and (low is None or low <= told_high):
        high = math.floor(told_high) if integer else told_high
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

    class Drawing(rstr.Rstr):
        """Nested repetition (`((a*)*)*`) would multiply to billions of characters."""

        steps = 0

        def _handle_state(self, state: Any) -> Any:
            self.steps += 1
            if self.steps > MAX_PATTERN_STEPS:
                raise ValueError(f"it takes more than {MAX_PATTERN_STEPS:,} steps")
            return super()._handle_state(state)

    try:
        return Drawing(rng).xeger(pattern)
    except (re.error, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"no text fits the pattern {pattern!r} ({error}); add `examples` beside it") from error
