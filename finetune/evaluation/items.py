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
from finetune.reading.row_files import RowError
from finetune.reading.shapes import detect_shape
from finetune.reading.sources import parse_spec, read_rows
from finetune.reading.tool_lines import named_tool
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
    expected_calls    {"name", "arguments"}; arguments None: not known, and not scored
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


def load_items(
    specs: Sequence[str | Path], *, limit: int | None = None, tools: list[dict[str, Any]] | None = None
) -> list[Item]:
    """Items of the first `limit` rows of `specs` (default: all rows). Raises UserError for a row it cannot read.

    A column `category` (`missing_parameter` or `irrelevant`) names the kind of a row's items. A row with the columns
    `input` and `label` ("ok" or "not ok") is a labelled prompt for the quality rule. A query log without parameters,
    and `metadata.tool` beside a text, name the expected tool alone. `tools` are for rows that declare none.
    """
    loaded, items, named = load_rows(specs, limit=limit, tools=tools)
    for (source, row), conversation in zip(loaded.origins, loaded.conversations, strict=True):
        items += items_of(conversation, source, row, **named.get((source, row), {}))
    if not items:
        raise UserError(f"{', '.join(map(str, specs))}: no assistant turn to score; use rows that end in an answer")
    return items


def load_rows(
    specs: Sequence[str | Path], *, limit: int | None = None, tools: list[dict[str, Any]] | None = None
) -> tuple[LoadResult, list[Item], dict[tuple[str, int], dict[str, Any]]]:
    """(conversations, items of labelled prompts, arguments of `items_of` of each row) of the first `limit` rows."""
    named: dict[tuple[str, int], dict[str, Any]] = {}
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
                category = raw.get("category") if isinstance(raw.get("category"), str) else None
                named[source, number] = {"category": category, "tool": named_tool(raw), "logged": _logged_tool(raw)}
            yield source, number, raw

    return load_conversations([], rows=conversations(), strict=True, tools=tools), labelled, named


def _logged_tool(raw: dict[str, Any]) -> str | None:
    """The tool of a query log's row that has no parameters."""
    try:
        shape, fields, _ = detect_shape(raw)
    except RowError:  # reported when the row is read
        return None
    return fields["tool"] if shape.name == "query log" and "parameters" not in fields else None


def items_of(
    conversation: dict[str, Any], source: str, row: int, category: str | None = None, tool: str | None = None,
    logged: str | None = None,
) -> list[Item]:  # fmt: skip
    """One item for each assistant turn except those marked `"train": false`.

    tool    expected where the only answer is a text, if it is declared; its arguments are not known
    logged  the tool of the only call, if its arguments were not logged
    """
    items = []
    alone = sum(message["role"] == "assistant" for message in conversation["messages"]) == 1
    messages, tools = conversation["messages"], conversation["tools"]
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("train") is False or turn == 0:
            continue
        calls = [call_of(call) for call in message.get("tool_calls") or []]
        if alone and not calls and tool in [declared["function"]["name"] for declared in tools]:
            calls = [{"name": tool, "arguments": None}]
        elif alone and calls == [{"name": logged, "arguments": {}}]:
            calls = [{"name": logged, "arguments": None}]
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
