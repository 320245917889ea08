"""The verb `prepare`: read, normalise, check, deduplicate, fit to a length, split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.encoding.options import DEFAULT_OPTIONS, EncodingOptions
from finetune.encoding.rows import without_oldest_turns
from finetune.errors import UserError
from finetune.preparing.checks import ERROR_KINDS, check_conversation, exact_key
from finetune.preparing.related_rows import continued_conversations
from finetune.preparing.splits import SPLITS, near_duplicate_groups, parse_ratios, split_conversations, split_groups
from finetune.reading.conversations import load_conversations
from finetune.reading.load_result import LoadResult, Rejected, SourceRow
from finetune.reading.sources import parse_spec

MAX_KIND_LENGTH = 160
# Fields of PrepareOptions that reading takes.
READING_OPTIONS = ("strict", "limit", "column_map", "tools", "where", "include_rejected")


@dataclass
class PrepareOptions:
    """The options of `prepare`; see the flags of prepare_data.py."""

    strict: bool = False
    dedupe: bool = False
    split: str = "80/10/10"
    seed: int = 0
    limit: int | None = None
    column_map: dict[str, str] | None = None
    tools: list[dict[str, Any]] | None = None
    encoding: EncodingOptions = DEFAULT_OPTIONS
    model_positions: int | None = None  # longer rows are kept with a warning: training omits them
    num_proc: int | None = None
    where: dict[str, list[str]] | None = None
    include_rejected: bool = False


@dataclass
class Prepared:
    """The result, ready to be written.

    splits    split -> canonical conversations
    rejected  rejected rows, in the order they were found
    warnings  kind of problem -> its rows, which are kept
    lengths   split -> length of each conversation in tokens, or in characters without a tokenizer (`unit`)
    """

    loaded: LoadResult
    splits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    unit: str = "characters"
    near_duplicates: int = 0
    turns_removed: int = 0
    empty_splits: list[str] = field(default_factory=list)  # that were asked for
    encoding_report: dict[str, Any] | None = None

    @property
    def kept(self) -> int:
        return sum(map(len, self.splits.values()))

    @property
    def remedy(self) -> str:
        """What to do about calls of undeclared tools; "" where there are none."""
        if not any(row.kind == ERROR_KINDS["undeclared tool"] for row in self.rejected):
            return ""
        column = next(iter(self.loaded.unread_tool_columns()), "COLUMN")
        return f"give the tools with --tools FILE, or map the column that holds them with --map {column}=tools"


class NoRowsLeftError(UserError):
    """Every row was rejected; `rejected` holds them, and the text names the three commonest kinds."""

    def __init__(self, message: str, result: Prepared):
        kinds = count_kinds(result.rejected)[:3]
        texts = [f"{number:,} {kind} (first: {row.source}, row {row.row})" for kind, number, row in kinds]
        remedy = result.remedy
        super().__init__(f"{message}{': ' if texts else ''}{', '.join(texts)}{'; ' if remedy else ''}{remedy}")
        self.rejected = result.rejected


@dataclass
class _Row:
    conversation: dict[str, Any]
    origin: tuple[str, int]
    length: int

    def __str__(self) -> str:
        return f"{self.origin[0]}, row {self.origin[1]}"


def prepare(
    specs: Sequence[str], options: PrepareOptions, *, tokenizer=None, fmt=None, rows: Iterable[SourceRow] | None = None
) -> Prepared:
    """Run the whole preparation in memory. Raises UserError (bad source, bad row if `strict`, no rows left).

    With a tokenizer and a format, lengths are in tokens, and rows that are longer than `max_seq_length` or that the
    format cannot express are rejected.
    """
    ratios = parse_ratios(options.split)
    for spec in specs:
        if parse_spec(spec).weight != 1:
            raise UserError(f"{spec}: weights belong to training; here every row is kept or rejected exactly once")
    reading = {name: getattr(options, name) for name in READING_OPTIONS}
    loaded = load_conversations(specs, rows=rows, refuse_marked_splits=True, **reading)
    result = Prepared(loaded, rejected=list(loaded.rejected))
    kept = [
        _Row(conversation, origin, len(json.dumps(conversation, ensure_ascii=False)))
        for conversation, origin in zip(loaded.conversations, loaded.origins, strict=True)
    ]
    kept = _check(kept, result, options)
    kept = _deduplicate(kept, result, options)
    if tokenizer is not None:
        kept = _fit_to_length(kept, result, options, tokenizer, fmt)
    if not kept:
        raise NoRowsLeftError(f"{', '.join(specs) or 'database'}: no rows left of {loaded.counts['read']} read", result)
    groups = near_duplicate_groups([row.conversation for row in kept])
    if options.dedupe:
        kept = _deduplicate_near(kept, groups, result, options)
        groups = list(range(len(kept)))
    result.near_duplicates = len(groups) - len(set(groups))
    groups = split_groups([row.conversation for row in kept], groups)
    names = split_conversations([row.conversation for row in kept], groups, ratios, options.seed)
    result.empty_splits = [name for name, ratio in zip(SPLITS, ratios, strict=True) if ratio and name not in names]
    for name in SPLITS:
        chosen = [row for row, split in zip(kept, names, strict=True) if split == name]
        result.splits[name] = [row.conversation for row in chosen]
        result.lengths[name] = [row.length for row in chosen]
    if result.kept + len(result.rejected) != loaded.counts["read"]:
        raise AssertionError("kept + rejected rows must be the rows read")
    return result


def _reject(row: _Row, reason: str, result: Prepared, options: PrepareOptions, kind: str = "") -> None:
    if options.strict:
        raise UserError(f"{row}: {reason}; fix the row, or omit --strict")
    result.rejected.append(Rejected(*row.origin, reason, row.conversation, kind))


def _check(rows: list[_Row], result: Prepared, options: PrepareOptions) -> list[_Row]:
    kept = []
    for row in rows:
        problems = check_conversation(row.conversation)
        errors = [problem for problem in problems if problem.error]
        if errors:
            kind = ERROR_KINDS.get(errors[0].kind, errors[0].kind)
            _reject(row, "; ".join(problem.text for problem in errors), result, options, kind)
            continue
        for kind in {problem.kind for problem in problems}:
            result.warnings.setdefault(kind, []).append(str(row))
        kept.append(row)
    return kept


def _deduplicate(rows: list[_Row], result: Prepared, options: PrepareOptions) -> list[_Row]:
    first: dict[bytes, _Row] = {}
    for row in rows:
        original = first.setdefault(exact_key(row.conversation), row)
        if original is not row:
            _reject(row, f"duplicate of {original}", result, options, kind="duplicates")
    return list(first.values())


def _deduplicate_near(rows: list[_Row], groups: list[int], result: Prepared, options: PrepareOptions) -> list[_Row]:
    """Reject all but the first row of each group, and the rows that continue its conversation."""
    conversation_of = continued_conversations([row.conversation for row in rows])
    kept = []
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        if group == index or conversation_of[index] == conversation_of[group]:
            kept.append(row)
        else:
            _reject(row, f"near-duplicate of {rows[group]}", result, options, kind="near-duplicates")
    return kept


def _fit_to_length(rows: list[_Row], result: Prepared, options: PrepareOptions, tokenizer, fmt) -> list[_Row]:
    from finetune.encoding.encode import encode_conversations

    conversations, origins = [row.conversation for row in rows], [row.origin for row in rows]
    encoded = encode_conversations(
        conversations, tokenizer, fmt, options.encoding, num_proc=options.num_proc, origins=origins
    )
    result.encoding_report = encoded.report
    result.unit = "tokens"
    reasons = dict(reversed(encoded.left_out))
    lengths: dict[int, int] = {}
    for index, length in zip(encoded.rows.tolist(), (encoded.offsets[1:] - encoded.offsets[:-1]).tolist(), strict=True):
        lengths[index] = max(length, lengths.get(index, 0))
    for index, warning in encoded.warned:
        result.warnings.setdefault(warning, []).append(str(rows[index]))
    kept = []
    for index, row in enumerate(rows):
        if index not in lengths:
            _reject(row, f"format {fmt.name}: {reasons[index]}", result, options)
            continue
        removed = encoded.turns_removed.get(index, 0)
        result.turns_removed += removed
        if options.model_positions is not None and lengths[index] > options.model_positions:
            reason = f"longer than the model's {options.model_positions:,} positions; training omits it"
            result.warnings.setdefault(reason, []).append(str(row))
        conversation = without_oldest_turns(row.conversation, removed) if removed else row.conversation
        kept.append(replace(row, conversation=conversation, length=lengths[index]))
    return kept


def reason_kind(row: Rejected) -> str:
    """The kind of a rejected row: that of its check, or the reason without its numbers, names and values."""
    if row.kind:
        return row.kind
    reason = re.sub(r"messages? \d+( and \d+)?:? ?", "", row.reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    reason = re.sub(r"(call of|parameters of tool) [^\s:]+", r"\1 …", reason)
    reason = re.sub(r"\(its columns: [^)]*\)", "(its columns: …)", reason)
    return re.sub(r"\d+", "N", reason)[:MAX_KIND_LENGTH]


def count_kinds(rejected: Iterable[Rejected]) -> list[tuple[str, int, Rejected]]:
    """(kind, number of rows, its first row), the most frequent kind first."""
    found: dict[str, list[Rejected]] = {}
    for row in rejected:
        found.setdefault(reason_kind(row), []).append(row)
    return sorted(((kind, len(rows), rows[0]) for kind, rows in found.items()), key=lambda item: -item[1])
