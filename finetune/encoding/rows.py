"""One row after another to ids and labels: what is refused, what is too long, which oldest turns have to go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from formats import IGNORE_INDEX


@dataclass(frozen=True)
class Flags:
    """What decides the result besides data, format and tokenizer."""

    max_seq_length: int | None
    train_on: str
    control_tokens: str
    overlong: str


@dataclass
class Chunk:
    """The result for some consecutive rows; `rows` counts from the first conversation given."""

    ids: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    tokens_by_role: Counter = field(default_factory=Counter)
    trained_by_role: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    left_out: list[tuple[int, str]] = field(default_factory=list)
    turns_removed: dict[int, int] = field(default_factory=dict)
    longest: tuple[int, int] = (0, -1)  # tokens, row; over-long rows count too


def encode_chunk(start: int, conversations, tokenizer, fmt, flags: Flags) -> Chunk:
    """Encode consecutive conversations, the first of which is number `start` of all."""
    chunk = Chunk()
    for row, conversation in enumerate(conversations, start=start):
        encoded = _encode(conversation, tokenizer, fmt, flags)
        if encoded.status == "refused":
            chunk.left_out.append((row, f"refused: {encoded.reason}"))
            chunk.reasons[f"refused: {encoded.reason}"] += 1
            chunk.counts["refused"] += 1
            continue
        chunk.longest = max(chunk.longest, (max((len(s.input_ids) for s in encoded.sequences), default=0), row))
        encoded, removed = _fitted(encoded, conversation, tokenizer, fmt, flags)
        used = 0
        for sequence in encoded.sequences:
            used += _add(chunk, row, sequence, flags)
        if used:
            chunk.counts["kept"] += 1
            chunk.counts["split"] += len(encoded.sequences) > 1
            if removed:
                chunk.turns_removed[row] = removed
            chunk.counts["escaped"] += encoded.escaped
        else:
            chunk.counts["dropped"] += 1
    return chunk


def _encode(conversation, tokenizer, fmt, flags: Flags):
    return encode_answers(conversation, tokenizer, fmt, train_on=flags.train_on, control_tokens=flags.control_tokens)


def encode_answers(conversation, tokenizer, fmt, **flags):
    """`formats.encode`, which expresses whatever a format can; a row with an empty answer is refused here."""
    from formats import Encoded, encode

    if empty := empty_answer(conversation):
        return Encoded("refused", empty)
    return encode(conversation, tokenizer, fmt, **flags)


def empty_answer(conversation: dict[str, Any]) -> str | None:
    """The first answer of a canonical conversation in which the assistant says and calls nothing, or None.

    Trained, it teaches to end a turn before it began; as context it stands where a server never puts anything.
    """
    for number, message in enumerate(conversation["messages"], start=1):
        if message["role"] == "assistant" and not message["content"] and not message.get("tool_calls"):
            return f"message {number}: the assistant says and calls nothing"
    return None


def _add(chunk: Chunk, row: int, sequence, flags: Flags) -> int:
    """Add one sequence if it fits and trains something; returns how many were added (1 or 0)."""
    ids = np.asarray(sequence.input_ids, dtype=np.int32)
    labels = np.asarray(sequence.labels, dtype=np.int32)
    trained = labels != IGNORE_INDEX
    if len(ids) != len(labels) or not np.array_equal(labels[trained], ids[trained]):
        raise AssertionError(f"labels of conversation {row} do not match its ids")
    if flags.max_seq_length is not None and len(ids) > flags.max_seq_length:
        reason = "longer than max_seq_length"
        chunk.left_out.append((row, f"{reason}: {len(ids)} > {flags.max_seq_length} tokens"))
        chunk.counts["sequences_too_long"] += 1
    elif not trained.any():
        reason = "nothing to train"
        chunk.left_out.append((row, reason))
    else:
        chunk.ids.append(ids)
        chunk.trained.append(trained)
        chunk.rows.append(row)
        chunk.tokens_by_role.update(sequence.roles)
        chunk.trained_by_role.update(compress(sequence.roles, trained.tolist()))
        return 1
    chunk.reasons[reason] += 1
    return 0


def _fitted(encoded, conversation, tokenizer, fmt, flags: Flags):
    """With trim_turns: the conversation without as few of its oldest turns as make every sequence fit.

    Returns (encoded, turns removed); the conversation as it is when nothing is to be done or nothing helps.
    """
    limit = flags.max_seq_length
    if limit is None or flags.overlong != "trim_turns" or _fits(encoded, limit):
        return encoded, 0
    first, last = 1, len(turn_starts(conversation["messages"])) - 1  # how many turns may go: at least one stays
    best = None
    while first <= last:
        middle = (first + last) // 2
        trial = _encode(without_oldest_turns(conversation, middle), tokenizer, fmt, flags)
        if trial.status != "refused" and _fits(trial, limit):
            best, last = (trial, middle), middle - 1
        else:
            first = middle + 1
    return best or (encoded, 0)


def _fits(encoded, limit: int) -> bool:
    return all(len(sequence.input_ids) <= limit for sequence in encoded.sequences)


def turn_starts(messages: list[dict[str, Any]]) -> list[int]:
    """Indices at which whole turns begin: each user message after something else. What is before the first one (an
    assistant's greeting) belongs to the first turn; leading system messages belong to none."""
    begin = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts, user_seen = [begin], False
    for index in range(begin, len(messages)):
        user = messages[index]["role"] == "user"
        if user and user_seen and messages[index - 1]["role"] != "user":
            starts.append(index)
        user_seen = user_seen or user
    return starts


def without_oldest_turns(conversation: dict[str, Any], number: int) -> dict[str, Any]:
    """The conversation without its `number` oldest turns; leading system messages and tools stay."""
    messages = conversation["messages"]
    starts = turn_starts(messages)
    head = messages[: starts[0]]
    return conversation | {"messages": head + messages[starts[number] :]}
