"""Requests for tools without a phrasing file: general wording around the names and values of their schemas."""

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
from finetune.synthetic.schema_values import SchemaValues, errors_prefixed, humanised

FOLDER = Path(__file__).parent / "phrasings"
LANGUAGES = ("en", "ko")
MAX_AMBIGUOUS_PAIRS = 200  # of tools
_LONG_WORD = re.compile(r"\w{5,}")


class SchemaCase:
    """The requests of one tool in general wording; `words` is a file of finetune/synthetic/phrasings.

    reasons  whether a call has a text beside it: why this tool
    """

    answerable = True

    def __init__(
        self, tool: dict[str, Any], words: dict[str, Any], wording: Wording, rng: random.Random, reasons: bool = False
    ):
        function = tool["function"]
        self.reasons = words["reasons"] if reasons else []
        self.name, self.words, self.wording, self.rng = function["name"], words, wording, rng
        self.values = SchemaValues(function.get("parameters") or {"type": "object"}, words["values"], rng)
        self.task = task_of(function, words)
        self._decks = {
            (split, name): Deck(rng, words[name][split])
            for split in SPLITS for name in ("with_arguments", "with_text", "without_arguments", "pairs", "incomplete")
        }  # fmt: skip

    def request(self, split: str, *, core_only: bool = False, given: dict[str, Value] | None = None) -> Request:
        """A random request that names every argument and its value; always a core, `given` is ignored."""
        arguments = self.values.draw(self.name)
        core = self._core(arguments, split)
        request = Request(self.name, arguments, core, None, {"status": "ok"}, self.words["done"])
        if self.reasons:
            reason = self._fill(self.rng.choice(self.reasons), task=self.task, tool=self.name)
            request.reasoning = self.wording.sentence(reason)
        return request

    def incomplete(self, split: str) -> tuple[str, str] | None:
        """(request without one required argument, the question for it), None when no argument is required."""
        with errors_prefixed(f"tool {self.name}"):
            required = self.values.resolved(self.values.root).get("required", [])
        if not required:
            return None
        arguments = self.values.draw(self.name)
        missing = self.rng.choice(required)
        rest = {key: value for key, value in arguments.items() if key != missing}
        text = self._fill(self._decks[split, "incomplete"].deal(), core=self._core(rest, split))
        return self.wording.sentence(text), self._fill(self.words["question"], label=humanised(missing))

    def _core(self, arguments: dict[str, Any], split: str) -> str:
        slots = {"task": self.task, "tool": self.name}
        if not arguments:
            return self._fill(self._decks[split, "without_arguments"].deal(), **slots)
        texts = [value for value in arguments.values() if isinstance(value, str)]
        # A single text needs no label: "search the web for: flood levels".
        if len(arguments) == 1 and texts and len(self.values.root.get("properties", {})) == 1:
            return self._fill(self._decks[split, "with_text"].deal(), **slots, text=texts[0])
        pair = self._decks[split, "pairs"].deal()
        pairs = enumeration(self._pairs(arguments, pair), self.wording.lists[split][0])
        return self._fill(self._decks[split, "with_arguments"].deal(), **slots, arguments=pairs)

    def _fill(self, template: str, **slots: str) -> str:
        return expand(template, {name: Value(text, text) for name, text in slots.items()}, {}, self.rng)

    def _pairs(self, arguments: dict[str, Any], pair: str) -> list[str]:
        return [self._fill(pair, label=humanised(key), value=self._text(value)) for key, value in arguments.items()]

    def _text(self, value: Any, inside: bool = False) -> str:
        """A value's text in the request: several words quoted, objects and nested lists in brackets."""
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
    """What the tool does as a clause: the first sentence of its description, or its name.

    English descriptions in the third person ("Searches ...") become imperative ("search ...").
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
    """A word and the verbs it may be the third person of: searches, search."""
    return [word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"]


def general_phrasebook(
    tools: Sequence[dict[str, Any]], language: str, rng: random.Random, *, reasons: bool = False
) -> Phrasebook:
    """A phrasebook for any tools in the wording of finetune/synthetic/phrasings/<language>.json."""
    words = read_json(FOLDER / f"{language}.json")
    chat = {split: [pair for pair in words["chat"][split] if not _mentions(pair[0], tools)] for split in SPLITS}
    fields = {name: words[name] for name in ("language", "system", "frames", "joins", "lists", "openers")}
    wording = Wording(**fields, chat=chat)
    cases = {tool["function"]["name"]: [SchemaCase(tool, words, wording, rng, reasons)] for tool in tools}
    pairs = list(itertools.permutations(cases, 2))
    rng.shuffle(pairs)
    ambiguous = {
        split: [
            (expand(text, _tasks(cases, pair), {}, rng), expand(words["which"], _tasks(cases, pair), {}, rng))
            for pair in pairs[:MAX_AMBIGUOUS_PAIRS] for text in words["ambiguous"][split]
        ]
        for split in SPLITS
    }  # fmt: skip
    mix = dict.fromkeys(SPLITS, words["mix"])
    return Phrasebook(wording, cases, pairs, mix, ambiguous)


def _tasks(cases: dict[str, list[SchemaCase]], pair: Sequence[str]) -> dict[str, Value]:
    return {slot: Value(cases[name][0].task, None) for slot, name in zip(("first", "second"), pair, strict=True)}


def _mentions(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a request that should need no tool shares a long word with the name or description of a tool."""
    described = " ".join(
        f"{humanised(t['function']['name'])} {t['function'].get('description', '')}" for t in tools
    ).lower()
    return any(word in described for word in _LONG_WORD.findall(re.sub(r"[\[\]|]", " ", text.lower())))
