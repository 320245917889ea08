"""The syntax of phrasing files: text templates, slot values and argument templates.

Templates contain `{slot}` (a value, or a text from another list) and `[a|b]` (one of the alternatives). Lists of
templates are {"train": [...], "heldout": [...]}; the splits share none, so that held-out requests have wordings that
training never saw. data/samples/README.md describes the fields.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError

SPLITS = ("train", "heldout")
MAX_TEXT, MAX_NESTING = 10_000, 10  # characters of one request, phrases within phrases
MAX_DRAWS = 1000  # of one value, until it differs from others
SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


class Deck:
    """Deals items in random order, reshuffling after all were dealt: each occurs about equally often."""

    def __init__(self, rng: random.Random, items: Sequence[Any]):
        if not items:
            raise ValueError("no items to deal")
        self._rng, self._items = rng, list(items)
        self._left: list[Any] = []

    def deal(self) -> Any:
        if not self._left:
            self._left = self._items[:]
            self._rng.shuffle(self._left)
        return self._left.pop()


@dataclass
class Value:
    """A slot's value: `text` in the request, `value` in the call's arguments."""

    text: str
    value: Any


def read_json(path: str | Path) -> Any:
    """The contents of a JSON file; raises UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); must be a JSON file") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fix it") from error


def sample(spec: dict[str, Any], split: str, rng: random.Random, lists: Sequence[Sequence[str]]) -> Value:
    """A random value of a slot.

    {"integer": [low, high]}            high included
    {"number": [low, high, step]}       high included; integral values become int
    {"choice": [...]}, or {"choice": {"text": value}}, or {"choice": {"train": [...], "heldout": [...]}}
    {"list": spec, "length": [low, high]}   distinct values in ascending order; the text enumerates them
    """
    if "integer" in spec:
        value = rng.randint(*spec["integer"])
        return Value(str(value), value)
    if "number" in spec:
        low, high, step = spec["number"]
        value = round(low + step * rng.randint(0, round((high - low) / step)), 6)
        value = int(value) if value == int(value) else value
        return Value(json.dumps(value), value)
    if "choice" in spec:
        choice = spec["choice"]
        choice = choice[split] if isinstance(choice, dict) and set(choice) == set(SPLITS) else choice
        if isinstance(choice, dict):
            text = rng.choice(list(choice))
            return Value(text, choice[text])
        value = rng.choice(choice)
        return Value(str(value), value)
    if "list" in spec:
        wanted = rng.randint(*spec["length"])
        values: list[Any] = []
        for _ in range(MAX_DRAWS):
            if len(values) >= wanted:
                break
            value = sample(spec["list"], split, rng, lists).value
            if value not in values:
                values.append(value)
        else:
            raise UserError(f"phrasings: the list {json.dumps(spec)} has too few different values; add some")
        with contextlib.suppress(TypeError):  # values of several types
            values.sort()
        return Value(enumeration([str(value) for value in values], rng.choice(lists)), values)
    raise ValueError(f"unknown kind of value: {spec}")


def enumeration(texts: Sequence[str], separators: Sequence[str]) -> str:
    """`1, 2 and 3` for the separators (", ", " and ")."""
    between, last = separators
    return last.join([between.join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def expand(text: str, slots: dict[str, Value], phrases: dict[str, Deck], rng: random.Random, depth: int = 0) -> str:
    """The text of a template: alternatives chosen, slots filled. Raises UserError for phrases that do not end."""
    while match := _CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return expand(phrases[name].deal(), slots, phrases, rng, depth + 1) if name in phrases else slots[name].text

    text = SLOT.sub(fill, text) if depth <= MAX_NESTING else text
    if depth > MAX_NESTING or len(text) > MAX_TEXT:
        raise UserError(f"phrasings: a request of more than {MAX_TEXT:,} characters, or phrases within themselves")
    return text


def fill_arguments(template: Any, slots: dict[str, Value], items: Sequence[dict[str, Value]] = ()) -> Any:
    """The arguments of an argument template.

    A string that is one slot becomes the slot's value; slots within a longer string are inserted as text. A key that is
    a slot of `items`, or a slot with a list, becomes one key per element.
    """
    if isinstance(template, dict):
        filled: dict[str, Any] = {}
        for key, value in template.items():
            for name, scope in _scopes(key, slots, items):
                filled[name] = fill_arguments(value, scope, items)
        return filled
    if isinstance(template, list):
        return [fill_arguments(value, slots, items) for value in template]
    if isinstance(template, str):
        if match := SLOT.fullmatch(template):
            return slots[match[1]].value
        return SLOT.sub(lambda match: str(slots[match[1]].value), template)
    return template


def _scopes(key: str, slots: dict[str, Value], items: Sequence[dict[str, Value]]) -> list[tuple[str, dict[str, Value]]]:
    """The keys that a template's key becomes, each with the slots for its value."""
    match = SLOT.fullmatch(key)
    if not match:
        return [(key, slots)]
    name = match[1]
    if items and name in items[0]:
        return [(str(item[name].value), slots | item) for item in items]
    value = slots[name].value
    return [(str(element), slots) for element in (value if isinstance(value, list) else [value])]
