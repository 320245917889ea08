"""Rows to ids and labels, one after another: what is refused, what is too long, which oldest turns are removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from finetune.encoding.options import EncodingOptions
from finetune.progress import counted
from formats import IGNORE_INDEX, Encoded, Format, Sequence, encode

Conversation = dict[str, Any]


@dataclass
class Chunk:
    """The result for some consecutive rows; `rows` counts from the first conversation of all."""

    ids: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    tokens_by_role: Counter = field(default_factory=Counter)
    trained_by_role: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    left_out: list[tuple[int, str]] = field(default_factory=list)
    warned: list[tuple[int, str]] = field(default_factory=list)
    turns_removed: dict[int, int] = field(default_factory=dict)
    longest: tuple[int, int] = (0, -1)  # tokens, row; over-long rows included

    def omit(self, row: int, reason: str, detail: str = "") -> None:
        self.left_out.append((row, reason + detail))
        self.reasons[reason] += 1

    def add(self, row: int, sequence: Sequence, options: EncodingOptions) -> bool:
        """Add one sequence if it fits and trains something; returns whether it was added."""
        ids = np.asarray(sequence.input_ids, dtype=np.int32)
        labels = np.asarray(sequence.labels, dtype=np.int32)
        trained = labels != IGNORE_INDEX
        if len(ids) != len(labels) or not np.array_equal(labels[trained], ids[trained]):
            raise AssertionError(f"labels of conversation {row} do not match its ids")
        if options.limit is not None and len(ids) > options.limit:
            self.omit(row, options.overlong_reason, f": {len(ids)} > {options.limit} tokens")
            self.counts["sequences_too_long"] += 1
            return False
        if not trained.any():
            self.omit(row, "nothing to train")
            return False
        self.ids.append(ids)
        self.trained.append(trained)
        self.rows.append(row)
        self.tokens_by_role.update(sequence.roles)
        self.trained_by_role.update(compress(sequence.roles, trained.tolist()))
        return True


def encode_chunk(
    start: int, conversations: Iterable[Conversation], tokenizer: Any, fmt: Format, options: EncodingOptions
) -> Chunk:
    """Encode consecutive conversations, the first of which is number `start` of all."""
    chunk = Chunk()
    for row, conversation in enumerate(conversations, start=start):
        encoded = encode_answers(conversation, tokenizer, fmt, options)
        if encoded.status == "refused":
            chunk.omit(row, f"refused: {encoded.reason}")
            chunk.counts["refused"] += 1
            continue
        chunk.longest = max(chunk.longest, (_longest(encoded), row))
        encoded, removed = _trimmed(encoded, conversation, tokenizer, fmt, options)
        added = [chunk.add(row, sequence, options) for sequence in encoded.sequences]
        if any(added):
            chunk.counts.update(kept=1, split=int(len(added) > 1), escaped=encoded.escaped)
            chunk.warned += [(row, kind) for kind in warning_kinds(encoded)]
            if removed:
                chunk.turns_removed[row] = removed
        else:
            chunk.counts["dropped"] += 1
    return chunk


def warning_kinds(encoded: Encoded) -> list[str]:
    """The warnings of a row, without the number of the message that each is about."""
    return [warning.partition(": ")[2] for warning in encoded.warnings]


def in_rows(warned: Iterable[Hashable]) -> str:
    """`2 rows`, or `3 turns in 2 rows`, for the row of each warning of one kind."""
    turns = list(warned)
    of_rows = counted(len(set(turns)), "row")
    return of_rows if len(set(turns)) == len(turns) else f"{counted(len(turns), 'turn')} in {of_rows}"


def encode_answers(conversation: Conversation, tokenizer: Any, fmt: Format, options: EncodingOptions) -> Encoded:
    """`formats.encode`, but a row with an empty answer is refused, which some formats could express."""
    if empty := empty_answer(conversation):
        return Encoded("refused", empty)
    return encode(conversation, tokenizer, fmt, **options.of_format)


def warn_of_length(encoded: Encoded, positions: int | None) -> None:
    """Add a warning for each sequence that is longer than the positions of the model."""
    for number, sequence in enumerate(encoded.sequences if positions else (), start=1):
        if len(sequence.input_ids) > positions:
            encoded.warnings.append(f"sequence {number}: longer than the model's {positions:,} positions")


def empty_answer(conversation: Conversation) -> str | None:
    """A reason to refuse a canonical conversation: its first answer without text and calls; None without one.

    Training such an answer teaches to end a turn before it began, and no server puts one into a context.
    """
    for number, message in enumerate(conversation["messages"], start=1):
        if message["role"] == "assistant" and not message["content"] and not message.get("tool_calls"):
            return f"message {number}: the assistant says and calls nothing"
    return None


def _trimmed(
    encoded: Encoded, conversation: Conversation, tokenizer: Any, fmt: Format, options: EncodingOptions
) -> tuple[Encoded, int]:
    """With trim_turns: (encoded, turns removed) without as few of the oldest turns as make every sequence fit.

    The input and 0 when nothing has to be removed or nothing helps.
    """
    limit = options.limit
    if limit is None or options.overlong != "trim_turns" or _longest(encoded) <= limit:
        return encoded, 0
    first, last = 1, len(turn_starts(conversation["messages"])) - 1  # how many turns may go: at least one stays
    best = encoded, 0
    while first <= last:
        middle = (first + last) // 2
        trial = encode_answers(without_oldest_turns(conversation, middle), tokenizer, fmt, options)
        if trial.status != "refused" and _longest(trial) <= limit:
            best, last = (trial, middle), middle - 1
        else:
            first = middle + 1
    return best


def _longest(encoded: Encoded) -> int:
    return max((len(sequence.input_ids) for sequence in encoded.sequences), default=0)


def turn_starts(messages: list[dict[str, Any]]) -> list[int]:
    """Indices at which turns start: each user message after something else.

    What precedes the first one (an assistant's greeting) belongs to the first turn; leading system messages to none.
    """
    begin = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts, user_seen = [begin], False
    for index in range(begin, len(messages)):
        user = messages[index]["role"] == "user"
        if user and user_seen and messages[index - 1]["role"] != "user":
            starts.append(index)
        user_seen = user_seen or user
    return starts


def without_oldest_turns(conversation: Conversation, number: int) -> Conversation:
    """The conversation without its `number` oldest turns; leading system messages and tools stay."""
    messages = conversation["messages"]
    starts = turn_starts(messages)
    return conversation | {"messages": messages[: starts[0]] + messages[starts[number] :]}
