"""The order of the rows of an epoch, as the steps they make: one shuffle, or rows with the same tools together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def tool_sets(conversations: Sequence[dict[str, Any]], rows: Sequence[int]) -> np.ndarray:
    """int64 [len(rows)]: a number per set of tools; equal numbers where conversations[rows[i]] carry equal tools."""
    numbers: dict[bytes, int] = {}
    of_conversation: dict[int, int] = {}
    for row in rows:
        row = int(row)
        if row not in of_conversation:
            text = json.dumps(conversations[row].get("tools") or [], sort_keys=True)
            key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            of_conversation[row] = numbers.setdefault(key, len(numbers))
    return np.array([of_conversation[int(row)] for row in rows], dtype=np.int64)


def steps_of_epoch(rows: int, step_rows: int, rng: np.random.Generator, groups: np.ndarray | None = None) -> list[list]:
    """All rows of an epoch, each exactly once, in ceil(rows / step_rows) steps; only the last may be short.

    groups: int64 [rows]; rows of one group come into as few steps as possible, shuffled within their group, the groups
    and the steps shuffled too. None: one shuffle of everything.
    """
    order = rng.permutation(rows)
    if groups is None:
        order = order.tolist()
        return [order[start : start + step_rows] for start in range(0, rows, step_rows)]
    members: dict[int, list[int]] = {}
    for row in order.tolist():
        members.setdefault(int(groups[row]), []).append(row)
    chunks = [m[start : start + step_rows] for m in members.values() for start in range(0, len(m), step_rows)]
    # First fit, largest first: few groups are cut. Chunks of one size stay in shuffled order, so that other groups meet
    # in each epoch. by_room[r] holds the steps that have room for r more rows.
    chunks.sort(key=len, reverse=True)
    by_room: list[list[list[int]]] = [[] for _ in range(step_rows + 1)]
    for chunk in chunks:
        room = next((r for r in range(len(chunk), step_rows) if by_room[r]), None)
        step = by_room[room].pop() if room is not None else []
        step.extend(chunk)
        by_room[step_rows - len(step)].append(step)
    full = by_room[0]
    rest = [row for room in by_room[1:] for step in room for row in step]
    full += [rest[start : start + step_rows] for start in range(0, len(rest), step_rows)]
    short = full.pop() if len(full[-1]) < step_rows else None
    steps = [full[i] for i in rng.permutation(len(full))]
    return steps if short is None else [*steps, short]
