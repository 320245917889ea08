"""Holding out a share of the training rows for eval_loss."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from dataclasses import replace

from finetune.conversations import LoadResult
from finetune.errors import UserError
from finetune.preparing.splits import request_text


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
