"""Conversations for training: rows read from any number of sources, normalised, counted; none lost silently."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.reading.normalize import conversations_fingerprint, normalize_row
from finetune.reading.reading_cache import ReadLater, entry_path, load_entry, save_entry
from finetune.reading.row_files import Unreadable
from finetune.reading.shapes import describe
from finetune.reading.sources import Spec, parse_spec, read_rows
from finetune.reading.text_shapes import RowError

__all__ = [
    "LoadResult",
    "Rejected",
    "RowError",
    "load_conversations",
    "normalize_row",
    "read_rows",
]

REMEDY = "mend the row, or let prepare_data.py set such rows aside"


@dataclass(frozen=True)
class Rejected:
    """A row that was set aside: where it stands, why, and its content as it was read."""

    source: str
    row: int
    reason: str
    raw: Any

    def as_json(self) -> dict[str, Any]:
        raw = self.raw.text if isinstance(self.raw, Unreadable) else self.raw
        return {"source": self.source, "row": self.row, "reason": self.reason, "raw": raw}


@dataclass
class LoadResult:
    """What `load_conversations` gives.

    conversations  canonical conversations, in the order of the sources and of their rows
    origins        (source, row number) of each of them
    rejected       rows set aside (empty when strict)
    counts         {"read", "kept", "rejected", "repeated", "left_out", "sources": {…}}; without weights,
                   kept + rejected = read; a weight adds "repeated" rows or leaves out "left_out" of the kept ones
    mappings       how columns were read: description -> number of rows
    notes          what normalising changed: description -> how often
    fingerprint    SHA-256 over the conversations, order included
    """

    conversations: Sequence[dict[str, Any]] = field(default_factory=list)
    origins: list[tuple[str, int]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    mappings: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    fingerprint: str = ""


def load_conversations(
    specs: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    strict: bool = True,
    column_map: dict[str, str] | None = None,
    tools: list[dict[str, Any]] | None = None,
    seed: int = 0,
    rows: Iterable[tuple[str, int, Any]] | None = None,
    cache_dir: str | Path | None = None,
) -> LoadResult:
    """Read, normalise and mix all sources.

    specs   files, folders or Hub ids, each optionally with a weight (`rows.jsonl*0.5`); see finetune.reading.sources
    limit   only the first so many conversations of each source
    strict  True: the first bad row raises UserError with file, row and remedy; False: it goes to `.rejected`
    seed    picks, with a source's place among `specs` and not its path, which rows a fractional weight keeps
    rows    rows read elsewhere (SQL), taken after those of `specs`
    cache_dir  (only files, only strict) keeps what was found here; with the same files again nothing is read before
               somebody asks for a conversation
    """
    specs = [specs] if isinstance(specs, (str, Path)) else list(specs)
    parsed = [parse_spec(spec) for spec in specs]  # a missing file is reported before a minute of reading
    options = {"limit": limit, "column_map": column_map, "tools": tools, "seed": seed}
    if cache_dir is None or not strict or rows is not None:
        return _read_all(parsed, rows, strict, **options)
    path = entry_path(cache_dir, parsed, options)
    if path is not None and (entry := load_entry(path)):

        def read_again() -> list[dict[str, Any]]:
            again = _read_all(parsed, None, True, **options)
            if again.fingerprint != entry["fingerprint"]:
                raise UserError(f"{', '.join(map(str, specs))}: changed while it was in use; start again")
            return again.conversations

        counters = {name: Counter(entry.pop(name)) for name in ("mappings", "notes")}
        return LoadResult(ReadLater(len(entry["origins"]), read_again), **entry, **counters)
    result = _read_all(parsed, None, True, **options)
    if path is not None and entry_path(cache_dir, parsed, options) == path:  # else written to while it was read
        save_entry(path, result)
    return result


def _read_all(
    specs: list[Spec],
    rows: Iterable[tuple[str, int, Any]] | None,
    strict: bool,
    *,
    limit: int | None,
    column_map: dict[str, str] | None,
    tools: list[dict[str, Any]] | None,
    seed: int,
) -> LoadResult:
    result = LoadResult(counts={"read": 0, "kept": 0, "rejected": 0, "repeated": 0, "left_out": 0, "sources": {}})
    shapes: dict[tuple, str] = {}
    streams = [(spec.text, spec.weight, read_rows(spec)) for spec in specs]
    if rows is not None:
        streams.append(("rows", 1.0, rows))
    for place, (name, weight, stream) in enumerate(streams):
        kept: list[tuple[dict, tuple[str, int]]] = []
        read = 0
        for source, number, raw in stream:
            if limit is not None and len(kept) >= limit:
                break
            read += 1
            try:
                conversation = normalize_row(raw, column_map=column_map, tools=tools, notes=result.notes)
                kept.append((conversation, (source, number)))
                columns = tuple(column for column, value in raw.items() if value is not None)
                if (source, columns) not in shapes:
                    shapes[source, columns] = f"{source}: {describe(raw, column_map)}"
                result.mappings[shapes[source, columns]] += 1
            except RowError as error:
                if strict:
                    raise UserError(f"{source}, row {number}: {error}; {REMEDY}") from error
                result.rejected.append(Rejected(source, number, str(error), raw))
                result.counts["rejected"] += 1
        result.counts["read"] += read
        result.counts["kept"] += len(kept)
        mixed = _weighted(kept, weight, random.Random(f"{seed}:{place}"))
        result.counts["repeated"] += max(0, len(mixed) - len(kept))
        result.counts["left_out"] += max(0, len(kept) - len(mixed))
        result.counts["sources"][name] = {"read": read, "kept": len(kept), "used": len(mixed)}
        result.conversations += [conversation for conversation, _ in mixed]
        result.origins += [origin for _, origin in mixed]
    result.fingerprint = conversations_fingerprint(result.conversations)
    return result


def _weighted(items: list, weight: float, rng: random.Random) -> list:
    """`weight` times as many items: whole copies one after another, then a seeded sample in the order of the file.

    Of a source that holds any, one at least: a small weight must not leave it out without a word.
    """
    whole = int(weight)
    part = round((weight - whole) * len(items))
    if not whole and items:
        part = max(1, part)
    return items * whole + [items[i] for i in sorted(rng.sample(range(len(items)), part))]
