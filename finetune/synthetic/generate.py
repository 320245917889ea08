"""Training and held-out rows made from tool schemas and phrasings: seeded, and the same on every machine.

Only `random.Random` draws, rows come out in one fixed order, and every call is checked against its tool's JSON Schema
before it is written.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import json_lines, write_together
from finetune.json_schema import validator_of
from finetune.reading.tool_schemas import load_tools_file
from finetune.synthetic.phrasebook import Phrasebook, Request, load_phrasebook
from finetune.synthetic.phrasing import SPLITS, Deck, Value, expand
from finetune.synthetic.schema_phrasing import general_phrasebook

KINDS = ("call", "answered", "steps", "followup", "chat", "missing", "ambiguous")
# What evaluation may know of rows whose right answer is text.
CATEGORIES = {"chat": "irrelevant", "missing": "missing_parameter", "ambiguous": "missing_parameter"}
_TRIES = 200  # draws before a wording is declared too poor for the number of rows asked for


class NoNewRequest(UserError):
    """The wordings of a kind of row are used up."""


class Writer:
    """Makes the rows of one split; requests never repeat within it."""

    def __init__(self, book: Phrasebook, tools: Sequence[dict[str, Any]], split: str, rng: random.Random):
        self.book, self.split, self.rng = book, split, rng
        self.tools = json.dumps(list(tools), ensure_ascii=False, separators=(",", ":"))
        self.seen: set[str] = set()
        self._frames = Deck(rng, book.wording.frames[split])
        self._joins = Deck(rng, book.wording.joins[split])
        names = list(book.cases)
        self._names = {kind: Deck(rng, names) for kind in ("call", "followup")}
        answerable = [name for name in names if any(case.answerable for case in book.cases[name])]
        if answerable:
            self._names["answered"] = Deck(rng, answerable)
        self._cases = {name: Deck(rng, cases) for name, cases in book.cases.items()}
        self._answerable = {
            name: Deck(rng, [case for case in book.cases[name] if case.answerable]) for name in answerable
        }
        cases = [case for name in names for case in dict.fromkeys(book.cases[name])]
        self._incomplete = [case for case in cases if case.incomplete(split) is not None]
        self._sequences = [pair for pair in book.sequences if pair[0] in self._answerable]
        self._decks: dict[str, Deck] = {}

    def possible(self, kind: str) -> bool:
        """Whether these tools and phrasings can make rows of the kind at all."""
        needs = {
            "answered": self._answerable, "followup": self._answerable, "steps": self._sequences,
            "chat": self.book.wording.chat[self.split], "missing": self._incomplete,
            "ambiguous": self.book.ambiguous[self.split],
        }  # fmt: skip
        return bool(needs.get(kind, True))

    def row(self, kind: str) -> dict[str, Any]:
        """One row of the kind; raises NoNewRequest when none can be found."""
        make: Callable[..., list[dict[str, Any]]] = getattr(self, f"_{kind}")
        # Dealt once: a tool with few wordings is tried again, not passed over for the next one.
        subject = (self._names[kind].deal(),) if kind in self._names else ()
        for _ in range(_TRIES):
            messages = make(*subject)
            requests = [message["content"] for message in messages if message["role"] == "user"]
            if not any(text in self.seen for text in requests):
                self.seen.update(requests)
                break
        else:
            raise NoNewRequest(
                f"no new request of kind {' for '.join((repr(kind), *subject))} after {_TRIES} tries; "
                "ask for fewer rows or add phrasings and values"
            )
        system = [{"role": "system", "content": self.book.wording.system}] if self.book.wording.system else []
        category = {"category": CATEGORIES[kind]} if kind in CATEGORIES else {}
        return {"messages": system + messages, "tools": self.tools, **category}

    def _deck(self, name: str, items: Sequence[Any]) -> Deck:
        if name not in self._decks:
            self._decks[name] = Deck(self.rng, items)
        return self._decks[name]

    def _framed(self, core: str) -> str:
        return self.book.wording.sentence(expand(self._frames.deal(), {"core": Value(core, None)}, {}, self.rng))

    def _user(self, request: Request) -> dict[str, Any]:
        text = request.sentence if request.core is None else self._framed(request.core)
        return {"role": "user", "content": text}

    def _call(self, name: str) -> list[dict[str, Any]]:
        request = self._cases[name].deal().request(self.split)
        return [self._user(request), call_message(request)]

    def _answered(self, name: str) -> list[dict[str, Any]]:
        request = self._answerable[name].deal().request(self.split)
        return [
            self._user(request), call_message(request), result_message(request),
            {"role": "assistant", "content": request.answer},
        ]  # fmt: skip

    def _steps(self) -> list[dict[str, Any]]:
        """One request for two things: a call, its result, and the second call."""
        before, after, *common = self._deck("steps", self._sequences).deal()
        first = self._answerable[before].deal().request(self.split, core_only=True)
        given = {name: first.slots[name] for name in common if name in first.slots}
        second = self._cases[after].deal().request(self.split, core_only=True, given=given)
        clauses = {"first": Value(first.core, None), "second": Value(second.core, None)}
        core = expand(self._joins.deal(), clauses, {}, self.rng)
        return [
            {"role": "user", "content": self._framed(core)},
            call_message(first), result_message(first), call_message(second),
        ]  # fmt: skip

    def _followup(self, name: str) -> list[dict[str, Any]]:
        """A finished request and another one, for the tool `name`, after it."""
        first = self._answered(self._deck("first", list(self._answerable)).deal())
        second = self._cases[name].deal().request(self.split)
        return [*first, self._user(second), call_message(second)]

    def _chat(self) -> list[dict[str, Any]]:
        wording = self.book.wording
        user, answer = self._deck("chat", wording.chat[self.split]).deal()
        openers = wording.openers[self.split] if wording.openers else [""]
        return _pair((self.rng.choice(openers) + expand(user, {}, {}, self.rng), answer))

    def _missing(self) -> list[dict[str, Any]]:
        return _pair(self._deck("missing", self._incomplete).deal().incomplete(self.split))

    def _ambiguous(self) -> list[dict[str, Any]]:
        return _pair(self._deck("ambiguous", self.book.ambiguous[self.split]).deal())


def _pair(texts: Sequence[str]) -> list[dict[str, Any]]:
    user, answer = texts
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def call_message(request: Request) -> dict[str, Any]:
    """An assistant message with the call, its arguments as a JSON string."""
    arguments = json.dumps(request.arguments, ensure_ascii=False, separators=(",", ":"))
    function = {"name": request.name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def result_message(request: Request) -> dict[str, Any]:
    content = json.dumps(request.result, ensure_ascii=False, separators=(",", ":"))
    return {"role": "tool", "name": request.name, "content": content}


def shares(mix: dict[str, float], total: int) -> dict[str, int]:
    """`total` split by the weights of `mix`, by largest remainder; sums to `total`."""
    weight = sum(mix.values())
    counts = {kind: int(total * part / weight) for kind, part in mix.items()}
    rest = sorted(mix, key=lambda kind: counts[kind] - total * mix[kind] / weight)
    for kind in rest[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def make_rows(
    book: Phrasebook, tools: Sequence[dict[str, Any]], split: str, total: int, rng: random.Random
) -> list[tuple[str, dict[str, Any]]]:
    """`total` rows of one split with their kinds, mixed as the phrasebook says, in shuffled order.

    All calls fit their schemas. Where the wordings of a kind run out, its rows become plain calls.
    """
    writer = Writer(book, tools, split, rng)
    rows = []
    mix = {kind: part for kind, part in book.mix[split].items() if writer.possible(kind)}
    for kind, number in shares(mix, total).items():
        for _ in range(number):
            try:
                rows.append((kind, writer.row(kind)))
            except NoNewRequest:
                if kind == "call":
                    raise
                rows.append(("call", writer.row("call")))
    rng.shuffle(rows)
    check_calls([row for _, row in rows], tools)
    return rows


def check_calls(rows: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
    """Raises UserError at the first call whose arguments its tool's JSON Schema does not accept."""
    validators = {}
    for tool in tools:
        schema = tool["function"].get("parameters", {"type": "object"})
        name = tool["function"]["name"]
        validators[name], broken = validator_of(json.dumps(schema))
        if broken:
            raise UserError(f"tool {name}: its parameters are no JSON Schema ({broken})")
    for row in rows:
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                for error in validators[name].iter_errors(arguments):
                    raise UserError(f"a made call of {name} does not fit its schema ({error.message}): {arguments}")


def generate_files(
    tools_file: str | Path,
    output: str | Path,
    *,
    phrasings: str | Path | None = None,
    per_tool: int = 32,
    rows: int | None = None,
    heldout_rows: int | None = None,
    language: str = "en",
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
) -> list[tuple[Path, Counter]]:
    """Make and write both splits; gives each file with its rows by kind. Raises UserError."""
    tools = load_tools_file(tools_file)
    if not tools:
        raise UserError(f"{tools_file}: holds no tool schema; give a JSON array of tool schemas")
    names = Counter(tool["function"]["name"] for tool in tools)
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"{tools_file}: declares the tool {twice[0]} {names[twice[0]]} times; leave one of them")
    numbers = {"per_tool": per_tool, "rows": rows, "heldout_rows": heldout_rows}
    made = generate(tools, phrasings, **numbers, language=language, seed=seed)
    written = []
    for split, (book, entries) in made.items():
        suffix = "" if book.wording.language == "en" else f"_{book.wording.language}"
        path = Path(output) / f"{name + '_' if name else ''}{split}{suffix}.jsonl"
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another --output, or say --overwrite")
        written.append((path, entries))
    write_together({path: json_lines(row for _, row in entries).encode() for path, entries in written})
    return [(path, Counter(sorted((kind for kind, _ in entries), key=KINDS.index))) for path, entries in written]


def generate(
    tools: Sequence[dict[str, Any]],
    phrasings: str | Path | None = None,
    *,
    per_tool: int = 32,
    rows: int | None = None,
    heldout_rows: int | None = None,
    language: str = "en",
    seed: int = 0,
) -> dict[str, tuple[Phrasebook, list[tuple[str, dict[str, Any]]]]]:
    """Split -> (phrasebook, [(kind, row), ...]).

    Each split draws alone: more training rows leave the held-out ones as they are.
    """
    made = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}:{split}")
        book = load_phrasebook(phrasings, tools, rng) if phrasings else general_phrasebook(tools, language, rng)
        if split == "train":
            total = rows or rows_for(book, per_tool * len(tools))
        else:
            total = heldout_rows or max(1, total // 3)
        made[split] = (book, make_rows(book, tools, split, total, rng))
    return made


def rows_for(book: Phrasebook, requests: int) -> int:
    """How many training rows hold so many that are one request and one call; these are dealt evenly to the tools."""
    mix = book.mix["train"]
    if not mix.get("call"):
        raise UserError("the phrasings' mix has no share for `call`; say --rows")
    return math.ceil(requests * sum(mix.values()) / mix["call"])
