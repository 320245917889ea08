"""All conversations to token ids and labels: several processes, over-long rows, a report, a cache.

Which tokens are trained is decided by `formats.encode` alone; here rows are only counted, dropped and stored.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from finetune.encoding import cache
from finetune.encoding.encoded import EncodedRows
from finetune.encoding.options import DEFAULT_OPTIONS, EncodingOptions
from finetune.encoding.rows import Chunk, Conversation, encode_chunk
from finetune.errors import UserError
from finetune.packages import hide_torch
from finetune.progress import progress_bar
from finetune.reading.normalize import conversations_fingerprint
from formats import Format

log = logging.getLogger("sandwich")
MAX_REPORTED_ROWS = 100  # omitted rows named in the report; `EncodedRows.left_out` has all
CHUNK_ROWS = 64
PROBE_SECONDS = 1.0  # encoding time of one process, after which the rest is estimated
MIN_POOL_SECONDS = 20.0  # worker processes need about 6 s to import the tokenizer's library

Origins = Sequence[tuple[str, int]] | None
Work = tuple[int, Sequence[Conversation]]  # number of the first conversation, conversations


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    fmt: Format,
    options: EncodingOptions = DEFAULT_OPTIONS,
    *,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    origins: Origins = None,
    fingerprint: str | None = None,
) -> EncodedRows:
    """Render, tokenise and mask every conversation.

    num_proc        processes; None: all cores if one process alone would take long
    cache_dir       folder for results, keyed by data, format, tokenizer, options and code; None: no cache
    origins         (source, row) of each conversation, to name rows in the report and in errors
    fingerprint     of the conversations (`LoadResult.fingerprint`), so that a cached result needs none of them
    Raises UserError, and formats.FormatError when format and tokenizer do not fit together.
    """
    path = None
    if cache_dir is not None:
        fingerprint = fingerprint or conversations_fingerprint(conversations)
        path = cache.cache_path(cache_dir, fingerprint, tokenizer, fmt, options)
        if (cached := cache.load(path)) is not None:
            cached.report["from_cache"] = True
            return _with_row_names(cached, origins)
    started = time.monotonic()
    work = [(start, conversations[start : start + CHUNK_ROWS]) for start in range(0, len(conversations), CHUNK_ROWS)]
    chunks = []
    with progress_bar("rows to tokens", len(conversations), shown=progress) as advance:
        for chunk, (_, rows) in zip(_encode_chunks(work, tokenizer, fmt, options, num_proc), work, strict=True):
            if options.overlong == "error" and chunk.counts["sequences_too_long"]:
                row, reason = next((row, reason) for row, reason in chunk.left_out if reason.startswith("longer"))
                remedy = "use" if options.max_positions else "raise --max_seq_length or use"
                raise UserError(f"{_row_name(row, origins)}: {reason}; {remedy} --overlong drop|trim_turns")
            chunks.append(chunk)
            advance(len(rows))
    encoded = _joined(chunks, len(conversations), options)
    encoded.report["seconds"] = round(time.monotonic() - started, 3)
    if path is not None:
        cache.save(path, encoded)
    encoded.report["from_cache"] = False
    return _with_row_names(encoded, origins)


def _encode_chunks(
    work: list[Work], tokenizer: Any, fmt: Format, options: EncodingOptions, num_proc: int | None
) -> Iterator[Chunk]:
    """Chunks in order; in this process, until the rest turns out to be worth the start of several processes."""
    processes = num_proc or os.cpu_count() or 1
    started = time.monotonic()
    for done, (start, rows) in enumerate(work):
        elapsed = time.monotonic() - started
        is_long = elapsed > PROBE_SECONDS and elapsed / done * (len(work) - done) > MIN_POOL_SECONDS
        if processes > 1 and (num_proc or is_long):
            yield from _encode_in_pool(work[done:], tokenizer, fmt, options, processes)
            return
        yield encode_chunk(start, rows, tokenizer, fmt, options)


_WORKER: tuple[Any, Format, EncodingOptions]  # tokenizer, format and options of a worker process


def _start_worker(payload: str, torchless: bool) -> None:
    global _WORKER  # noqa: PLW0603  a worker gets its tokenizer once, not with every chunk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if torchless:
        hide_torch()
    _WORKER = pickle.loads(Path(payload).read_bytes())  # noqa: S301  (the parent wrote it into a private folder)


def _work(item: Work) -> Chunk:
    return encode_chunk(*item, *_WORKER)


def _encode_in_pool(
    work: list[Work], tokenizer: Any, fmt: Format, options: EncodingOptions, processes: int
) -> Iterator[Chunk]:
    # spawn works on Linux and Windows and never copies the threads of a running torch
    context = multiprocessing.get_context("spawn")
    torchless = type(tokenizer).__module__.startswith("transformers.")  # a tokenizer's own code may need torch
    done, before = 0, set(multiprocessing.active_children())
    with tempfile.TemporaryDirectory(prefix="sandwich-") as folder:
        # Through a pipe it would not fit at once, and the start would wait forever for a worker that died before.
        payload = Path(folder) / "payload"
        payload.write_bytes(pickle.dumps((tokenizer, fmt, options)))
        pool = ProcessPoolExecutor(processes, context, _start_worker, (str(payload), torchless))
        try:
            for chunk in pool.map(_work, work):
                done += 1
                yield chunk
        except (BrokenProcessPool, OSError):  # OSError: its pipes are closed while another process is started
            log.warning("a process that turns rows into tokens died (out of memory?); this one does the rest")
            # The pool does not end one that was just starting, and would wait for it forever.
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for start, rows in work[done:]:
        yield encode_chunk(start, rows, tokenizer, fmt, options)


def _row_name(row: int, origins: Origins) -> str:
    return f"{origins[row][0]}, row {origins[row][1]}" if origins else f"row {row + 1}"


def _with_row_names(encoded: EncodedRows, origins: Origins) -> EncodedRows:
    """Add names of rows to the report. They are not cached: the same conversations may come from another file."""
    warned: dict[str, list[int]] = {}
    for row, warning in encoded.warned:
        warned.setdefault(warning, []).append(row)
    encoded.report |= {
        "warnings": [
            {"warning": warning, "rows": len(set(rows)), "turns": len(rows), "first": _row_name(rows[0], origins)}
            for warning, rows in sorted(warned.items(), key=lambda item: -len(item[1]))
        ],
        "left_out": [
            {"row": _row_name(row, origins), "reason": reason} for row, reason in encoded.left_out[:MAX_REPORTED_ROWS]
        ],
        "longest_row": _row_name(encoded.longest_row, origins) if encoded.longest_row >= 0 else None,
    }
    return encoded


def _joined(chunks: list[Chunk], read: int, options: EncodingOptions) -> EncodedRows:
    ids = [array for chunk in chunks for array in chunk.ids]
    trained = [array for chunk in chunks for array in chunk.trained]
    lengths = np.asarray([len(array) for array in ids], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def total(name: str) -> Counter:
        return sum((getattr(chunk, name) for chunk in chunks), Counter())

    counts, trained_by_role = total("counts"), total("trained_by_role")
    longest, longest_row = max((chunk.longest for chunk in chunks), default=(0, -1))
    turns_removed = {row: number for chunk in chunks for row, number in chunk.turns_removed.items()}
    report = {
        "rows": read,
        **{name: counts[name] for name in ("kept", "split", "refused", "dropped")},
        "trimmed": len(turns_removed),
        "turns_removed": sum(turns_removed.values()),
        "sequences_too_long": counts["sequences_too_long"],
        "reasons": dict(total("reasons").most_common()),
        "sequences": len(ids),
        "tokens": int(offsets[-1]),
        "trained_tokens": trained_by_role.total(),
        "tokens_by_role": dict(total("tokens_by_role")),
        "trained_tokens_by_role": dict(trained_by_role),
        "longest": longest,
        "length_percentiles": {
            str(p): int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 95, 99) if len(lengths)
        },
        "escaped": counts["escaped"],
        "max_seq_length": options.limit,
        "train_on": options.train_on,
        "control_tokens": options.control_tokens,
        "overlong": options.overlong,
        "reasoning": options.reasoning,
        "train_reasoning": options.train_reasoning,
    }
    return EncodedRows(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(trained) if trained else np.zeros(0, bool),
        offsets,
        np.asarray([row for chunk in chunks for row in chunk.rows], dtype=np.int32),
        report,
        [entry for chunk in chunks for entry in chunk.left_out],
        [entry for chunk in chunks for entry in chunk.warned],
        turns_removed,
        longest_row,
    )
