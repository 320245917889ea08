"""Phrasebooks: the wording of a language and the requests of each tool, from a phrasing file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.synthetic.phrasing import (
    MAX_DRAWS,
    SLOT,
    SPLITS,
    Deck,
    Value,
    enumeration,
    expand,
    fill_arguments,
    read_json,
    sample,
)
from finetune.synthetic.phrasing_schema import check_phrasings


@dataclass
class Request:
    """One request that a tool call answers.

    core      the request as an imperative clause without a full stop, or None
    sentence  the request as a complete sentence, or None; either core or sentence is given
    result    the tool's result (JSON-serializable); answer: the assistant's text for it
    slots     the values of the request, by slot name
    """

    name: str
    arguments: dict[str, Any]
    core: str | None
    sentence: str | None
    result: Any
    answer: str
    slots: dict[str, Value] = field(default_factory=dict)
    reasoning: str = ""  # why this tool: the text beside the call


@dataclass
class Wording:
    """The part of a phrasing file that is independent of tools.

    frames   sentences around a clause, `{core}`
    joins    two clauses in one, `{first}` and `{second}`
    lists    separators of enumerations: [between elements, before the last]
    chat     [request that needs no tool, answer]; one of `openers` precedes the request
    decline  the answer to a request for a tool that is not declared
    both     two clauses for parallel calls in one, `{first}` and `{second}`
    """

    language: str
    system: str
    frames: dict[str, list[str]]
    joins: dict[str, list[str]]
    lists: dict[str, list[list[str]]]
    chat: dict[str, list[list[str]]]
    openers: dict[str, list[str]] = field(default_factory=dict)
    decline: str = ""
    both: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def sentence(self, text: str) -> str:
        """`text` capitalized, in English."""
        return text[:1].upper() + text[1:] if self.language == "en" else text


class Case:
    """One use of a tool: slot values, wording, argument template, result and answer."""

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
        """Raises UserError for a slot without a value."""
        known = {*self._values, *phrases, "items", *self.spec["arguments"]}
        for name in SLOT.findall(json.dumps([self.spec, phrases], ensure_ascii=False)):
            if name not in known:
                raise UserError(f"phrasings of {self.tool}: slot {{{name}}} has no value; add it to `values`")

    @property
    def answerable(self) -> bool:
        """Whether the phrasing file has a result of the tool."""
        return "result" in self.spec

    def request(self, split: str, *, core_only: bool = False, given: dict[str, Value] | None = None) -> Request:
        """A random request. core_only: without complete sentences; given: values of slots that are not drawn."""
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
        by_name = {name: Value("", value) for name, value in arguments.items()}
        result = fill_arguments(self.spec["result"], slots | by_name, items) if self.answerable else None
        answer = expand(self.rng.choice(self.spec["answer"]), slots, {}, self.rng) if self.answerable else ""
        core, sentence = (text, None) if kind == "core" else (None, text)
        reasons = self.spec.get("reasoning")
        reasoning = self.wording.sentence(expand(self.rng.choice(reasons), slots, {}, self.rng)) if reasons else ""
        return Request(self.tool, arguments, core, sentence, result, answer, slots, reasoning)

    def incomplete(self, split: str) -> tuple[str, str] | None:
        """(request that lacks a value, the question for it), None when the case has no such wording.

        The request is a clause like `core` or, with a mark at its end, a complete sentence.
        """
        if split not in self._missing:
            return None
        text, question = self._missing[split].deal()
        slots = self._draw(self._slots + self._each, split, {})
        phrases = self._phrases[split]
        return expand(text, slots, phrases, self.rng), expand(question, slots, phrases, self.rng)

    def _draw(self, names: Sequence[str], split: str, taken: dict[str, list]) -> dict[str, Value]:
        """A value for each slot, not among those `taken`; the slots listed in `unlike` differ from each other."""
        unlike = self.spec.get("unlike", [])
        slots: dict[str, Value] = {}
        for name in names:
            others = taken.get(name, []) + [slots[other].value for other in unlike if other in slots and name in unlike]
            for _ in range(MAX_DRAWS):
                slots[name] = sample(self._values[name], split, self.rng, self.wording.lists[split])
                if slots[name].value not in others:
                    break
            else:
                raise UserError(f"phrasings of {self.tool}: slot {name} has too few different values; add some")
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


@dataclass
class Phrasebook:
    """Everything that requests are made of.

    cases      tool name -> its cases; a repeated case is drawn more often
    sequences  [tool, tool that one request may also ask for, *slots whose value the second tool gets from the first]
    mix        split -> kind of row -> weight
    ambiguous  split -> (request, the assistant's question) pairs
    absent     tools for whose requests a row declares no tool
    conversation  (tool, its text parameter) that answers requests that need no other tool
    """

    wording: Wording
    cases: dict[str, list[Any]]
    sequences: Sequence[Sequence[str]]
    mix: dict[str, dict[str, float]]
    ambiguous: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    absent: Sequence[str] = ()
    conversation: tuple[str, str] | None = None


def read_phrasings(path: str | Path) -> dict[str, Any]:
    """A phrasing file, checked; with `extends`, its entries and tools in place of those of the file named there."""
    data = read_json(path)
    if isinstance(data, dict) and isinstance(base_name := data.get("extends"), str):
        base = read_json(Path(path).parent / base_name)
        check_phrasings(base, base_name)
        if isinstance(tools := data.get("tools", {}), dict):
            data["tools"] = {**base["tools"], **tools}
        data = {**base, **data}
    check_phrasings(data, path)
    return data


def load_phrasebook(path: str | Path, tools: Sequence[dict[str, Any]], rng: random.Random) -> Phrasebook:
    """The phrasebook of a phrasing file for these tools. Raises UserError for missing entries.

    Tools of the file without a schema become requests that no declared tool serves.
    """
    data = read_phrasings(path)
    names = [tool["function"]["name"] for tool in tools]
    fields = {name: data[name] for name in ("language", "system", "frames", "joins", "lists", "chat")}
    wording = Wording(**fields, decline=data.get("decline", ""))
    if missing := [name for name in names if name not in data["tools"]]:
        raise UserError(f"{path}: no phrasings for the tool {missing[0]}; add them, or omit --phrasings")
    cases = {
        name: [
            case for spec in specs
            for case in [Case(name, spec, data["common"], wording, rng)] * spec.get("weight", 1)
        ]
        for name, specs in data["tools"].items()
    }  # fmt: skip
    absent = [name for name in data["tools"] if name not in names] if wording.decline else []
    return Phrasebook(wording, cases, data["sequences"], data["mix"], absent=absent)
