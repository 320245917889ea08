"""The order of an epoch's rows and the steps they form: one shuffle, rows with the same tools in one step, or the rows
of each kind of answer spread evenly over the steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from formats.base import call_of


class Groups(NamedTuple):
    """numbers: int64 [rows], the group of each row; together: whether the rows of a group belong in one step."""

    numbers: np.ndarray
    together: bool


def groups_for(order: str, conversations: Sequence[dict[str, Any]], rows: Sequence[int]) -> Groups | None:
    """The groups of conversations[rows[0]], conversations[rows[1]], … for a value of --order."""
    if order == "shuffle":
        return None
    key = tool_set if order == "group_tools" else kind_of_answer
    keys = {row: key(conversations[row]) for row in set(map(int, rows))}
    number_of: dict[Hashable, int] = {}
    numbers = [number_of.setdefault(keys[int(row)], len(number_of)) for row in rows]
    return Groups(np.array(numbers, dtype=np.int64), together=order == "group_tools")


def tool_set(conversation: dict[str, Any]) -> bytes:
    """A digest that is equal for equal tools."""
    text = json.dumps(conversation.get("tools") or [], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def kind_of_answer(conversation: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The number of answers and, of the last one, the names of its calls, else its first two words."""
    answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
    last = answers[-1] if answers else {}
    calls = tuple(call_of(call)["name"] for call in last.get("tool_calls") or ())
    return len(answers), calls or tuple(str(last.get("content") or "").split()[:2])


def steps_of_epoch(
    rows: int, step_rows: int, rng: np.random.Generator, groups: Groups | None = None
) -> list[list[int]]:
    """Every row of an epoch exactly once, in ceil(rows / step_rows) steps; only the last may have fewer rows.

    Of groups that belong together, the rows are distributed over as few steps as possible and shuffled within it, then
    the steps are shuffled. Of other groups every stretch of the epoch has the same share. None: one shuffle of all.
    """

    def chunks_of(items: list[int]) -> list[list[int]]:
        return [items[start : start + step_rows] for start in range(0, len(items), step_rows)]

    order = rng.permutation(rows).tolist()
    if groups is None:
        return chunks_of(order)
    members: dict[int, list[int]] = {}
    for row in order:
        members.setdefault(int(groups.numbers[row]), []).append(row)
    if not groups.together:
        places = {  # of n rows, one in each n-th of the epoch, all at the same distance
            row: (number + start) / len(group)
            for group, start in zip(members.values(), rng.random(len(members)), strict=True)
            for number, row in enumerate(group)
        }
        return chunks_of(sorted(order, key=places.__getitem__))
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
    groups: Groups | None = None
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.step_rows)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for step in steps_of_epoch(self.rows, self.step_rows, rng, self.groups):
            yield step[self.rank :: self.world_size]
