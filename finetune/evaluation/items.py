"""What is scored: every assistant turn of a held-out conversation is one item with a prompt and a gold answer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.reading.conversations import load_conversations
from finetune.reading.sources import parse_spec, read_rows
from formats.base import call_of

CALL = "call"  # the right answer calls tools
MISSING_PARAMETER = "missing_parameter"  # the right answer asks for what a call would need
IRRELEVANT = "irrelevant"  # no tool fits; the right answer is text
ANSWER = "answer"  # text after a tool's result: the right answer stops calling
QUESTION = "question"  # no tools are declared at all
KINDS = (CALL, MISSING_PARAMETER, IRRELEVANT, ANSWER, QUESTION)

OK_LABELS = {"ok": True, "not ok": False, "not_ok": False}


@dataclass
class Item:
    """One scored answer.

    `row` is the row's number in its source (from 1), `turn` the index of the gold message. `expected_text` is None
    for labelled rows without a gold answer, and where that is empty. `label` is their "ok" (True) / "not ok" (False).
    `possible_answers`, for BFCL, lists the allowed values of each argument of each expected call.
    """

    source: str
    row: int
    turn: int
    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    expected_calls: list[dict[str, Any]] = field(default_factory=list)
    expected_text: str | None = None
    label: bool | None = None
    possible_answers: list[dict[str, Any]] | None = None
    category: str | None = None

    def fingerprint(self) -> str:
        """12 hexadecimal digits over everything that the answer or its verdict depends on."""
        text = json.dumps(asdict(self), ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_items(specs: Sequence[str | Path], *, limit: int | None = None) -> list[Item]:
    """Items of all rows of `specs` (of the first `limit` rows); a row that cannot be read ends in a UserError.

    A row may say what it tests in a column `category` (`missing_parameter`, `irrelevant`); a row with the columns
    `input` and `label` ("ok" / "not ok") is a labelled prompt for the quality rule.
    """
    categories: dict[tuple[str, int], str] = {}
    labelled: list[Item] = []

    for name in {str(spec) for spec in specs if list(map(str, specs)).count(str(spec)) > 1}:
        raise UserError(f"--dataset {name} is named twice; an answer is scored once")
    for spec in map(parse_spec, specs):
        if spec.weight != 1:
            raise UserError(f"{spec.text}: a weight mixes training data; leave it away, or give --limit N")

    def conversations() -> Iterable[tuple[str, int, Any]]:
        rows = itertools.chain.from_iterable(read_rows(spec) for spec in specs)
        for source, number, raw in itertools.islice(rows, limit):
            if isinstance(raw, dict):
                label = OK_LABELS.get(str(raw.get("label")).strip().lower())
                if label is not None and isinstance(raw.get("input"), str):
                    messages = [{"role": "user", "content": raw["input"]}]
                    labelled.append(Item(source, number, 1, QUESTION, messages, [], label=label))
                    continue
                if isinstance(raw.get("category"), str):
                    categories[source, number] = raw["category"]
            yield source, number, raw

    loaded = load_conversations([], rows=conversations(), strict=True)
    items = labelled
    for (source, row), conversation in zip(loaded.origins, loaded.conversations, strict=True):
        items += items_of(conversation, source, row, categories.get((source, row)))
    if not items:
        raise UserError(f"{', '.join(map(str, specs))}: no assistant turn to score; give rows that end in an answer")
    return items


def items_of(conversation: dict[str, Any], source: str, row: int, category: str | None = None) -> list[Item]:
    """One item for each assistant turn but those marked `"train": false` (answers nobody wants repeated)."""
    items = []
    messages, tools = conversation["messages"], conversation["tools"]
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("train") is False or turn == 0:
            continue
        calls = [call_of(call) for call in message.get("tool_calls") or []]
        items.append(
            Item(
                source=source,
                row=row,
                turn=turn,
                kind=_kind(messages, turn, tools, bool(calls), category),
                messages=messages[:turn],
                tools=tools,
                expected_calls=calls,
                expected_text=None if calls else message["content"] or None,  # an empty one says: no call
                category=category,
            )
        )
    return items


def _kind(messages: list[dict], turn: int, tools: list[dict], calls: bool, category: str | None) -> str:
    if calls:
        return CALL
    if not tools:
        return QUESTION
    if messages[turn - 1]["role"] == "tool":
        return ANSWER
    if category in (MISSING_PARAMETER, IRRELEVANT):
        return category
    # Without a word from the data: an answer that asks something back is taken to ask for what is missing.
    asks = any(mark in messages[turn]["content"] for mark in "?？")
    return MISSING_PARAMETER if asks else IRRELEVANT
