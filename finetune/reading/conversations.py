"""Conversations for training: rows of any number of sources, read, normalised and counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.reading.columns import BadAnswerError, bad_verdicts, refuse_csv_header, tool_columns
from finetune.reading.load_result import UNREAD_TOOLS, LoadResult, Rejected, SourceRow
from finetune.reading.normalize import conversations_fingerprint, normalize_row
from finetune.reading.reading_cache import LazyList, entry_path, load_entry, save_entry
from finetune.reading.row_files import RowError
from finetune.reading.row_filter import RowFilter
from finetune.reading.shapes import describe
from finetune.reading.sources import Spec, parse_spec, read_rows

BAD_ANSWER = "rows not read: their answer is marked as a bad one (--include_rejected reads them)"


def load_conversations(
    specs: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    strict: bool = True,
    column_map: dict[str, str] | None = None,
    tools: list[dict[str, Any]] | None = None,
    seed: int = 0,
    rows: Iterable[SourceRow] | None = None,
    cache_dir: str | Path | None = None,
    where: dict[str, list[str]] | None = None,
    refuse_marked_splits: bool = False,
    include_rejected: bool = False,
) -> LoadResult:
    """Read, normalise and mix all sources.

    specs   files, folders or Hub ids, each optionally with a weight (`rows.jsonl*0.5`); see finetune.reading.sources
    limit   at most this many conversations of each source
    strict  True: the first bad row raises UserError with file, row and remedy; False: it goes to `.rejected`, as a row
            whose answer is marked as a bad one always does
    seed    decides, with a source's index among `specs` and not its path, which rows a fractional weight keeps
    rows    rows read elsewhere (SQL), taken after those of `specs`
    cache_dir  (only for files, only if strict) folder that caches the result; when nothing has changed, the files are
               hashed only, and rows are read when a conversation is accessed
    where   only rows that have one of these values in each of these columns (see finetune.reading.row_filter)
    include_rejected  read rows whose answer is marked as a bad one like the others
    refuse_marked_splits  UserError for a file with a column that marks training and other rows
    """
    specs = [specs] if isinstance(specs, (str, Path)) else list(specs)
    parsed = [parse_spec(spec) for spec in specs]  # a missing file is reported before the first one is read
    options = {"limit": limit, "column_map": column_map, "tools": tools, "seed": seed, "where": where or {}}
    options |= {"refuse_marked_splits": refuse_marked_splits, "include_rejected": include_rejected}
    if cache_dir is None or not strict or rows is not None:
        return _read_all(parsed, rows, strict, **options)
    path = entry_path(cache_dir, parsed, options)
    if path is not None and (entry := load_entry(path)):

        def read_again() -> Sequence[dict[str, Any]]:
            again = _read_all(parsed, None, True, **options)
            if again.fingerprint != entry["fingerprint"]:
                raise UserError(f"{', '.join(map(str, specs))}: changed while it was in use; start again")
            return again.conversations

        counters = {name: Counter(entry.pop(name)) for name in ("mappings", "notes")}
        return LoadResult(LazyList(len(entry["origins"]), read_again), **entry, **counters)
    result = _read_all(parsed, None, True, **options)
    if path is not None and entry_path(cache_dir, parsed, options) == path:  # else a file changed while it was read
        fields = ("origins", "counts", "mappings", "notes", "fingerprint")
        save_entry(path, **{name: getattr(result, name) for name in fields})
    return result


def _read_all(
    specs: list[Spec],
    rows: Iterable[SourceRow] | None,
    strict: bool,
    *,
    limit: int | None,
    column_map: dict[str, str] | None,
    tools: list[dict[str, Any]] | None,
    seed: int,
    where: dict[str, list[str]],
    refuse_marked_splits: bool,
    include_rejected: bool,
) -> LoadResult:
    result = LoadResult()
    row_filter = RowFilter(where, refuse_marked_splits=refuse_marked_splits)
    counts = result.counts = {"read": 0, "kept": 0, "rejected": 0, "repeated": 0, "left_out": 0, "sources": {}}
    streams = [(spec.text, spec.weight, read_rows(spec)) for spec in specs]
    if rows is not None:
        streams.append(("rows", 1.0, rows))
    for index, (name, weight, stream) in enumerate(streams):
        kept: list[tuple[dict, tuple[str, int]]] = []
        read = 0
        for source, number, raw in stream:
            if limit is not None and len(kept) >= limit:
                break
            if not row_filter.chooses(source, raw):
                continue
            read += 1
            if include_rejected and isinstance(raw, dict) and (marks := bad_verdicts(raw)):
                raw = {name: value for name, value in raw.items() if name not in marks}
            try:
                conversation = normalize_row(raw, column_map=column_map, tools=tools, notes=result.notes)
            except RowError as error:
                reason = str(error)
                if strict and isinstance(error, BadAnswerError):
                    result.notes[BAD_ANSWER] += 1
                elif strict:
                    refuse_csv_header(source, reason, raw)
                    raise UserError(
                        f"{source}, row {number}: {reason}; fix the row, or reject such rows with prepare_data.py"
                    ) from error
                result.rejected.append(Rejected(source, number, reason, raw))
                continue
            kept.append((conversation, (source, number)))
            result.mappings[f"{source}: {describe(raw, column_map)}"] += 1
            if not conversation["tools"] and any("tool_calls" in message for message in conversation["messages"]):
                result.notes.update(f"{UNREAD_TOOLS}{column}" for column in tool_columns(raw))
        if read and not kept:
            refuse_csv_header(result.rejected[-1].source, result.rejected[-1].reason, result.rejected[-1].raw)
        used = _weighted(kept, weight, random.Random(f"{seed}:{index}"))
        counts["read"] += read
        counts["kept"] += len(kept)
        counts["rejected"] = len(result.rejected)
        counts["repeated"] += max(0, len(used) - len(kept))
        counts["left_out"] += max(0, len(kept) - len(used))
        counts["sources"][name] = {"read": read, "kept": len(kept), "used": len(used)}
        result.conversations += [conversation for conversation, _ in used]
        result.origins += [origin for _, origin in used]
    row_filter.check()
    if row_filter.skipped:
        result.notes["rows not read: another value in the column of --where"] = row_filter.skipped
    result.fingerprint = conversations_fingerprint(result.conversations)
    return result


def _weighted(items: list, weight: float, rng: random.Random) -> list:
    """`weight` times as many items: complete copies first, then a random sample in the order of the file.

    At least one item of a source that has any is kept, so that a small weight does not drop the source.
    """
    copies = int(weight)
    sampled = round((weight - copies) * len(items))
    if not copies and items:
        sampled = max(1, sampled)
    return items * copies + [items[i] for i in sorted(rng.sample(range(len(items)), sampled))]
