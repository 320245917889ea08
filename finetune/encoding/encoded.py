"""Ids and labels of a data set in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from formats import IGNORE_INDEX


class Sequences(Sequence):
    """Read-only list of (input_ids, labels), both lists of int of equal length, cut out of flat arrays on access."""

    def __init__(self, input_ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray):
        self._ids, self._trained, self._offsets = input_ids, trained, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = slice(self._offsets[index], self._offsets[index + 1])
        ids = self._ids[part]
        return ids.tolist(), np.where(self._trained[part], ids, IGNORE_INDEX).tolist()


@dataclass
class EncodedRows:
    """All sequences of a data set in flat arrays.

    input_ids      int32 (tokens,)       the ids of all sequences, concatenated
    trained        bool (tokens,)        whether a token's label is its id (else IGNORE_INDEX)
    offsets        int64 (sequences+1,)  where each sequence starts, and the total
    rows           int32 (sequences,)    index of the conversation each sequence comes from
    report         what was read, kept, split, omitted and why, tokens by role (JSON-able; see docs/data.md)
    left_out       (index of the conversation, reason) of every conversation or sequence that is not trained
    warned         (index of the conversation, warning) of conversations that are trained without a part of them
    turns_removed  number of oldest turns removed from a conversation, by its index (only with trim_turns)
    longest_row    index of the conversation with the longest sequence, -1 when there is none
    """

    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    report: dict[str, Any]
    left_out: list[tuple[int, str]] = field(default_factory=list)
    warned: list[tuple[int, str]] = field(default_factory=list)
    turns_removed: dict[int, int] = field(default_factory=dict)
    longest_row: int = -1

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.input_ids, self.trained, self.offsets)
