"""Conversations -> token ids and labels for all rows at once: several processes, over-long rows, a report, a cache.

Which tokens are trained is decided by `formats.encode` alone; here rows are only counted, dropped and stored.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.progress import progress_bar

REPORTED = 100  # left-out rows named in the report; `EncodedRows.left_out` has all
CHUNK = 64  # rows per unit of work
PROBE_SECONDS = 1.0  # how long one process alone encodes before it is judged whether others would help
WORTH_SECONDS = (
    20.0  # other processes first import the tokenizer's library (about 6 s), so a short rest is not worth it
)


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


class Sequences(Sequence):
    """Read-only list of (input_ids, labels), both lists of int of equal length, cut out of flat arrays when asked."""

    def __init__(self, input_ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray):
        self._ids, self._trained, self._offsets = input_ids, trained, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._offsets[index], self._offsets[index + 1]
        ids = self._ids[start:end]
        return ids.tolist(), np.where(self._trained[start:end], ids, -100).tolist()


@dataclass
class EncodedRows:
    """All sequences of a data set in flat arrays.

    input_ids  int32 (tokens,)       the ids of all sequences one after another
    trained    bool (tokens,)        whether a token's label is its id (else -100)
    offsets    int64 (sequences+1,)  where each sequence begins and the last one ends
    rows       int32 (sequences,)    index of the conversation each sequence comes from
    report     what was read, kept, split, left out and why, tokens by role (JSON-able; see docs/data.md)
    left_out   (index of the conversation, why) of every conversation or sequence that is not trained
    turns_removed  how many of its oldest turns a conversation lost, by its index (only with trim_turns)
    """

    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    report: dict[str, Any]
    left_out: list[tuple[int, str]] = field(default_factory=list)
    turns_removed: dict[int, int] = field(default_factory=dict)

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.input_ids, self.trained, self.offsets)


def encode_conversations(
    conversations: Sequence[dict[str, Any]],
    tokenizer,
    fmt,
    *,
    max_seq_length: int | None = None,
    train_on: str = "all",
    control_tokens: str = "escape",
    overlong: str = "drop",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    origins: Sequence[tuple[str, int]] | None = None,
) -> EncodedRows:
    """Render, tokenise and mask every conversation.

    max_seq_length  in tokens; None: no limit
    overlong        "drop" leaves a longer sequence out, "trim_turns" removes the oldest whole turns (system messages
                    and tools stay) until the rest fits, "error" raises UserError; an answer is never cut
    num_proc        processes; None: as many as cores if one process alone would take long
    cache_dir       folder for results, keyed by data, format, tokenizer, flags and code; None: no cache
    origins         (source, row) of each conversation, to name rows in the report and in errors
    Raises UserError, and formats.FormatError when format and tokenizer do not go together.
    """
    if overlong not in ("drop", "trim_turns", "error"):
        raise UserError(f"overlong is {overlong!r}; choose drop, trim_turns or error")
    flags = Flags(max_seq_length, train_on, control_tokens, overlong)
    path = None
    if cache_dir is not None:
        from finetune import encoding_cache

        path = encoding_cache.cache_path(cache_dir, conversations, tokenizer, fmt, flags)
        if (cached := encoding_cache.load(path)) is not None:
            cached.report["from_cache"] = True
            return cached
    started = time.monotonic()
    chunks = _encode_all(conversations, tokenizer, fmt, flags, num_proc, progress, origins)
    encoded = _joined(chunks, len(conversations), flags, origins)
    encoded.report["seconds"] = round(time.monotonic() - started, 3)
    if path is not None:
        encoding_cache.save(path, encoded)
    encoded.report["from_cache"] = False
    return encoded


def _encode_all(conversations, tokenizer, fmt, flags, num_proc, progress, origins) -> list[Chunk]:
    work = [(start, conversations[start : start + CHUNK]) for start in range(0, len(conversations), CHUNK)]
    chunks: list[Chunk] = []
    with progress_bar("rows to tokens", len(conversations), shown=progress) as advance:

        def take(chunk: Chunk, size: int) -> None:
            _raise_overlong(chunk, flags, origins)
            chunks.append(chunk)
            advance(size)

        started = time.monotonic()
        cores = num_proc or os.cpu_count() or 1
        while work:
            elapsed = time.monotonic() - started
            if cores > 1 and (num_proc or elapsed > PROBE_SECONDS):
                rest = elapsed / max(1, len(chunks)) * len(work)
                if num_proc or rest > WORTH_SECONDS:
                    _encode_in_pool(work, tokenizer, fmt, flags, cores, take)
                    return chunks
                cores = 1
            start, rows = work.pop(0)
            take(encode_chunk(start, rows, tokenizer, fmt, flags), len(rows))
    return chunks


_WORKER: tuple = ()  # tokenizer, format and flags of a worker process


def _start_worker(payload: bytes) -> None:
    global _WORKER  # noqa: PLW0603  a worker's tokenizer is handed over once, not with every chunk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER = pickle.loads(payload)


def _work(start: int, rows: list[dict[str, Any]]) -> Chunk:
    return encode_chunk(start, rows, *_WORKER)


def _encode_in_pool(work, tokenizer, fmt, flags, processes, take) -> None:
    payload = pickle.dumps((tokenizer, fmt, flags))
    # spawn works alike on Linux and Windows and never copies the threads of a running torch
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(payload,))
    try:
        starts, rows = zip(*work, strict=True)
        for chunk, done in zip(pool.map(_work, starts, rows), rows, strict=True):
            take(chunk, len(done))
    except BrokenProcessPool as error:
        raise UserError("a process that turns rows into tokens died (out of memory?); use --num_proc 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    from formats import encode

    return encode(conversation, tokenizer, fmt, train_on=flags.train_on, control_tokens=flags.control_tokens)


def _add(chunk: Chunk, row: int, sequence, flags: Flags) -> int:
    """Add one sequence if it fits and trains something; returns how many were added (1 or 0)."""
    ids = np.asarray(sequence.input_ids, dtype=np.int32)
    labels = np.asarray(sequence.labels, dtype=np.int32)
    trained = labels != -100
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


def _raise_overlong(chunk: Chunk, flags: Flags, origins) -> None:
    if flags.overlong == "error" and chunk.counts["sequences_too_long"]:
        row, reason = next((r, why) for r, why in chunk.left_out if why.startswith("longer"))
        raise UserError(f"{_name(row, origins)}: {reason}; raise --max_seq_length or use --overlong drop|trim_turns")


def _name(row: int, origins) -> str:
    return f"{origins[row][0]}, row {origins[row][1]}" if origins else f"row {row + 1}"


def _joined(chunks: list[Chunk], read: int, flags: Flags, origins) -> EncodedRows:
    ids = [array for chunk in chunks for array in chunk.ids]
    trained = [array for chunk in chunks for array in chunk.trained]
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in ids], out=offsets[1:])

    def total(name: str) -> Counter:
        return sum((getattr(chunk, name) for chunk in chunks), Counter())

    counts, by_role, trained_by_role = total("counts"), total("tokens_by_role"), total("trained_by_role")
    longest, longest_row = max((chunk.longest for chunk in chunks), default=(0, -1))
    lengths = np.diff(offsets)
    left_out = [entry for chunk in chunks for entry in chunk.left_out]
    turns_removed = {row: number for chunk in chunks for row, number in chunk.turns_removed.items()}
    report = {
        "rows": read,
        "kept": counts["kept"],
        "split": counts["split"],
        "refused": counts["refused"],
        "dropped": counts["dropped"],
        "trimmed": len(turns_removed),
        "turns_removed": sum(turns_removed.values()),
        "sequences_too_long": counts["sequences_too_long"],
        "reasons": dict(total("reasons").most_common()),
        "left_out": [{"row": _name(row, origins), "reason": why} for row, why in left_out[:REPORTED]],
        "sequences": len(ids),
        "tokens": int(offsets[-1]),
        "trained_tokens": sum(trained_by_role.values()),
        "tokens_by_role": dict(by_role),
        "trained_tokens_by_role": dict(trained_by_role),
        "longest": longest,
        "longest_row": _name(longest_row, origins) if longest_row >= 0 else None,
        "length_percentiles": {
            str(p): int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 95, 99) if len(lengths)
        },
        "escaped": counts["escaped"],
        "max_seq_length": flags.max_seq_length,
        "train_on": flags.train_on,
        "control_tokens": flags.control_tokens,
        "overlong": flags.overlong,
    }
    return EncodedRows(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(trained) if trained else np.zeros(0, bool),
        offsets,
        np.asarray([row for chunk in chunks for row in chunk.rows], dtype=np.int32),
        report,
        left_out,
        turns_removed,
    )
