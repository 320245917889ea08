"""Scored items: every assistant turn of a held-out conversation, with its prompt and its expected answer."""

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
from finetune.reading.load_result import LoadResult
from finetune.reading.sources import parse_spec, read_rows
from formats.base import call_of

CALL = "call"  # tool calls are expected
MISSING_PARAMETER = "missing_parameter"  # a question is expected: the request lacks a parameter of the call
IRRELEVANT = "irrelevant"  # no tool fits; text is expected
ANSWER = "answer"  # text is expected after a tool's result, and no further call
QUESTION = "question"  # no tools are declared

CONVERSATION = "conversation"  # several requests, whose calls are executed and judged at the end

OK_LABELS = {"ok": True, "not ok": False, "not_ok": False}


@dataclass
class Option:
    """One of the answers that a model chooses from by likelihood: calls, or a text."""

    name: str
    calls: list[dict[str, Any]]
    text: str
    is_expected: bool = False


@dataclass
class Item:
    """One scored answer.

    row               number of the row in its source, from 1
    turn              index of the expected message
    expected_text     None for calls, for labelled rows and where the expected text is empty
    label             True for "ok", False for "not ok", None without a label
    possible_answers  BFCL: the allowed values of each argument of each expected call
    truth             what else the verdict of the item's suite needs
    options           the answers to choose from, where the row brings them
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
    truth: Any = None
    options: list[Option] | None = None

    @property
    def origin(self) -> tuple[str, int]:
        """(source, row)."""
        return self.source, self.row

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with anything that the answer or its verdict depends on."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("truth", "options") or value}
        text = json.dumps(fields, ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_items(specs: Sequence[str | Path], *, limit: int | None = None) -> list[Item]:
    """Items of the first `limit` rows of `specs` (default: all rows). Raises UserError for a row it cannot read.

    A column `category` (`missing_parameter` or `irrelevant`) names the kind of a row's items. A row with the columns
    `input` and `label` ("ok" or "not ok") is a labelled prompt for the quality rule.
    """
    loaded, items, categories = load_rows(specs, limit=limit)
    for (source, row), conversation in zip(loaded.origins, loaded.conversations, strict=True):
        items += items_of(conversation, source, row, categories.get((source, row)))
    if not items:
        raise UserError(f"{', '.join(map(str, specs))}: no assistant turn to score; use rows that end in an answer")
    return items


def load_rows(
    specs: Sequence[str | Path], *, limit: int | None = None
) -> tuple[LoadResult, list[Item], dict[tuple[str, int], str]]:
    """(conversations, items of labelled prompts, category of rows that have one) of the first `limit` rows."""
    categories: dict[tuple[str, int], str] = {}
    labelled: list[Item] = []

    for name in {str(spec) for spec in specs if list(map(str, specs)).count(str(spec)) > 1}:
        raise UserError(f"--dataset {name} is given twice; remove one of them")
    for spec in map(parse_spec, specs):
        if spec.weight != 1:
            raise UserError(f"{spec.text}: weights are for training data; remove it, or use --limit N")

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

    return load_conversations([], rows=conversations(), strict=True), labelled, categories


def items_of(conversation: dict[str, Any], source: str, row: int, category: str | None = None) -> list[Item]:
    """One item for each assistant turn except those marked `"train": false`."""
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
                expected_text=None if calls else message["content"] or None,  # empty: only "no call" is scored
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
    return MISSING_PARAMETER if asks_back(messages[turn]["content"]) else IRRELEVANT


def asks_back(text: str) -> bool:
    """Whether an answer holds a question mark."""
    return any(mark in text for mark in "?？")
