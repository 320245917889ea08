"""The JSON Schema of phrasing files, as data/samples/README.md describes them."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
PAIRS = {"type": "array", "items": {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 2}}
RANGE = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}


def _split(wordings: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"train": wordings, "heldout": wordings}, "required": ["train", "heldout"]}


VALUES = {"type": "object", "additionalProperties": {"$ref": "#/$defs/value"}}
PHRASES = {"type": "object", "additionalProperties": _split(TEXTS | {"minItems": 1})}
CHOICES = {"type": ["array", "object"], "minItems": 1, "minProperties": 1}
VALUE = {
    "type": "object",
    "properties": {
        "integer": RANGE,
        "number": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        "choice": CHOICES | {"properties": {"train": CHOICES, "heldout": CHOICES}},
        "list": {"$ref": "#/$defs/value"},
        "length": RANGE,
    },
    "oneOf": [{"required": [kind]} for kind in ("integer", "number", "choice")] + [{"required": ["list", "length"]}],
}
CASE = {
    "type": "object",
    "properties": {
        "core": _split(TEXTS | {"minItems": 1}),
        "sentence": _split(TEXTS),
        "missing": _split(PAIRS),
        "item": _split(TEXTS | {"minItems": 1}),
        "arguments": {"type": "object"},
        "values": VALUES,
        "phrases": PHRASES,
        "answer": TEXTS | {"minItems": 1},
        "reasoning": TEXTS | {"minItems": 1},
        "each": TEXTS,
        "distinct": TEXTS,
        "unlike": TEXTS,
        "count": RANGE,
        "weight": {"type": "integer", "minimum": 1, "maximum": 1000},
    },
    "required": ["core", "arguments"],
    "dependentRequired": {"result": ["answer"], "each": ["item", "distinct", "count"]},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "extends": TEXT,
        "language": TEXT,
        "system": TEXT,
        "decline": TEXT,
        "frames": _split(TEXTS | {"minItems": 1}),
        "joins": _split(TEXTS | {"minItems": 1}),
        "lists": _split(PAIRS | {"minItems": 1}),
        "chat": _split(PAIRS),
        "mix": _split({"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}),
        "sequences": {"type": "array", "items": TEXTS | {"minItems": 2}},
        "common": {"type": "object", "properties": {"values": VALUES, "phrases": PHRASES}},
        "tools": {"type": "object", "additionalProperties": {"type": "array", "items": CASE}},
    },
    "required": ["language", "system", "frames", "joins", "lists", "chat", "mix", "sequences", "common", "tools"],
    "$defs": {"value": VALUE},
}


def check_phrasings(data: Any, source: object) -> None:
    """Raises UserError that names the first entry of a phrasing file with another type, or that is missing."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if error := best_match(Draft202012Validator(SCHEMA).iter_errors(data)):
        where = ": ".join([str(source), "/".join(map(str, error.absolute_path))]).rstrip(": ")
        raise UserError(f"{where}: {error.message[:200]}; see data/samples/README.md")
