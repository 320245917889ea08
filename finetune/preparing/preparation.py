"""The verb `prepare`: read, normalise, check, remove duplicates, fit to a length, split, write.

Kept rows + rejected rows = rows read, always; the function ends with that sum.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import UserError
from finetune.preparing.checks import check_conversation, exact_key
from finetune.preparing.splits import SPLITS, near_duplicate_groups, parse_ratios, split_conversations
from finetune.reading.conversations import LoadResult, Rejected, load_conversations
from finetune.reading.sources import parse_spec


@dataclass
class Options:
    """What `prepare` is asked for; see the flags of prepare_data.py."""

    strict: bool = False
    dedupe: bool = False
    split: str = "80/10/10"
    seed: int = 0
    limit: int | None = None
    column_map: dict[str, str] | None = None
    tools: list[dict[str, Any]] | None = None
    max_seq_length: int | None = None
    overlong: str = "drop"
    train_on: str = "all"
    control_tokens: str = "escape"
    num_proc: int | None = None


@dataclass
class Prepared:
    """The outcome, ready to be written.

    splits    split -> canonical conversations; `origins` (source, row) alike
    rejected  rows set aside, in the order they were found
    warnings  kind of problem -> its rows that were kept nevertheless
    lengths   per kept conversation: tokens, or characters where no tokenizer was given (`unit`)
    """

    loaded: LoadResult
    splits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    origins: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    unit: str = "characters"
    near_duplicates: int = 0
    turns_removed: int = 0
    encoding_report: dict[str, Any] | None = None

    @property
    def kept(self) -> int:
        return sum(map(len, self.splits.values()))


@dataclass
class _Row:
    conversation: dict[str, Any]
    origin: tuple[str, int]
    length: int


def prepare(
    specs: Sequence[str], options: Options, *, tokenizer=None, fmt=None, rows: Iterable | None = None
) -> Prepared:
    """Run the whole preparation in memory. Raises UserError (bad source, `strict` and a bad row, nothing left).

    With a tokenizer and a format, rows are measured in tokens, held against `max_seq_length`, and rows that the
    format cannot express are rejected here instead of at training time.
    """
    ratios = parse_ratios(options.split)
    for spec in specs:
        if parse_spec(spec).weight != 1:
            raise UserError(f"{spec}: weights belong to training; here every row is kept or rejected exactly once")
    loaded = load_conversations(
        specs, strict=options.strict, limit=options.limit, column_map=options.column_map, tools=options.tools, rows=rows
    )
    result = Prepared(loaded, rejected=list(loaded.rejected))
    kept = [
        _Row(conversation, origin, len(json.dumps(conversation, ensure_ascii=False)))
        for conversation, origin in zip(loaded.conversations, loaded.origins, strict=True)
    ]
    kept = _checked(kept, result, options)
    kept = _without_copies(kept, result, options)
    if tokenizer is not None:
        kept = _fitted(kept, result, options, tokenizer, fmt)
    if not kept:
        reasons = Counter(rejected.reason for rejected in result.rejected).most_common(1)
        why = f"; most often: {reasons[0][0]}" if reasons else ""
        raise UserError(f"{', '.join(specs) or 'database'}: no rows left of {loaded.counts['read']} read{why}")
    groups = near_duplicate_groups([row.conversation for row in kept])
    if options.dedupe:
        kept, groups = _without_near_copies(kept, groups, result, options)
    result.near_duplicates = len(groups) - len(set(groups))
    names = split_conversations([row.conversation for row in kept], groups, ratios, options.seed)
    for name in SPLITS:
        chosen = [row for row, split in zip(kept, names, strict=True) if split == name]
        result.splits[name] = [row.conversation for row in chosen]
        result.origins[name] = [row.origin for row in chosen]
        result.lengths[name] = [row.length for row in chosen]
    if result.kept + len(result.rejected) != loaded.counts["read"]:
        raise AssertionError("a row got lost: kept + rejected is not what was read")
    return result


def _reject(row: _Row, reason: str, result: Prepared, options: Options) -> None:
    if options.strict:
        raise UserError(f"{row.origin[0]}, row {row.origin[1]}: {reason}; mend the row, or leave --strict out")
    result.rejected.append(Rejected(*row.origin, reason, row.conversation))


def _checked(rows: list[_Row], result: Prepared, options: Options) -> list[_Row]:
    kept = []
    for row in rows:
        problems = check_conversation(row.conversation)
        errors = [problem.text for problem in problems if problem.error]
        if errors:
            _reject(row, "; ".join(errors), result, options)
            continue
        for kind in {problem.kind for problem in problems}:
            result.warnings.setdefault(kind, []).append(f"{row.origin[0]}, row {row.origin[1]}")
        kept.append(row)
    return kept


def _without_copies(rows: list[_Row], result: Prepared, options: Options) -> list[_Row]:
    first: dict[bytes, tuple[str, int]] = {}
    kept = []
    for row in rows:
        original = first.setdefault(exact_key(row.conversation), row.origin)
        if original is row.origin:
            kept.append(row)
        else:
            _reject(row, f"the same as {original[0]}, row {original[1]}", result, options)
    return kept


def _without_near_copies(rows, groups, result: Prepared, options: Options) -> tuple[list[_Row], list[int]]:
    kept: list[_Row] = []
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        if group == index:
            kept.append(row)
        else:
            source, number = rows[group].origin
            _reject(row, f"nearly the same as {source}, row {number}", result, options)
    return kept, list(range(len(kept)))


def _fitted(rows: list[_Row], result: Prepared, options: Options, tokenizer, fmt) -> list[_Row]:
    from finetune.encoding.encode import encode_conversations
    from finetune.encoding.rows import without_oldest_turns

    encoded = encode_conversations(
        [row.conversation for row in rows],
        tokenizer,
        fmt,
        max_seq_length=options.max_seq_length,
        train_on=options.train_on,
        control_tokens=options.control_tokens,
        overlong=options.overlong,
        num_proc=options.num_proc,
        origins=[row.origin for row in rows],
    )
    result.encoding_report = encoded.report
    result.unit = "tokens"
    reasons = dict(reversed(encoded.left_out))
    lengths: dict[int, int] = {}
    for index, length in zip(encoded.rows.tolist(), (encoded.offsets[1:] - encoded.offsets[:-1]).tolist(), strict=True):
        lengths[index] = max(length, lengths.get(index, 0))
    kept = []
    for index, row in enumerate(rows):
        if index not in lengths:
            _reject(row, f"format {fmt.name}: {reasons[index]}", result, options)
            continue
        removed = encoded.turns_removed.get(index, 0)
        result.turns_removed += removed
        conversation = without_oldest_turns(row.conversation, removed) if removed else row.conversation
        kept.append(_Row(conversation, row.origin, lengths[index]))
    return kept
