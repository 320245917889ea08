"""Near-duplicates and splits: rows that ask nearly the same never stand on both sides of a split."""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

from finetune.errors import UserError
from finetune.preparing.checks import called_tool
from finetune.reading.conversations import LoadResult

SPLITS = ("train", "validation", "test")
SIMILARITY = 0.8  # Jaccard similarity of shingles from which two requests count as nearly the same
_BANDS, _ROWS = 16, 4  # of the MinHash signature: finds 99.98 % of pairs at similarity 0.8 (1 - (1 - 0.8^4)^16)
_SPACE = re.compile(r"\s+")


def request_text(conversation: dict[str, Any]) -> str:
    """What the user asked, all turns, in lower case with single spaces: two rows alike here leak into each other."""
    text = " ".join(m["content"] for m in conversation["messages"] if m["role"] == "user")
    return _SPACE.sub(" ", text).strip().lower()


def shingles(text: str) -> frozenset[int]:
    """Overlapping pieces of 5 characters (of 3 words where a text is long), the set that similarity is measured on.

    Each piece stands as its CRC-32, which is the same in every process and quick to compare.
    """
    if len(text) > 2000:
        words = text.split(" ")
        pieces = (" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
    else:
        pieces = (text[i : i + 5] for i in range(max(1, len(text) - 4)))
    return frozenset(zlib.crc32(piece.encode("utf-8")) for piece in pieces)


def near_duplicate_groups(conversations: Sequence[dict[str, Any]], threshold: float = SIMILARITY) -> list[int]:
    """A group number for each conversation; equal for conversations whose requests are nearly the same.

    Candidates come from MinHash bands (datasketch; Broder 1997), every pair is then measured exactly. Groups are
    the connected pieces, so a chain of near-duplicates stays together. Numbers are those of the first member.
    """
    texts: dict[str, int] = {}
    parent = list(range(len(conversations)))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(a: int, b: int) -> None:
        a, b = find(a), find(b)
        parent[max(a, b)] = min(a, b)

    for index, conversation in enumerate(conversations):
        if text := request_text(conversation):  # rows in which nobody asks anything are not alike for that
            join(texts.setdefault(text, index), index)
    sets = {index: shingles(text) for text, index in texts.items()}
    for bucket in _buckets(sets):
        # Compared with one member of each group met so far in this bucket: thousands of copies stay linear.
        seen: list[int] = []
        for item in bucket:
            matching = [other for other in seen if find(other) == find(item)]
            for other in seen if not matching else ():
                if find(other) != find(item) and _similar(sets[item], sets[other], threshold):
                    join(item, other)
                    matching.append(other)
            if not matching:
                seen.append(item)
    return [find(index) for index in range(len(conversations))]


def _similar(a: frozenset, b: frozenset, threshold: float) -> bool:
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
        return False
    common = len(a & b)
    return common >= threshold * (len(a) + len(b) - common)


def _buckets(sets: dict[int, frozenset]) -> list[list[int]]:
    """Items that agree in one whole band of their signature, in ascending order."""
    from datasketch import MinHash

    items = list(sets)
    signatures = MinHash.generator(sets.values(), num_perm=_BANDS * _ROWS, seed=1, hashfunc=int)
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for item, signature in zip(items, signatures, strict=True):
        for band in range(_BANDS):
            values = signature.hashvalues[band * _ROWS : (band + 1) * _ROWS]
            buckets[band, values.tobytes()].append(item)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def parse_ratios(text: str) -> tuple[float, ...]:
    """`80/10/10` -> shares of train, validation and test. Raises UserError."""
    from finetune.errors import UserError

    try:
        numbers = [float(word) for word in text.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SPLITS) or not all(0 <= number < inf for number in numbers) or numbers[0] <= 0:
        raise UserError(f"--split {text}: write three shares for train, validation and test, as in 80/10/10")
    return tuple(number / sum(numbers) for number in numbers)


def split_conversations(
    conversations: Sequence[dict[str, Any]], groups: Sequence[int], ratios: Sequence[float], seed: int = 0
) -> list[str]:
    """The split of each conversation: whole groups together, each tool in the given shares as far as groups allow.

    Per tool (the group's most frequent first call) groups are dealt, large ones first and equals in seeded order, to
    the split that lacks most; what rounding leaves over is carried to the next tool, so totals come out right too.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for indices in members.values():
        tools = Counter(called_tool(conversations[index]) for index in indices)
        strata[min(tools, key=lambda tool: (-tools[tool], tool))].append(indices)
    rng = random.Random(seed)
    lacking = [0.0] * len(ratios)
    result = [SPLITS[0]] * len(conversations)
    for tool in sorted(strata, key=lambda tool: (-sum(map(len, strata[tool])), tool)):
        dealt = strata[tool]
        rng.shuffle(dealt)
        dealt.sort(key=len, reverse=True)
        total = sum(map(len, dealt))
        lacking = [lack + ratio * total for lack, ratio in zip(lacking, ratios, strict=True)]
        for indices in dealt:
            split = max((s for s in range(len(ratios)) if ratios[s] > 0), key=lambda s: lacking[s])
            lacking[split] -= len(indices)
            for index in indices:
                result[index] = SPLITS[split]
    return result


def split_off(loaded: LoadResult, fraction: float, seed: int) -> tuple[LoadResult, LoadResult]:
    """(train, held out): about `fraction` of the rows, drawn by `seed`; equal requests stay on one side.

    Raises UserError when a side would be empty.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, conversation in enumerate(loaded.conversations):
        groups[request_text(conversation)].append(number)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, round(fraction * len(loaded.conversations)))
    held: set[int] = set()
    for group in order:
        if len(held) >= wanted:
            break
        held.update(group)
    if not held or len(held) == len(loaded.conversations):
        raise UserError(
            f"--eval_fraction {fraction} leaves no rows on one side of the split ({len(loaded.conversations)} rows, "
            f"{len(groups)} different requests); add rows or name an --eval_dataset"
        )
    return _part(loaded, held, keep=False), _part(loaded, held, keep=True)


def _part(loaded: LoadResult, numbers: set[int], *, keep: bool) -> LoadResult:
    chosen = [i for i in range(len(loaded.conversations)) if (i in numbers) == keep]
    digest = hashlib.sha256(f"{loaded.fingerprint}:{chosen}".encode()).hexdigest()
    return replace(
        loaded,
        conversations=[loaded.conversations[i] for i in chosen],
        origins=[loaded.origins[i] for i in chosen],
        fingerprint=digest,
    )
