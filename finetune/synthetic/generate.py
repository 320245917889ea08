"""Synthetic training and held-out rows from tool schemas and phrasings.

The same seed gives the same rows on every machine. Every call is checked against its tool's JSON Schema.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import json_lines, read_data, write_together
from finetune.json_schema import validator_of
from finetune.reading.tool_schemas import load_tools_file
from finetune.synthetic.phrasebook import Phrasebook, Request, load_phrasebook
from finetune.synthetic.phrasing import SPLITS, Deck, Value, expand
from finetune.synthetic.schema_phrasing import general_phrasebook

KINDS = ("call", "answered", "steps", "parallel", "followup", "chat", "absent", "missing", "ambiguous")
# Categories, for evaluation, of rows whose correct answer is text.
CATEGORIES = {
    "chat": "irrelevant", "absent": "irrelevant", "missing": "missing_parameter", "ambiguous": "missing_parameter",
}  # fmt: skip
SENTENCE_ENDS = ".?!。？！"
MAX_TRIES = 200  # to find a request that is not in the split yet


class NoNewRequest(UserError):
    """The phrasings give no further request of a kind."""


class Writer:
    """Makes the rows of one split, in which no request repeats."""

    def __init__(
        self, book: Phrasebook, tools: Sequence[dict[str, Any]], split: str, rng: random.Random,
        calls: Sequence[str] | None = None,
    ):  # fmt: skip
        """calls: the tool of each `call` row, dealt in random order; None: all tools alike."""
        self.book, self.split, self.rng, self.tools = book, split, rng, list(tools)
        self.declared = [tool["function"]["name"] for tool in tools]
        self.calls = calls or self.declared
        self.seen: set[str] = set()
        self._decks: dict[Any, Deck] = {}
        answerable = {name: [case for case in cases if case.answerable] for name, cases in book.cases.items()}
        self._answerable = {name: answerable[name] for name in self.declared if answerable[name]}
        silent = book.conversation[:1] if book.conversation else ()  # small talk lacks no value
        cases = [case for name in self.declared if name not in silent for case in dict.fromkeys(book.cases[name])]
        self._incomplete = [case for case in cases if case.incomplete(split) is not None]
        self._sequences = [pair for pair in book.sequences if pair[0] in self._answerable and pair[1] in self.declared]

    def possible(self, kind: str) -> bool:
        """Whether these tools and phrasings can give rows of this kind."""
        needs = {
            "answered": self._answerable, "followup": self._answerable, "steps": self._sequences,
            "chat": self.book.wording.chat[self.split], "missing": self._incomplete,
            "absent": self.book.absent, "parallel": self.book.wording.both[self.split],
            "ambiguous": self.book.ambiguous[self.split],
        }  # fmt: skip
        return bool(needs.get(kind, True))

    def row(self, kind: str) -> dict[str, Any]:
        """One row of the kind; raises NoNewRequest when no new request is found."""
        make: Callable[..., list[dict[str, Any]]] = getattr(self, f"_{kind}_row")
        # Dealt once: a tool with few wordings is tried again instead of skipped.
        subjects = {
            "call": self.calls, "followup": self.declared, "parallel": self.declared,
            "answered": self._answerable, "absent": self.book.absent,
        }  # fmt: skip
        subject = (self._deal(kind, subjects[kind]),) if kind in subjects else ()
        for _ in range(MAX_TRIES):
            messages = make(*subject)
            requests = [message["content"] for message in messages if message["role"] == "user"]
            if requests and not any(text in self.seen for text in requests):
                self.seen.update(requests)
                break
        else:
            raise NoNewRequest(
                f"no new request of kind {' for '.join((repr(kind), *subject))} in {MAX_TRIES} tries; "
                "ask for fewer rows or add phrasings and values"
            )
        system = [{"role": "system", "content": self.book.wording.system}] if self.book.wording.system else []
        is_text = kind in CATEGORIES and not messages[-1].get("tool_calls")
        category = {"category": CATEGORIES[kind]} if is_text else {}
        tools = self._tools_without(subject[0] if kind == "absent" else None)
        return {"messages": system + messages, "tools": tools, **category}

    @cache  # noqa: B019  (a writer lives as long as its rows are made)
    def _tools_without(self, name: str | None) -> str:
        """The schemas as JSON, without that of the tool `name`."""
        tools = [tool for tool in self.tools if tool["function"]["name"] != name]
        return json.dumps(tools, ensure_ascii=False, separators=(",", ":"))

    def _deal(self, key: Any, items: Iterable[Any]) -> Any:
        """The next item of the deck `key`, which is made of `items` at its first use."""
        if key not in self._decks:
            self._decks[key] = Deck(self.rng, list(items))
        return self._decks[key].deal()

    def _case(self, name: str) -> Any:
        return self._deal(("case", name), self.book.cases[name])

    def _answerable_case(self, name: str) -> Any:
        return self._deal(("answerable", name), self._answerable[name])

    def _framed(self, core: str) -> str:
        frame = self._deal("frames", self.book.wording.frames[self.split])
        return self.book.wording.sentence(expand(frame, {"core": Value(core, None)}, {}, self.rng))

    def _user(self, request: Request) -> dict[str, Any]:
        text = request.sentence if request.core is None else self._framed(request.core)
        return {"role": "user", "content": text}

    def _call_row(self, name: str) -> list[dict[str, Any]]:
        request = self._case(name).request(self.split)
        return [self._user(request), call_message(request)]

    def _answered_row(self, name: str) -> list[dict[str, Any]]:
        request = self._answerable_case(name).request(self.split)
        return [
            self._user(request), call_message(request), result_message(request),
            {"role": "assistant", "content": request.answer},
        ]  # fmt: skip

    def _steps_row(self) -> list[dict[str, Any]]:
        """One request for two calls: the first call, its result, and the second call."""
        before, after, *common = self._deal("steps", self._sequences)
        first = self._answerable_case(before).request(self.split, core_only=True)
        given = {name: first.slots[name] for name in common if name in first.slots}
        second = self._case(after).request(self.split, core_only=True, given=given)
        clauses = {"first": Value(first.core, None), "second": Value(second.core, None)}
        core = expand(self._deal("joins", self.book.wording.joins[self.split]), clauses, {}, self.rng)
        return [
            {"role": "user", "content": self._framed(core)},
            call_message(first), result_message(first), call_message(second),
        ]  # fmt: skip

    def _parallel_row(self, name: str) -> list[dict[str, Any]]:
        """One request for two calls that do not depend on each other, in one answer."""
        other = self._deal("other", self.declared)
        requests = [self._case(tool).request(self.split, core_only=True) for tool in (name, other)]
        if name == other and requests[0].arguments == requests[1].arguments:
            return []
        clauses = {slot: Value(one.core, None) for slot, one in zip(("first", "second"), requests, strict=True)}
        core = expand(self._deal("both", self.book.wording.both[self.split]), clauses, {}, self.rng)
        return [{"role": "user", "content": self._framed(core)}, call_message(*requests)]

    def _followup_row(self, name: str) -> list[dict[str, Any]]:
        """An answered request, followed by a request for the tool `name`."""
        first = self._answered_row(self._deal("first", self._answerable))
        second = self._case(name).request(self.split)
        return [*first, self._user(second), call_message(second)]

    def _chat_row(self) -> list[dict[str, Any]]:
        wording = self.book.wording
        user, answer = self._deal("chat", wording.chat[self.split])
        openers = wording.openers[self.split] if wording.openers else [""]
        text = self.rng.choice(openers) + expand(user, {}, {}, self.rng)
        if self.book.conversation is None:
            return _pair((text, answer))
        tool, parameter = self.book.conversation
        request = Request(tool, {parameter: text}, None, text, None, "", reasoning=self._case(tool).reason())
        return [{"role": "user", "content": text}, call_message(request)]

    def _absent_row(self, name: str) -> list[dict[str, Any]]:
        """A request for a tool that the row does not declare."""
        user = self._user(self._case(name).request(self.split, core_only=True))
        return [user, {"role": "assistant", "content": self.book.wording.decline}]

    def _missing_row(self) -> list[dict[str, Any]]:
        drawn = self._deal("missing", self._incomplete).incomplete(self.split)
        if drawn is None:  # not every draw needs an argument
            return []
        text, question = drawn
        return _pair((text if text[-1:] in SENTENCE_ENDS else self._framed(text), question))

    def _ambiguous_row(self) -> list[dict[str, Any]]:
        return _pair(self._deal("ambiguous", self.book.ambiguous[self.split]))


def _pair(texts: Sequence[str]) -> list[dict[str, Any]]:
    user, answer = texts
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def call_message(*requests: Request) -> dict[str, Any]:
    """An assistant message with a call for each request and the reasons for them; arguments are a JSON string."""
    functions = [
        {"name": one.name, "arguments": json.dumps(one.arguments, ensure_ascii=False, separators=(",", ":"))}
        for one in requests
    ]
    reasons = " ".join(one.reasoning for one in requests if one.reasoning)
    beside = {"content": reasons} if reasons else {}
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", **beside, "tool_calls": calls}


def result_message(request: Request) -> dict[str, Any]:
    content = json.dumps(request.result, ensure_ascii=False, separators=(",", ":"))
    return {"role": "tool", "name": request.name, "content": content}


def shares(mix: dict[str, float], total: int) -> dict[str, int]:
    """`total` split in proportion to the weights of `mix` (largest remainder method)."""
    weight = sum(mix.values())
    if not weight:
        raise UserError("`mix` in the phrasings has no weight for a kind of row that these tools can have; add one")
    counts = {kind: int(total * part / weight) for kind, part in mix.items()}
    rest = sorted(mix, key=lambda kind: counts[kind] - total * mix[kind] / weight)
    for kind in rest[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def make_rows(
    book: Phrasebook,
    tools: Sequence[dict[str, Any]],
    split: str,
    total: int,
    rng: random.Random,
    calls: Sequence[str] | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """`total` rows of one split with their kinds, in the phrasebook's mix, shuffled.

    Where a kind has no further requests, `call` rows replace it. calls: as in Writer.
    """
    writer = Writer(book, tools, split, rng, calls)
    rows = []
    if unknown := [kind for kind in book.mix[split] if kind not in KINDS]:
        raise UserError(f"`mix` in the phrasings has the unknown kind {unknown[0]!r}; use {', '.join(KINDS)}")
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
    """Raises UserError for a call that its tool's JSON Schema does not accept."""
    validators = {}
    for tool in tools:
        schema = tool["function"].get("parameters", {"type": "object"})
        name = tool["function"]["name"]
        validators[name], invalid = validator_of(json.dumps(schema))
        if invalid:
            raise UserError(f"tool {name}: its parameters are not a valid JSON Schema ({invalid})")
    for row in rows:
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                for error in validators[name].iter_errors(arguments):
                    raise UserError(f"a made-up call of {name} does not fit its schema ({error.message}): {arguments}")


def generate_files(
    tools_file: str | Path, output: str | Path, *, name: str | None = None, overwrite: bool = False, **options: Any
) -> list[tuple[Path, Counter[str]]]:
    """Write both splits; returns each file with its number of rows by kind. Raises UserError.

    options: as in `generate`.
    """
    tools = load_tools_file(tools_file)
    if not tools:
        raise UserError(f"{tools_file}: contains no tool schema; must be a JSON array of tool schemas")
    names = Counter(tool["function"]["name"] for tool in tools)
    if duplicate := next((name for name, number in names.items() if number > 1), None):
        raise UserError(f"{tools_file}: declares the tool {duplicate} {names[duplicate]} times; keep one of them")
    written = []
    for split, (book, entries) in generate(tools, **options).items():
        suffix = "" if book.wording.language == "en" else f"_{book.wording.language}"
        path = Path(output) / f"{name + '_' if name else ''}{split}{suffix}.jsonl"
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists; choose another --output or add --overwrite")
        written.append((path, entries))
    write_together({path: json_lines(row for _, row in entries).encode() for path, entries in written})
    return [(path, Counter(sorted((kind for kind, _ in entries), key=KINDS.index))) for path, entries in written]


def generate(
    tools: Sequence[dict[str, Any]],
    phrasings: str | Path | None = None,
    *,
    per_tool: int | str | Path = 32,
    rows: int | None = None,
    heldout_rows: int | None = None,
    language: str = "en",
    seed: int = 0,
    reasons: bool = False,
) -> dict[str, tuple[Phrasebook, list[tuple[str, dict[str, Any]]]]]:
    """Split -> (phrasebook, [(kind, row), ...]).

    per_tool: training requests of each tool, or the file of `read_tiers`.
    Each split has its own random generator: the number of training rows does not change the held-out rows.
    reasons: without phrasings, write beside each call why it is made (a phrasing file has its own `reasoning`).
    """
    made = {}
    names = [tool["function"]["name"] for tool in tools]
    calls = names * per_tool if isinstance(per_tool, int) else read_tiers(per_tool, names)
    for split in SPLITS:
        rng = random.Random(f"{seed}:{split}")
        if phrasings:
            book = load_phrasebook(phrasings, tools, rng)
        else:
            book = general_phrasebook(tools, language, rng, reasons=reasons)
        if split == "train":
            total = rows or rows_with_calls(book, len(calls))
        else:
            total = heldout_rows or max(1, total // 3)
        dealt = None if isinstance(per_tool, int) else calls
        made[split] = (book, make_rows(book, tools, split, total, rng, dealt))
    return made


def read_tiers(path: str | Path, names: Sequence[str]) -> list[str]:
    """The tool of each training request, from a file {"TIER": {"rows": N, "tools": [NAME, …]}, …}; N is for each tool.

    Raises UserError for a tool that is in no tier, in two, or not among `names`.
    """
    tiers, calls, seen = read_data("tiers", path), [], set()
    for tier, entry in tiers.items() if isinstance(tiers, dict) else [("the file", None)]:
        rows, tools = (entry.get("rows"), entry.get("tools")) if isinstance(entry, dict) else (None, None)
        if type(rows) is not int or rows < 0 or not isinstance(tools, list):
            raise UserError(f'tiers {path}: {tier} must be {{"rows": a number >= 0, "tools": [names]}}')
        for name in tools:
            if name not in names:
                raise UserError(f"tiers {path}, {tier}: there is no tool {name!r} in --tools; correct or remove it")
            if name in seen:
                raise UserError(f"tiers {path}, {tier}: the tool {name!r} is in two tiers; keep one of them")
            seen.add(name)
            calls += [name] * rows
    if missing := [name for name in names if name not in seen]:
        raise UserError(f"tiers {path}: no tier has {', '.join(missing)}; add them, with 0 rows for none")
    if not calls:
        raise UserError(f"tiers {path}: all tiers have 0 rows")
    return calls


def rows_with_calls(book: Phrasebook, calls: int) -> int:
    """How many training rows contain `calls` rows of kind `call`."""
    mix = book.mix["train"]
    if not mix.get("call"):
        raise UserError("`mix` in the phrasings has no weight for `call`; add --rows")
    return math.ceil(calls * sum(mix.values()) / mix["call"])
