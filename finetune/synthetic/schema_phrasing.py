"""Requests for tools without a phrasing file: general wording around the names and values of their schemas.

A request names the tool or what it does ("explicit"), has a value in place of the words for it ("inline": "sort the
contents of notes.txt"), uses another verb ("synonym"), or only says what is needed ("need").
"""

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
from finetune.synthetic.schema_texts import GENERIC_WORDS, humanised
from finetune.synthetic.schema_values import SchemaValues, schema_errors

FOLDER = Path(__file__).parent / "phrasings"
LANGUAGES = ("en", "ko")
MAX_AMBIGUOUS_PAIRS = 200  # of tools
MAX_TRIES = 10  # to draw arguments without two equal texts
_BEFORE_NOUN = r"\b(?:an?|the|any|one|your|this) (?:(?:new|given|specified|specific|certain|single) )?"
# Not before "or", or before a second noun ("a file system").
_AFTER_NOUN = r"\b(?=$|[,.;)]| (?:of|in|on|at|to|into|from|with|by|for|as|that|which|line|using|given)\b)"
ANNOTATIONS = {"type", "title", "description", "default", "examples"}  # keywords that restrict nothing further
_CONVERSATION = re.compile(r"\b(chat|conversation|small talk|greetings?)\b", re.IGNORECASE)
_SPOKEN = {"message", "text", "query", "question", "prompt", "input", "content"}  # what such a tool gets
_RUNS_ANYTHING = {"bash", "shell", "terminal", "python", "code", "command", "commands", "sql", "computer", "browser"}
_LONG_WORD = re.compile(r"\w{5,}")
_STOP_WORDS = {"the", "and", "for", "with", "from", "into", "this", "that", "all", "its", "any", "one", "your", "tool"}
_DETERMINERS = {"a", "an", "the", "all", "any", "one", "your", "this", "these", "multiple"}
MAX_TASK_LENGTH = 200  # longer first sentences are no request
# "This tool allows you to search": the rest says what to do.
_PREAMBLE = re.compile(
    r"^(?:useful (?:for )?when you (?:need|want) to |"
    r"this (?:tool|function|endpoint|api) (?:will |can (?:be used to )?|is used to |(?:allows|lets) you (?:to )?)?)",
    re.IGNORECASE,
)
# The end of a sentence; not of "e.g. x", "z. B.", "U.S. x" or "approx. x".
_SENTENCE_END = re.compile(r"(?<!\b\w)[.!?]\s+(?![a-z\s])|[.!?]\s*$|。|\n")


class SchemaCase:
    """The requests of one tool in general wording; `words` is a file of finetune/synthetic/phrasings.

    reasons  whether a call has a text beside it: why this tool
    """

    answerable = True

    def __init__(
        self, function: dict[str, Any], words: dict[str, Any], wording: Wording, rng: random.Random, reasons: bool
    ):
        self.reasons = words["reasons"] if reasons else []
        self.name, self.words, self.wording, self.rng = function["name"], words, wording, rng
        about = f"{humanised(self.name)} {function.get('description') or ''}"
        self.values = SchemaValues(function.get("parameters") or {"type": "object"}, words["values"], rng, about)
        self.task = task_of(function, words)
        self._decks = {
            (split, name): Deck(rng, words[name][split])
            for split in SPLITS for name in ("with_arguments", "with_text", "without_arguments", "pairs", "incomplete")
        }  # fmt: skip
        verb, _, self._object = self.task.partition(" ")
        self._verbs = next((group for group in words["verb_groups"] if self._object and verb in group["verbs"]), None)
        styles = [self._explicit, *([self._inline] if wording.language == "en" else [])]
        if self._verbs:
            styles += [self._synonym, *([self._need] if "needs" in self._verbs else [])]
        self._styles = {split: Deck(rng, styles) for split in SPLITS}

    def request(self, split: str, *, core_only: bool = False, given: dict[str, Value] | None = None) -> Request:
        """A random request that tells every argument's value. core_only: in the explicit style; `given` is ignored."""
        arguments = self._distinct_arguments()
        style = self._explicit if core_only else self._styles[split].deal()
        core, sentence = style(arguments, split)
        done = self.words["done"]
        return Request(self.name, arguments, core, sentence, {"status": "ok"}, done, reasoning=self.reason())

    def reason(self) -> str:
        """Why this tool is called; "" where that is not written."""
        if not self.reasons:
            return ""
        return self.wording.sentence(self._fill(self.rng.choice(self.reasons), task=self.task, tool=self.name))

    def incomplete(self, split: str) -> tuple[str, str] | None:
        """(request without one required argument, the question for it), None when the call needs no argument."""
        for _ in range(MAX_TRIES):
            arguments = self._distinct_arguments()
            with schema_errors(self.name):
                required = [key for key in arguments if self.values.can_be_asked_for(arguments, key)]
            if required:
                break
        else:
            return None
        missing = self.rng.choice(required)
        rest = {key: value for key, value in arguments.items() if key != missing}
        text = self._fill(self._decks[split, "incomplete"].deal(), core=self._core(rest, split, self.task))
        return self.wording.sentence(text), self._fill(self.words["question"], label=humanised(missing))

    def words_of_task(self) -> tuple[set[str], set[str]]:
        """(the verb and those of the same meaning, the words for what the tool works on)."""
        verbs = {""}
        text = self.task
        if self.wording.language == "en":
            verb, _, text = self.task.partition(" ")
            verbs = set(self._verbs["verbs"]) if self._verbs else {verb}
        words = {word.removesuffix("s") for word in re.findall(r"\w+", text.lower())}
        return verbs, {word for word in words if len(word) > 2 or not word.isascii()} - _STOP_WORDS

    def _distinct_arguments(self) -> dict[str, Any]:
        """Arguments without two equal texts, such as a file that is copied to itself, where that can be avoided."""
        for _ in range(MAX_TRIES):
            arguments = self.values.draw(self.name)
            texts = [value for value in arguments.values() if isinstance(value, str)]
            if len(set(texts)) == len(texts):
                break
        return arguments

    # A style: arguments -> (clause, None) or (None, sentence).

    def _explicit(self, arguments: dict[str, Any], split: str) -> tuple[str | None, str | None]:
        return self._core(arguments, split, self.task), None

    def _inline(self, arguments: dict[str, Any], split: str) -> tuple[str | None, str | None]:
        task, rest = self.task, dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                task, replaced = with_value(task, key, self._text(value), keeps_noun=not isinstance(value, str))
                if replaced:
                    del rest[key]
        return (task if not rest else self._core(rest, split, task)), None

    def _synonym(self, arguments: dict[str, Any], split: str) -> tuple[str | None, str | None]:
        task = self._fill(self.rng.choice(self._verbs["synonyms"][split]), object=self._object)
        return self._core(arguments, split, task), None

    def _need(self, arguments: dict[str, Any], split: str) -> tuple[str | None, str | None]:
        need = self._fill(self.rng.choice(self._verbs["needs"][split]), object=self._object)
        pairs = f" ({self._arguments(arguments, split)})" if arguments else ""
        return None, self.wording.sentence(f"{need}{pairs}.")

    def _core(self, arguments: dict[str, Any], split: str, task: str) -> str:
        slots = {"task": task, "tool": self.name}
        if not arguments:
            return self._fill(self._decks[split, "without_arguments"].deal(), **slots)
        texts = [value for value in arguments.values() if isinstance(value, str)]
        # A single text needs no label: "search the web for: flood levels".
        if len(arguments) == 1 and texts and len(self.values.root.get("properties", {})) == 1:
            return self._fill(self._decks[split, "with_text"].deal(), **slots, text=texts[0])
        pairs, templates = self._arguments(arguments, split), self._decks[split, "with_arguments"]
        template = templates.deal()
        while task != self.task and "{task}" not in template:  # this task may hold a value
            template = templates.deal()
        return self._fill(template, **slots, arguments=pairs)

    def _arguments(self, arguments: dict[str, Any], split: str) -> str:
        """`city Oslo and days 3`"""
        return enumeration(self._pairs(arguments, self._decks[split, "pairs"].deal()), self.wording.lists[split][0])

    def _fill(self, template: str, **slots: str) -> str:
        return expand(template, {name: Value(text, text) for name, text in slots.items()}, {}, self.rng)

    def _pairs(self, arguments: dict[str, Any], pair: str) -> list[str]:
        return [self._fill(pair, label=self._label(key), value=self._text(value)) for key, value in arguments.items()]

    def _label(self, key: str) -> str:
        """A parameter's name in words; another key of an object as it is."""
        return humanised(key) if key in self.values.declared else self._text(key)

    def _text(self, value: Any, inside: bool = False) -> str:
        """A value's text in the request: several words quoted, objects and nested lists in brackets."""
        if isinstance(value, dict):
            text = ", ".join(f"{self._label(key)} {self._text(inner, True)}" for key, inner in value.items())
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
    description = _SENTENCE_END.split(str(function.get("description") or "").strip())[0]
    description = description.partition(": ")[0].rstrip(".!。:")
    if not description or len(description) > MAX_TASK_LENGTH:
        description = humanised(function["name"])
    if words["language"] != "en":
        return description
    description = _PREAMBLE.sub("", description)
    first, _, rest = description.partition(" ")
    first, comma, _ = first.partition(",")  # "create, update or delete a label"
    verb = next((form for form in _stems(first.lower()) if form in words["verbs"]), None)
    if verb is None and rest.partition(" ")[0].lower() in _DETERMINERS and not first.endswith("s"):
        verb = first.lower()  # "click an element"
    if verb is None:
        noun = description if first[1:] != first[1:].lower() else description[:1].lower() + description[1:]
        return words["noun_task"].replace("{description}", noun)
    return f"{verb}{comma} {rest}".strip()


def with_value(task: str, key: str, value: str, *, keeps_noun: bool = False) -> tuple[str, bool]:
    """The task with a value in place of the words for it: `sort the contents of a file` with `file_name`.

    Behind the verb the noun stays (`delete contract E-5126`), because it tells the tool from others; keeps_noun:
    everywhere, as for numbers (`update scale 3 of a deployment`).
    """
    for word in humanised(key).lower().split():
        found = re.search(_BEFORE_NOUN + re.escape(word) + _AFTER_NOUN, task)
        if word not in GENERIC_WORDS and found:
            noun = "" if " " in task[: found.start()].strip() and not keeps_noun else f"{word} "
            return task[: found.start()] + noun + value + task[found.end() :], True
    return task, False


def own_descriptions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools' functions without the sentences with which all their descriptions begin."""
    functions = [tool["function"] for tool in tools]
    texts = sorted(str(function.get("description") or "").strip() for function in functions)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(texts[0], texts[-1], strict=False))
    common = "".join(character for character, _ in same)
    end = max(common.rfind(mark) for mark in (". ", ": ", "| ", "\n"))
    if len(functions) == 1 or end < 0:
        return functions
    return [{**function, "description": str(function["description"]).strip()[end + 1 :]} for function in functions]


def talks(function: dict[str, Any]) -> str | None:
    """The only parameter, any text, of a tool for conversation ("Chat without external tools"); None for others."""
    about = humanised(function["name"]) + " " + str(function.get("description") or "")
    properties = (function.get("parameters") or {}).get("properties")
    if not _CONVERSATION.search(about) or not isinstance(properties, dict) or len(properties) != 1:
        return None
    ((name, schema),) = properties.items()
    is_any_text = isinstance(schema, dict) and schema.get("type") == "string" and schema.keys() <= ANNOTATIONS
    return name if is_any_text and humanised(name).rpartition(" ")[2] in _SPOKEN else None


def _stems(word: str) -> list[str]:
    """A word and the verbs it may be the third person of: searches, search."""
    return [word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"]


def general_phrasebook(
    tools: Sequence[dict[str, Any]], language: str, rng: random.Random, *, reasons: bool = False
) -> Phrasebook:
    """A phrasebook for any tools in the wording of finetune/synthetic/phrasings/<language>.json."""
    words = read_json(FOLDER / f"{language}.json")
    chat = {split: [pair for pair in words["chat"][split] if not _mentions(pair[0], tools)] for split in SPLITS}
    fields = ("language", "system", "frames", "joins", "lists", "openers", "decline", "both")
    wording = Wording(**{name: words[name] for name in fields}, chat=chat)
    functions = own_descriptions(tools)
    cases = {function["name"]: [SchemaCase(function, words, wording, rng, reasons)] for function in functions}
    conversation = next(((f["name"], parameter) for f in functions if (parameter := talks(f))), None)
    pairs = [pair for pair in itertools.permutations(cases, 2) if conversation is None or conversation[0] not in pair]
    rng.shuffle(pairs)
    ambiguous = {
        split: [
            (expand(text, _tasks(cases, pair), {}, rng), expand(words["which"], _tasks(cases, pair), {}, rng))
            for pair in pairs[:MAX_AMBIGUOUS_PAIRS] for text in words["ambiguous"][split]
        ]
        for split in SPLITS
    }  # fmt: skip
    tasks = {name: case.words_of_task() for name, (case,) in cases.items()}
    general = {function["name"] for function in functions if _runs_anything(function)}
    absent = [name for name in cases if _is_alone(name, tasks) and not general - {name}]
    absent = [] if conversation or len(tools) == 1 else absent
    mix = {kind: part for kind, part in words["mix"].items() if absent or kind != "absent"}
    return Phrasebook(wording, cases, pairs, dict.fromkeys(SPLITS, mix), ambiguous, absent, conversation)


def _tasks(cases: dict[str, list[SchemaCase]], pair: Sequence[str]) -> dict[str, Value]:
    return {slot: Value(cases[name][0].task, None) for slot, name in zip(("first", "second"), pair, strict=True)}


def _is_alone(name: str, words: dict[str, tuple[set[str], set[str]]]) -> bool:
    """Whether no other tool does the same with half of what this one works on, so that nothing serves its requests.

    words  `words_of_task` of each tool
    """
    verbs, objects = words[name]
    return not any(
        verbs & other_verbs and 2 * len(objects & other_objects) >= len(objects)
        for other, (other_verbs, other_objects) in words.items()
        if other != name
    )


def _runs_anything(function: dict[str, Any]) -> bool:
    """Whether the tool may do what others do: it runs commands, programs or queries, or uses a screen."""
    properties = (function.get("parameters") or {}).get("properties")
    names = [function["name"], *(properties if isinstance(properties, dict) else ())]
    return any(not _RUNS_ANYTHING.isdisjoint(humanised(name).split()) for name in names)


def _mentions(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a request that should need no tool shares a long word with the name or description of a tool."""
    described = " ".join(
        f"{humanised(t['function']['name'])} {t['function'].get('description', '')}" for t in tools
    ).lower()
    return any(word in described for word in _LONG_WORD.findall(re.sub(r"[\[\]|]", " ", text.lower())))
