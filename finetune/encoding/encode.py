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
from pathlib import Path
from typing import Any

import numpy as np

from finetune.encoding.encoded import EncodedRows
from finetune.encoding.rows import Chunk, Flags, encode_chunk
from finetune.errors import UserError
from finetune.progress import progress_bar
from finetune.reading.normalize import conversations_fingerprint
from finetune.torchless import hide_torch

REPORTED = 100  # left-out rows named in the report; `EncodedRows.left_out` has all
CHUNK = 64  # rows per unit of work
PROBE_SECONDS = 1.0  # how long one process alone encodes before it is judged whether others would help
WORTH_SECONDS = (
    20.0  # other processes first import the tokenizer's library (about 6 s), so a short rest is not worth it
)


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
    fingerprint: str | None = None,
) -> EncodedRows:
    """Render, tokenise and mask every conversation.

    max_seq_length  in tokens; None: no limit
    overlong        "drop" leaves a longer sequence out, "trim_turns" removes the oldest whole turns (system messages
                    and tools stay) until the rest fits, "error" raises UserError; an answer is never cut
    num_proc        processes; None: as many as cores if one process alone would take long
    cache_dir       folder for results, keyed by data, format, tokenizer, flags and code; None: no cache
    origins         (source, row) of each conversation, to name rows in the report and in errors
    fingerprint     of the conversations (`LoadResult.fingerprint`), so that a cached result needs none of them
    Raises UserError, and formats.FormatError when format and tokenizer do not go together.
    """
    if overlong not in ("drop", "trim_turns", "error"):
        raise UserError(f"overlong is {overlong!r}; choose drop, trim_turns or error")
    flags = Flags(max_seq_length, train_on, control_tokens, overlong)
    path = None
    if cache_dir is not None:
        from finetune.encoding import cache as encoding_cache

        fingerprint = fingerprint or conversations_fingerprint(conversations)
        path = encoding_cache.cache_path(cache_dir, fingerprint, tokenizer, fmt, flags)
        if (cached := encoding_cache.load(path)) is not None:
            cached.report["from_cache"] = True
            return _named(cached, origins)
    started = time.monotonic()
    chunks = _encode_all(conversations, tokenizer, fmt, flags, num_proc, progress, origins)
    encoded = _joined(chunks, len(conversations), flags)
    encoded.report["seconds"] = round(time.monotonic() - started, 3)
    if path is not None:
        encoding_cache.save(path, encoded)
    encoded.report["from_cache"] = False
    return _named(encoded, origins)


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


def _start_worker(payload: bytes, torchless: bool) -> None:
    global _WORKER  # noqa: PLW0603  a worker's tokenizer is handed over once, not with every chunk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if torchless:
        hide_torch()
    _WORKER = pickle.loads(payload)


def _work(start: int, rows: list[dict[str, Any]]) -> Chunk:
    return encode_chunk(start, rows, *_WORKER)


def _encode_in_pool(work, tokenizer, fmt, flags, processes, take) -> None:
    payload = pickle.dumps((tokenizer, fmt, flags))
    # spawn works alike on Linux and Windows and never copies the threads of a running torch
    context = multiprocessing.get_context("spawn")
    torchless = type(tokenizer).__module__.startswith("transformers.")  # a tokenizer's own code may want torch
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(payload, torchless))
    try:
        starts, rows = zip(*work, strict=True)
        for chunk, done in zip(pool.map(_work, starts, rows), rows, strict=True):
            take(chunk, len(done))
    except BrokenProcessPool as error:
        raise UserError("a process that turns rows into tokens died (out of memory?); use --num_proc 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _raise_overlong(chunk: Chunk, flags: Flags, origins) -> None:
    if flags.overlong == "error" and chunk.counts["sequences_too_long"]:
        row, reason = next((r, why) for r, why in chunk.left_out if why.startswith("longer"))
        raise UserError(f"{_name(row, origins)}: {reason}; raise --max_seq_length or use --overlong drop|trim_turns")


def _name(row: int, origins) -> str:
    return f"{origins[row][0]}, row {origins[row][1]}" if origins else f"row {row + 1}"


def _named(encoded: EncodedRows, origins) -> EncodedRows:
    """Names of rows in the report. They are not stored: the same conversations may stand in another file."""
    left_out = [{"row": _name(row, origins), "reason": why} for row, why in encoded.left_out[:REPORTED]]
    longest_row = _name(encoded.longest_row, origins) if encoded.longest_row >= 0 else None
    encoded.report |= {"left_out": left_out, "longest_row": longest_row}
    return encoded


def _joined(chunks: list[Chunk], read: int, flags: Flags) -> EncodedRows:
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
        "sequences": len(ids),
        "tokens": int(offsets[-1]),
        "trained_tokens": sum(trained_by_role.values()),
        "tokens_by_role": dict(by_role),
        "trained_tokens_by_role": dict(trained_by_role),
        "longest": longest,
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
        longest_row,
    )
