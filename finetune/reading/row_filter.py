"""Which rows of a source are read: `--where COLUMN=VALUE`, and columns that mark the split of a row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune.errors import UserError
from finetune.progress import counted

SPLIT_NAMES = frozenset(("train", "training", "validation", "valid", "val", "eval", "dev", "test"))


def parse_where(conditions: Sequence[str] | None) -> dict[str, list[str]]:
    """`["split=train"]` -> {"split": ["train"]}. Raises UserError."""
    where: dict[str, list[str]] = {}
    for condition in conditions or ():
        column, separator, value = condition.partition("=")
        if not column or not separator:
            raise UserError(f"--where {condition}: write COLUMN=VALUE, as in --where split=train")
        where.setdefault(column, []).append(value)
    return where


class RowFilter:
    """Chooses the rows that have one of the given values in each of the given columns.

    skipped  number of rows that were not chosen
    """

    def __init__(self, where: dict[str, list[str]], *, refuse_marked_splits: bool):
        self.where = where
        self.skipped = self._chosen = 0
        self._columns_seen: set[str] = set()
        self._refuse = refuse_marked_splits
        self._marks: dict[tuple[str, str], Counter | None] = {}  # None: holds something else than splits

    def chooses(self, source: str, row: Any) -> bool:
        """Whether the row is read; a row that is not an object is, so that it is reported."""
        if not isinstance(row, dict):
            return True
        self._columns_seen.update(column for column in self.where if column in row)
        if not all(_as_text(row.get(column)) in values for column, values in self.where.items()):
            self.skipped += 1
            return False
        self._chosen += 1
        if self._refuse:
            self._note_marks(source, row)
        return True

    def check(self) -> None:
        """Raise UserError for a column that no row has, and for rows of several splits."""
        for column in self.where:
            if column not in self._columns_seen:
                raise UserError(f"--where: no row has a column {column!r}; check its name")
        if self.skipped and not self._chosen:
            wanted = " ".join(f"{column}={value}" for column, values in self.where.items() for value in values)
            read = counted(self.skipped, "row")
            raise UserError(f"--where {wanted}: no row has this value ({read} read); check its spelling")
        for (source, column), counts in self._marks.items():
            if counts and len(counts) > 1:
                found = ", ".join(f"{number} {name}" for name, number in counts.most_common())
                raise UserError(
                    f"{source}: the column {column!r} marks the split of each row ({found}); "
                    f"choose one with --where {column}={counts.most_common(1)[0][0]}"
                )

    def _note_marks(self, source: str, row: dict[str, Any]) -> None:
        for column, value in row.items():
            key = source, column
            if value is None or column in self.where or self._marks.get(key, 0) is None:
                continue
            if isinstance(value, str) and value.strip().lower() in SPLIT_NAMES:
                self._marks.setdefault(key, Counter())[value] += 1
            else:
                self._marks[key] = None


def _as_text(value: Any) -> str | None:
    """A cell as it is written after the "=": text as it is, other values as JSON; None for an absent one."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
