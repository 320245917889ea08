"""Which prompts share a prefix, and which are answered in one batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

MIN_PREFIX_TOKENS = 16  # a shorter common prefix is not worth its own forward pass
GROUP_COST_TOKENS = 64  # the time of one more group, in tokens
MAX_CACHE_TOKENS = 32768  # suffix tokens kept for one batch: bounds the memory of keys and values


@dataclass
class Group:
    """Rows (indices of prompts) with the same first `prefix_length` ids; 0 when nothing is shared."""

    rows: list[int]
    prefix_length: int


def plan_groups(prompts: Sequence[list[int]], rows: Sequence[int] | None = None) -> list[Group]:
    """Group prompts (those of `rows`) by common prefix so that few tokens are computed.

    Every row keeps a suffix of at least one token. Sorted by ids, prompts with a common prefix are neighbours. A range
    of them is one group unless it is cheaper to cut it where the common prefix is shortest.
    """
    order = sorted(range(len(prompts)) if rows is None else rows, key=lambda row: prompts[row])
    common = [_common_length(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]

    def prefix_of(start: int, end: int) -> int:
        shortest = min(len(prompts[order[i]]) for i in range(start, end))
        shared = min([*common[start : end - 1], shortest - 1]) if end - start > 1 else 0
        return shared if shared >= MIN_PREFIX_TOKENS else 0

    def cost(start: int, end: int) -> int:
        shared = prefix_of(start, end)
        return shared + sum(len(prompts[order[i]]) - shared for i in range(start, end)) + GROUP_COST_TOKENS

    groups, ranges = [], [(0, len(order))] if order else []
    while ranges:
        start, end = ranges.pop()
        if end - start > 1:
            shortest = min(common[start : end - 1])
            cuts = [i + 1 for i in range(start, end - 1) if common[i] == shortest]
            parts = list(itertools.pairwise([start, *cuts, end]))
            if sum(cost(*part) for part in parts) < cost(start, end):
                ranges.extend(reversed(parts))
                continue
        groups.append(Group([order[i] for i in range(start, end)], prefix_of(start, end)))
    return groups


def _common_length(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def plan_batches(
    prompts: Sequence[list[int]], rows: Sequence[int], batch_size: int, max_new_tokens: int
) -> list[list[tuple[Group, list[int]]]]:
    """Batches of (group, some of its rows), up to `batch_size` rows and MAX_CACHE_TOKENS each."""
    batches, current, count, longest = [], [], 0, 0
    for group in plan_groups(prompts, rows):
        for row in sorted(group.rows, key=lambda i: len(prompts[i])):  # similar lengths need little padding
            tokens = len(prompts[row]) - group.prefix_length + max_new_tokens
            if count and (count == batch_size or max(longest, tokens) * (count + 1) > MAX_CACHE_TOKENS):
                batches.append(current)
                current, count, longest = [], 0, 0
            if not current or current[-1][0] is not group:
                current.append((group, []))
            current[-1][1].append(row)
            count, longest = count + 1, max(longest, tokens)
    return [*batches, current] if current else batches
