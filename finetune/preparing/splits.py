"""Near-duplicates and splits: near-duplicate rows are always in the same split."""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from operator import itemgetter
from typing import Any

from finetune.errors import UserError
from finetune.packages import without_scipy_integrate
from finetune.preparing.checks import called_tool
from finetune.preparing.related_rows import Groups, continued_conversations, own_texts
from finetune.progress import counted
from finetune.reading.load_result import LoadResult

SPLITS = ("train", "validation", "test")
MIN_SIMILARITY = 0.8  # Jaccard similarity of shingles from which two requests count as near-duplicates
# Bands, and hashes per band, of MinHash LSH: finds 99.98 % of pairs at similarity 0.8 (1 - (1 - 0.8^4)^16).
LSH_BANDS, LSH_BAND_HASHES = 16, 4
# Of 64 hashes, at similarity 0.8 fewer than 40 are shared by 0.03 % of pairs; at 0.45 at least 40 by 0.4 %.
MIN_SHARED_HASHES = 40
MIN_WORD_SHINGLES = 500  # characters of a text from which shingles are of words, if it has spaces
MAX_CHARACTERS_PER_WORD = 12
MAX_CHARACTER_SHINGLES = 2000  # characters of a text from which shingles are of words
_SPACE = re.compile(r"\s+")


def request_text(conversation: dict[str, Any]) -> str:
    """What the user asked in all turns, in lower case with single spaces."""
    text = " ".join(m["content"] for m in conversation["messages"] if m["role"] == "user")
    return _SPACE.sub(" ", text).strip().lower()


def shingles(text: str) -> frozenset[int]:
    """CRC-32 of all overlapping pieces of 5 characters; of 2 words in a longer text, of 3 in a long one.

    Few words make all pieces of characters that a longer text has, so that unlike texts would look alike.
    """
    words = text.split(" ")
    is_longer = len(text) > MIN_WORD_SHINGLES and len(words) * MAX_CHARACTERS_PER_WORD > len(text)
    if is_longer or len(text) > MAX_CHARACTER_SHINGLES:
        size = 3 if len(text) > MAX_CHARACTER_SHINGLES else 2
        pieces = (" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
    else:
        pieces = (text[i : i + 5] for i in range(max(1, len(text) - 4)))
    return frozenset(zlib.crc32(piece.encode("utf-8")) for piece in pieces)


def near_duplicate_groups(conversations: Sequence[dict[str, Any]]) -> list[int]:
    """The group of each conversation, named by the index of its first member; near-duplicates share a group.

    What most requests share is omitted first. MinHash LSH proposes candidates, whose similarity is then computed
    exactly. Groups are connected components, so a chain of near-duplicates is one group.
    """
    texts: dict[str, int] = {}
    groups = Groups(len(conversations))
    for index, conversation in enumerate(conversations):
        if text := request_text(conversation):  # rows without a user's text are not near-duplicates of each other
            groups.join(texts.setdefault(text, index), index)
    sets = {index: shingles(own) for own, index in zip(own_texts(list(texts)), texts.values(), strict=True)}
    signatures, buckets = _lsh_buckets(sets)
    for bucket in buckets:
        # Compare with one member of each group seen in this bucket: linear for thousands of near-duplicates.
        seen: list[int] = []
        compared = signatures[bucket]  # its first rows become the signatures of those seen
        for item, signature in zip(bucket, signatures[bucket], strict=True):
            joined = False
            for place in _alike(compared[: len(seen)], signature):
                other = seen[place]
                if groups.find(other) != groups.find(item) and _are_similar(sets[item], sets[other]):
                    groups.join(item, other)
                joined = joined or groups.find(other) == groups.find(item)
            if not joined:
                compared[len(seen)] = signature
                seen.append(item)
    return groups.names()


def _are_similar(a: frozenset, b: frozenset) -> bool:
    if min(len(a), len(b)) < MIN_SIMILARITY * max(len(a), len(b)):
        return False
    common = len(a & b)
    return common >= MIN_SIMILARITY * (len(a) + len(b) - common)


def _alike(signatures: Any, signature: Any) -> list[int]:
    """The places of the signatures that are as similar as those of near-duplicates, without most of the others."""
    return (((signatures == signature).sum(axis=1)) >= MIN_SHARED_HASHES).nonzero()[0].tolist()


def _lsh_buckets(sets: dict[int, frozenset[int]]) -> tuple[Any, list[list[int]]]:
    """(MinHash signatures by item, items that share a band of theirs): items and buckets in ascending order."""
    import numpy as np

    with without_scipy_integrate():
        from datasketch import MinHash, MinHashLSH

    hashes = LSH_BANDS * LSH_BAND_HASHES
    index = MinHashLSH(num_perm=hashes, params=(LSH_BANDS, LSH_BAND_HASHES))
    made = MinHash.generator(sets.values(), num_perm=hashes, seed=1, hashfunc=int)
    signatures = np.zeros((max(sets, default=-1) + 1, hashes), dtype=np.uint32)
    for item, signature in zip(sets, made, strict=True):
        index.insert(item, signature, check_duplication=False)
        signatures[item] = signature.hashvalues
    buckets = (sorted(table.get(key)) for table in index.hashtables for key in table)
    return signatures, sorted((bucket for bucket in buckets if len(bucket) > 1), key=itemgetter(0))


def parse_ratios(text: str) -> tuple[float, ...]:
    """`80/10/10` -> shares of train, validation and test. Raises UserError."""
    try:
        numbers = [float(part) for part in text.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SPLITS) or not all(0 <= number < inf for number in numbers) or numbers[0] <= 0:
        raise UserError(f"--split {text}: write three shares for train, validation and test, as in 80/10/10")
    return tuple(number / sum(numbers) for number in numbers)


def split_conversations(
    conversations: Sequence[dict[str, Any]], groups: Sequence[int], ratios: Sequence[float], seed: int = 0
) -> list[str]:
    """The split of each conversation: groups stay together, and each tool has the same shares if groups permit.

    Tool by tool (a group's most frequent first call), groups are assigned, large ones first and equally large ones in
    random order, to the split that lacks most rows; rounding differences carry over to the next tool.
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
    for _, stratum in sorted(strata.items(), key=lambda item: (-sum(map(len, item[1])), item[0])):
        rng.shuffle(stratum)
        stratum.sort(key=len, reverse=True)
        total = sum(map(len, stratum))
        lacking = [lack + ratio * total for lack, ratio in zip(lacking, ratios, strict=True)]
        for indices in stratum:
            split = max((s for s in range(len(ratios)) if ratios[s] > 0), key=lambda s: lacking[s])
            lacking[split] -= len(indices)
            for index in indices:
                result[index] = SPLITS[split]
    return result


def split_groups(conversations: Sequence[dict[str, Any]], near_duplicates: Sequence[int]) -> list[int]:
    """Groups that must share a split: near-duplicates, and rows that continue one conversation."""
    return joined_groups(near_duplicates, continued_conversations(conversations))


def joined_groups(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The groups of both, joined where they overlap; each is named by the index of its first member."""
    joined = Groups(len(first))
    for groups in (first, second):
        for index, group in enumerate(groups):
            joined.join(index, group)
    return joined.names()


def split_off(loaded: LoadResult, fraction: float, seed: int) -> tuple[LoadResult, LoadResult]:
    """(train, held out): about `fraction` of the rows, chosen by `seed`; the groups are those of `prepare`.

    Raises UserError when a side would be empty.
    """
    conversations = list(loaded.conversations)
    groups: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(split_groups(conversations, near_duplicate_groups(conversations))):
        groups[group].append(number)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    total = len(conversations)
    wanted = max(1, round(fraction * total))
    held_out: set[int] = set()
    for group in order:  # a group that is too large for the rest is left to training
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out and order:
        held_out.update(min(order, key=len))
    if not held_out or len(held_out) == total:
        raise UserError(
            f"--eval_fraction {fraction} leaves no rows on one side of the split ({counted(total, 'row')}, "
            f"{counted(len(groups), 'group')} of similar requests); add rows or name an --eval_dataset"
        )
    return _subset(loaded, [i for i in range(total) if i not in held_out]), _subset(loaded, sorted(held_out))


def _subset(loaded: LoadResult, chosen: list[int]) -> LoadResult:
    return replace(
        loaded,
        conversations=[loaded.conversations[i] for i in chosen],
        origins=[loaded.origins[i] for i in chosen],
        fingerprint=hashlib.sha256(f"{loaded.fingerprint}:{chosen}".encode()).hexdigest(),
    )
