"""Requests and the calls they ask for, out of phrasing files: wording, values and argument shapes are data.

A phrasing file is JSON. Texts may hold `{slot}` (a value, or another list of phrases) and `[a|b]` (either wording).
Lists of texts come as {"train": [...], "heldout": [...]}: the two never mix, so that held-out requests are worded in
ways that training never showed. data/samples/README.md describes the fields.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError

SPLITS = ("train", "heldout")
_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


class Deck:
    """Deals items in random order and shuffles again when all were dealt: each occurs about equally often."""

    def __init__(self, rng: random.Random, items: Sequence[Any]):
        if not items:
            raise ValueError("nothing to deal")
        self._rng, self._items, self._left = rng, list(items), []

    def deal(self) -> Any:
        if not self._left:
            self._left = self._items[:]
            self._rng.shuffle(self._left)
        return self._left.pop()


@dataclass
class Value:
    """A slot's value: `text` as the request words it, `value` as the call's arguments hold it."""

    text: str
    value: Any


@dataclass
class Request:
    """One thing that a user asks for.

    core      what is asked, as an imperative clause without a final stop; None when there is only `sentence`
    sentence  a whole sentence that needs no frame; None when there is a core
    name      the tool that does it
    arguments of the call
    result    what the tool gives back (JSON-able), answer: how the assistant puts that into words
    slots     the values drawn for it, by name
    """

    name: str
    arguments: dict[str, Any]
    core: str | None
    sentence: str | None
    result: Any
    answer: str
    slots: dict[str, Value] = field(default_factory=dict)


@dataclass
class Wording:
    """Everything in a phrasing file that concerns the language and not one tool.

    frames   sentences around a clause, `{core}`
    joins    two clauses in one, `{first}` and `{second}`
    lists    how enumerations are separated: [between, before the last]
    chat     requests that need no tool, with their answers; `openers` may go before them
    """

    language: str
    system: str
    frames: dict[str, list[str]]
    joins: dict[str, list[str]]
    lists: dict[str, list[list[str]]]
    chat: dict[str, list[list[str]]]
    openers: dict[str, list[str]] = field(default_factory=dict)

    def sentence(self, text: str) -> str:
        """With a capital letter, in a language that begins sentences with one."""
        return text[:1].upper() + text[1:] if self.language == "en" else text


def number_text(value: Any) -> str:
    """A number as JSON writes it."""
    return json.dumps(value)


def read_json(path: str | Path) -> Any:
    """A JSON file; raises UserError naming file and fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); mend it") from error


def sample(spec: dict[str, Any], split: str, rng: random.Random, lists: Sequence[Sequence[str]]) -> Value:
    """Draw a slot's value.

    {"integer": [low, high]}            both ends included
    {"number": [low, high, step]}       whole numbers without a decimal point
    {"choice": [...]}, or {"choice": {"wording": value}}, or {"choice": {"train": [...], "heldout": [...]}}
    {"list": spec, "length": [low, high]}   different values in rising order, worded as an enumeration
    """
    if "integer" in spec:
        value = rng.randint(*spec["integer"])
        return Value(str(value), value)
    if "number" in spec:
        low, high, step = spec["number"]
        value = round(low + step * rng.randint(0, round((high - low) / step)), 6)
        value = int(value) if value == int(value) else value
        return Value(number_text(value), value)
    if "choice" in spec:
        choice = spec["choice"]
        choice = choice[split] if isinstance(choice, dict) and set(choice) == set(SPLITS) else choice
        if isinstance(choice, dict):
            text = rng.choice(list(choice))
            return Value(text, choice[text])
        value = rng.choice(choice)
        return Value(str(value), value)
    if "list" in spec:
        wanted, values = rng.randint(*spec["length"]), []
        while len(values) < wanted:
            value = sample(spec["list"], split, rng, lists).value
            if value not in values:
                values.append(value)
        values.sort()
        return Value(enumeration([str(value) for value in values], rng.choice(lists)), values)
    raise ValueError(f"unknown kind of value {spec}")


def enumeration(texts: Sequence[str], separators: Sequence[str]) -> str:
    """`1, 2 and 3` for the separators `, ` and ` and `."""
    between, last = separators
    return last.join([between.join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def expand(text: str, slots: dict[str, Value], phrases: dict[str, Deck], rng: random.Random) -> str:
    """A template with all alternatives chosen and all slots filled."""
    while match := _CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]

    def fill(match: re.Match) -> str:
        name = match[1]
        if name in phrases:
            return expand(phrases[name].deal(), slots, phrases, rng)
        if name not in slots:
            raise KeyError(name)
        return slots[name].text

    return _SLOT.sub(fill, text)


def fill_arguments(template: Any, slots: dict[str, Value], items: Sequence[dict[str, Value]] = ()) -> Any:
    """An argument template with values in place of `{slot}`.

    A string that is one slot becomes the value with its type; slots inside a longer string become text. A key that is
    a slot of the items, or of a list, is repeated for each of them.
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
        if match := _SLOT.fullmatch(template):
            return slots[match[1]].value
        return _SLOT.sub(lambda match: str(slots[match[1]].value), template)
    return template


def _scopes(key: str, slots: dict[str, Value], items: Sequence[dict[str, Value]]) -> list[tuple[str, dict]]:
    match = _SLOT.fullmatch(key)
    if not match:
        return [(key, slots)]
    name = match[1]
    if items and name in items[0]:
        return [(str(item[name].value), slots | item) for item in items]
    value = slots[name].value
    if isinstance(value, list):
        return [(str(element), slots) for element in value]
    return [(str(value), slots)]


class Case:
    """One way to use a tool: slots with their values, wording, argument shape, result and answer."""

    def __init__(self, tool: str, spec: dict[str, Any], common: dict[str, Any], wording: Wording, rng: random.Random):
        self.tool, self.spec, self.wording, self.rng = tool, spec, wording, rng
        self._values = {**common.get("values", {}), **spec.get("values", {})}
        phrases = {**common.get("phrases", {}), **spec.get("phrases", {})}
        self._phrases = {split: {name: Deck(rng, texts[split]) for name, texts in phrases.items()} for split in SPLITS}
        self._cores = {split: Deck(rng, spec["core"][split]) for split in SPLITS}
        self._texts = {
            split: Deck(rng, [("core", text) for text in spec["core"][split]]
                        + [("sentence", text) for text in spec.get("sentence", {}).get(split, [])])
            for split in SPLITS
        }  # fmt: skip
        missing = spec.get("missing", {})
        self._missing = {split: Deck(rng, missing[split]) for split in SPLITS if missing.get(split)}
        self._each = spec.get("each", [])
        used = set(_SLOT.findall(json.dumps(spec, ensure_ascii=False)))
        while more := {n for name in used if name in phrases for n in _SLOT.findall(str(phrases[name]))} - used:
            used |= more
        self._slots = [name for name in self._values if name in used and name not in self._each]

    @property
    def answerable(self) -> bool:
        """Whether the phrasing file says what the tool gives back."""
        return "result" in self.spec

    def request(self, split: str, *, core_only: bool = False, given: dict[str, Value] | None = None) -> Request:
        """A request of this case; `core_only` for clauses that will be joined with others.

        `given` values take the place of drawn ones where the case has such slots.
        """
        kind, text = ("core", self._cores[split].deal()) if core_only else self._texts[split].deal()
        slots = self._draw(self._slots, split, {})
        slots |= {name: value for name, value in (given or {}).items() if name in slots}
        items = self._items(split) if self._each else []
        if items:
            form = self.rng.choice(self.spec["item"][split])
            texts = [expand(form, slots | item, self._phrases[split], self.rng) for item in items]
            slots["items"] = Value(enumeration(texts, self.rng.choice(self.wording.lists[split])), None)
        text = expand(text, slots, self._phrases[split], self.rng)
        arguments = fill_arguments(self.spec["arguments"], slots, items)
        whole = {name: Value("", value) for name, value in arguments.items()}
        result = fill_arguments(self.spec["result"], slots | whole, items) if self.answerable else None
        answer = expand(self.rng.choice(self.spec["answer"]), slots, {}, self.rng) if self.answerable else ""
        core, sentence = (text, None) if kind == "core" else (None, text)
        return Request(self.tool, arguments, core, sentence, result, answer, slots)

    def incomplete(self, split: str) -> tuple[str, str] | None:
        """(request that lacks a value, the assistant's question), or None when this case has no such wording."""
        if split not in self._missing:
            return None
        text, question = self._missing[split].deal()
        slots = self._draw(self._slots + self._each, split, {})
        return expand(text, slots, {}, self.rng), expand(question, slots, {}, self.rng)

    def _draw(self, names: Sequence[str], split: str, taken: dict[str, list]) -> dict[str, Value]:
        """A value for each slot; slots listed as `unlike` differ from each other, all differ from those `taken`."""
        unlike = self.spec.get("unlike", [])
        slots: dict[str, Value] = {}
        for name in names:
            others = taken.get(name, []) + [slots[other].value for other in unlike if other in slots and name in unlike]
            for _ in range(1000):
                slots[name] = sample(self._values[name], split, self.rng, self.wording.lists[split])
                if slots[name].value not in others:
                    break
            else:
                raise ValueError(f"{self.tool}: no value left for slot {name}")
        return slots

    def _items(self, split: str) -> list[dict[str, Value]]:
        taken: dict[str, list] = {}
        items = []
        for _ in range(self.rng.randint(*self.spec["count"])):
            item = self._draw(self._each, split, taken)
            for name in self.spec["distinct"]:
                taken.setdefault(name, []).append(item[name].value)
            items.append(item)
        return items
