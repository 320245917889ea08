"""The order of an epoch's rows and the steps they form: one shuffle, or rows with the same tools together."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def tool_sets(conversations: Sequence[dict[str, Any]], rows: Sequence[int]) -> np.ndarray:
    """int64 [len(rows)]: equal numbers where conversations[rows[i]] have equal tools."""
    numbers: dict[bytes, int] = {}
    number_of: dict[int, int] = {}
    for row in map(int, rows):
        if row not in number_of:
            text = json.dumps(conversations[row].get("tools") or [], sort_keys=True)
            key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            number_of[row] = numbers.setdefault(key, len(numbers))
    return np.array([number_of[int(row)] for row in rows], dtype=np.int64)


def steps_of_epoch(
    rows: int, step_rows: int, rng: np.random.Generator, groups: np.ndarray | None = None
) -> list[list[int]]:
    """Every row of an epoch exactly once, in ceil(rows / step_rows) steps; only the last may have fewer rows.

    groups: int64 [rows]; the rows of a group are distributed over as few steps as possible and shuffled within it, then
    the steps are shuffled. None: one shuffle of all rows.
    """

    def chunks_of(items: list[int]) -> list[list[int]]:
        return [items[start : start + step_rows] for start in range(0, len(items), step_rows)]

    order = rng.permutation(rows).tolist()
    if groups is None:
        return chunks_of(order)
    members: dict[int, list[int]] = {}
    for row in order:
        members.setdefault(int(groups[row]), []).append(row)
    chunks = [chunk for group in members.values() for chunk in chunks_of(group)]
    # First fit, largest first: few groups are split. Chunks of equal size stay in shuffled order, so that each epoch
    # combines other groups. by_room[r] holds the steps that have room for r more rows.
    chunks.sort(key=len, reverse=True)
    by_room: list[list[list[int]]] = [[] for _ in range(step_rows + 1)]
    for chunk in chunks:
        room = next((r for r in range(len(chunk), step_rows) if by_room[r]), None)
        step = by_room[room].pop() if room is not None else []
        step.extend(chunk)
        by_room[step_rows - len(step)].append(step)
    steps = by_room[0] + chunks_of([row for room in by_room[1:] for step in room for row in step])
    short = [steps.pop()] if len(steps[-1]) < step_rows else []
    return [steps[i] for i in rng.permutation(len(steps))] + short


@dataclass(eq=False)
class StepSampler:
    """Row numbers of each optimizer step; the order depends on (seed, epoch) only, so a resumed run repeats it.

    In a data-parallel run every rank takes its slice of the same steps, so the number of ranks does not change a step's
    rows; a rank's slice of a short last step may be empty. groups: as in `steps_of_epoch`.
    """

    rows: int
    step_rows: int
    seed: int
    rank: int = 0
    world_size: int = 1
    groups: np.ndarray | None = None
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.step_rows)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for step in steps_of_epoch(self.rows, self.step_rows, rng, self.groups):
            yield step[self.rank :: self.world_size]
