"""Requests for tools that nobody wrote phrasings for: general wording around the schema's own words and values."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.synthetic.phrasebook import Phrasebook, Request, Wording
from finetune.synthetic.phrasing import SPLITS, Deck, Value, enumeration, expand, read_json
from finetune.synthetic.schema_values import SchemaValues, humanised, named

FOLDER = Path(__file__).parent / "phrasings"
LANGUAGES = ("en", "ko")
_WORD = re.compile(r"\w{3,}")


class SchemaCase:
    """The requests of one tool, in the general wording of `words` (a file of finetune/phrasings)."""

    answerable = True

    def __init__(self, tool: dict[str, Any], words: dict[str, Any], wording: Wording, rng: random.Random):
        function = tool["function"]
        self.name, self.words, self.wording, self.rng = function["name"], words, wording, rng
        self.schema = function.get("parameters") or {"type": "object"}
        self.values = SchemaValues(self.schema, words["values"], rng)
        self.task = task_of(function, words)
        self._decks = {
            (split, name): Deck(rng, words[name][split])
            for split in SPLITS for name in ("with_arguments", "with_text", "without_arguments", "pairs", "incomplete")
        }  # fmt: skip

    def request(self, split: str, *, core_only: bool = False, given: dict[str, Value] | None = None) -> Request:
        """A request whose text names every argument and its value. It always has a core; nothing is taken over."""
        arguments = self.values.draw(f"tool {self.name}")
        core = self._core(arguments, split)
        return Request(self.name, arguments, core, None, {"status": "ok"}, self.words["done"])

    def incomplete(self, split: str) -> tuple[str, str] | None:
        """A request without one of the required arguments, and the question for it; None if nothing is required."""
        with named(f"tool {self.name}"):
            required = self.values.resolved(self.schema).get("required", [])
        if not required:
            return None
        arguments = self.values.draw(f"tool {self.name}")
        missing = self.rng.choice(required)
        rest = {key: value for key, value in arguments.items() if key != missing}
        text = self._fill(self._decks[split, "incomplete"].deal(), core=self._core(rest, split))
        return self.wording.sentence(text), self._fill(self.words["question"], label=humanised(missing))

    def _core(self, arguments: dict[str, Any], split: str) -> str:
        slots = {"task": self.task, "tool": self.name}
        if not arguments:
            return self._fill(self._decks[split, "without_arguments"].deal(), **slots)
        texts = [value for value in arguments.values() if isinstance(value, str)]
        # One text needs no label: "search the web for: flood levels". Several could be mixed up.
        if len(arguments) == 1 and texts and len(self.schema.get("properties", {})) == 1:
            return self._fill(self._decks[split, "with_text"].deal(), **slots, text=texts[0])
        pair = self._decks[split, "pairs"].deal()
        pairs = enumeration(self._pairs(arguments, pair), self.wording.lists[split][0])
        return self._fill(self._decks[split, "with_arguments"].deal(), **slots, arguments=pairs)

    def _fill(self, template: str, **slots: str) -> str:
        return expand(template, {name: Value(text, text) for name, text in slots.items()}, {}, self.rng)

    def _pairs(self, arguments: dict[str, Any], pair: str) -> list[str]:
        return [self._fill(pair, label=humanised(key), value=self._text(value)) for key, value in arguments.items()]

    def _text(self, value: Any, inside: bool = False) -> str:
        """A value as the request words it: texts of several words quoted, objects and lists of them in brackets."""
        if isinstance(value, dict):
            text = ", ".join(f"{humanised(key)} {self._text(inner, True)}" for key, inner in value.items())
            return f"({text})"
        if isinstance(value, list):
            texts = [self._text(inner, True) for inner in value]
            if inside or not texts:
                return f"[{', '.join(texts)}]"
            return enumeration(texts, self.wording.lists["train"][0])
        if isinstance(value, str):
            return value if re.fullmatch(r"[\w.\-/:@+]+", value) else json.dumps(value, ensure_ascii=False)
        return json.dumps(value)


def task_of(function: dict[str, Any], words: dict[str, Any]) -> str:
    """What the tool does, as a clause: its description's first sentence, or its name if there is none.

    English descriptions often say "Searches ..." where a request says "search ...".
    """
    description = re.split(r"(?<=[.!?。])\s|\n", str(function.get("description") or "").strip())[0]
    description = description.partition(": ")[0].rstrip(".!。:")
    if not description:
        return humanised(function["name"])
    if words["language"] != "en":
        return description
    first, _, rest = description.partition(" ")
    verb = next((form for form in _stems(first.lower()) if form in words["verbs"]), None)
    if verb is None:
        noun = description if first[1:] != first[1:].lower() else description[:1].lower() + description[1:]
        return words["noun_task"].replace("{description}", noun)
    return f"{verb} {rest}".strip()


def _stems(word: str) -> list[str]:
    """A word and what it may be the third person of: searches, search."""
    return [word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"]


def general_phrasebook(tools: Sequence[dict[str, Any]], language: str, rng: random.Random) -> Phrasebook:
    """Phrasebook for any tools in the wording of finetune/phrasings/<language>.json."""
    words = read_json(FOLDER / f"{language}.json")
    chat = {split: [pair for pair in words["chat"][split] if not _concerns(pair[0], tools)] for split in SPLITS}
    fields = {name: words[name] for name in ("language", "system", "frames", "joins", "lists", "openers")}
    wording = Wording(**fields, chat=chat)
    cases = {tool["function"]["name"]: [SchemaCase(tool, words, wording, rng)] for tool in tools}
    pairs = list(itertools.permutations(cases, 2))
    rng.shuffle(pairs)
    ambiguous = {
        split: [
            (expand(text, _tasks(cases, pair), {}, rng), expand(words["which"], _tasks(cases, pair), {}, rng))
            for pair in pairs[:200] for text in words["ambiguous"][split]
        ]
        for split in SPLITS
    }  # fmt: skip
    mix = dict.fromkeys(SPLITS, words["mix"])
    return Phrasebook(wording, cases, pairs, mix, ambiguous)


def _tasks(cases: dict[str, list[SchemaCase]], pair: Sequence[str]) -> dict[str, Value]:
    return {slot: Value(cases[name][0].task, None) for slot, name in zip(("first", "second"), pair, strict=True)}


def _concerns(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a request that should need no tool shares a long word with one of the tools."""
    told = " ".join(f"{humanised(t['function']['name'])} {t['function'].get('description', '')}" for t in tools).lower()
    return any(word in told for word in _WORD.findall(re.sub(r"[\[\]|]", " ", text.lower())) if len(word) > 4)
