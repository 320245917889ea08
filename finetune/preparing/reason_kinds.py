"""Reasons for rejecting rows, counted by kind: the same problem in many rows is one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetune.reading.load_result import Rejected

MAX_LENGTH = 160


def reason_kind(row: Rejected) -> str:
    """The kind of a rejected row: that of its check, or the reason without its numbers, names and values."""
    if row.kind:
        return row.kind
    reason = re.sub(r"messages? \d+( and \d+)?:? ?", "", row.reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    reason = re.sub(r"(call of|parameters of tool) [^\s:]+", r"\1 …", reason)
    reason = re.sub(r"\(its columns: [^)]*\)", "(its columns: …)", reason)
    return re.sub(r"\d+", "N", reason)[:MAX_LENGTH]


def count_kinds(rejected: Iterable[Rejected]) -> list[tuple[str, int, Rejected]]:
    """(kind, number of rows, its first row), the most frequent kind first."""
    found: dict[str, list[Rejected]] = {}
    for row in rejected:
        found.setdefault(reason_kind(row), []).append(row)
    return sorted(((kind, len(rows), rows[0]) for kind, rows in found.items()), key=lambda item: -item[1])
