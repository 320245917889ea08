"""What requests are made of: a language's wording, the cases of each tool, and phrasing files that hold both."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.synthetic.phrasing import (
    SLOT,
    SPLITS,
    VALUES,
    Deck,
    Value,
    enumeration,
    expand,
    fill_arguments,
    read_json,
    sample,
)


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


class Case:
    """One way to use a tool: slots with their values, wording, argument shape, result and answer."""

    def __init__(self, tool: str, spec: dict[str, Any], common: dict[str, Any], wording: Wording, rng: random.Random):
        self.tool, self.spec, self.wording, self.rng = tool, spec, wording, rng
        self._values = {**common.get("values", {}), **spec.get("values", {})}
        phrases = {**common.get("phrases", {}), **spec.get("phrases", {})}
        self._check(phrases)
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
        used = set(SLOT.findall(json.dumps(spec, ensure_ascii=False)))
        while more := {n for name in used if name in phrases for n in SLOT.findall(str(phrases[name]))} - used:
            used |= more
        self._slots = [name for name in self._values if name in used and name not in self._each]

    def _check(self, phrases: dict[str, Any]) -> None:
        """Raises UserError at the first slot without a value, and at a value of an unknown kind."""
        known = {*self._values, *phrases, "items", *self.spec["arguments"]}
        for name in SLOT.findall(json.dumps([self.spec, phrases], ensure_ascii=False)):
            if name not in known:
                raise UserError(f"phrasings of {self.tool}: the slot {{{name}}} has no value; add it to `values`")
        for name, value in self._values.items():
            if not isinstance(value, dict) or not set(value) & set(VALUES):
                raise UserError(f"phrasings of {self.tool}: the value {name!r} must be one of {', '.join(VALUES)}")
        for split in SPLITS:
            if not self.spec["core"][split]:
                raise UserError(f"phrasings of {self.tool}: `core` has no {split} wording; add one")

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


class Phrasebook:
    """What requests are made of: the language's wording, the cases of each tool, and which tools follow each other.

    cases      tool name -> its cases (a case may stand several times: it is then drawn more often)
    sequences  pairs of tools that one request may ask for, the second after the first; names of slots may follow
               whose value the second takes over from the first
    mix        split -> kind of row -> share
    ambiguous  split -> (request, the assistant's question) pairs
    """

    def __init__(
        self,
        wording: Wording,
        cases: dict[str, list[Any]],
        sequences: Sequence[Sequence[str]],
        mix: dict[str, dict[str, float]],
        ambiguous: dict[str, list[tuple[str, str]]] | None = None,
    ):
        self.wording, self.cases, self.sequences, self.mix = wording, cases, sequences, mix
        self.ambiguous = ambiguous or {split: [] for split in SPLITS}


def load_phrasebook(path: str | Path, tools: Sequence[dict[str, Any]], rng: random.Random) -> Phrasebook:
    """A phrasing file for these tools (canonical schemas). Raises UserError naming what is missing in it."""
    data = read_json(path)
    names = [tool["function"]["name"] for tool in tools]
    try:
        wording = Wording(**{name: data[name] for name in ("language", "system", "frames", "joins", "lists", "chat")})
        if unknown := [name for name in data["tools"] if name not in names]:
            raise UserError(f"{path}: phrasings for {unknown[0]}, which is not among the tool schemas; remove them")
        if bare := [name for name in names if name not in data["tools"]]:
            raise UserError(f"{path}: no phrasings for the tool {bare[0]}; add them, or leave --phrasings out")
        cases = {
            name: [
                case for spec in data["tools"][name]
                for case in [Case(name, spec, data["common"], wording, rng)] * spec.get("weight", 1)
            ]
            for name in names
        }  # fmt: skip
        return Phrasebook(wording, cases, data["sequences"], data["mix"])
    except KeyError as error:
        raise UserError(f"{path}: the field {error} is missing; see data/samples/README.md") from error
