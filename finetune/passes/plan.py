"""Rows of one optimizer step -> packed forward passes that compute a shared prefix once.

A step is a fixed set of rows. Here it is only cut: rows that start alike are laid out as a tree of token segments
(a trie over token ids), written in preorder without padding. A token attends to the tokens of its own segment before
it and to the segments above it; nothing else. In a causal model the hidden state of a token depends on nothing more,
so every row gets exactly the hidden states it would get alone, and the gradient of the summed loss is the same.

No torch in here: a plan is numpy arrays, so it can be tested and timed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from formats import IGNORE_INDEX

# A branch below this many tokens costs more in extra attention calls than the recomputed tokens do.
MIN_SHARED = 32
# On a CPU rows that share no more than LITTLE tokens with a pass this full begin the next one: computing those again
# costs less than holding more activations in memory. Measured on SmolLM2-135M (docs/speed.md): passes of 150 tokens are
# 40 % slower than large ones, of 290 tokens 2 to 15 %. LITTLE is chosen.
ENOUGH_ON_CPU, LITTLE = 384, 64
BALANCED = 6  # halvings of the range in which the smallest budget with the same number of passes is looked for


@dataclass(frozen=True)
class Row:
    """What one row needs in the model: tokens up to the one that predicts its last trained token.

    input_ids: int32 [n]; positions: int32 [m], ascending indices into input_ids; targets: int32 [m], the id that
    position must predict; length: tokens of the row as it was given.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    length: int


def make_row(input_ids: Sequence[int], labels: Sequence[int]) -> Row:
    """Cut a row behind its last trained token: later tokens cannot change the loss of a causal model.

    labels are aligned with input_ids (not shifted). Raises ValueError when nothing in the row is trained.
    """
    ids = np.asarray(input_ids, dtype=np.int32)
    next_labels = np.asarray(labels, dtype=np.int32)[1:]
    positions = np.flatnonzero(next_labels != IGNORE_INDEX).astype(np.int32)
    if len(positions) == 0:
        raise ValueError("no token of this row is trained")
    return Row(ids[: positions[-1] + 1], positions, next_labels[positions], len(ids))


@dataclass
class Segment:
    """Tokens [start, end) of a pass; the segments below it in the tree follow directly, up to subtree_end."""

    start: int
    end: int
    subtree_end: int


@dataclass
class Pass:
    """One forward pass over T packed tokens.

    input_ids, position_ids: int64 [T]; segments: the tree in preorder; positions: int64 [N] indices into the pass that
    reach the lm_head; targets: int64 [N]; weights: float32 [N], how many rows train this very (position, target).
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: list[Segment]
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: list[int]


@dataclass
class _Packer:
    """Builds one pass from rows that arrive in trie order."""

    ids: list[np.ndarray] = field(default_factory=list)
    depths: list[np.ndarray] = field(default_factory=list)
    targets: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    size: int = 0
    # The segments from the root down to the last row's own: (segment, depth of its first token).
    path: list[tuple[Segment, int]] = field(default_factory=list)
    index: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # depth -> token of the pass

    def branch_depth(self, common: int) -> int:
        """The depth at which a row that shares `common` tokens with the last row leaves the tree."""
        for segment, depth in reversed(self.path):
            length = segment.end - segment.start
            if common >= depth + length:
                return depth + length
            if common - depth >= MIN_SHARED:
                return common
        return 0

    def add(self, number: int, row: Row, common: int) -> None:
        depth = self.branch_depth(common)
        while self.path and self.path[-1][1] >= depth:
            self.path.pop()[0].subtree_end = self.size
        if self.path:
            parent, parent_depth = self.path[-1]
            split = parent.start + depth - parent_depth
            if split < parent.end:
                # The row leaves in the middle of a segment: what follows the branch becomes a segment below it.
                self.segments.insert(self.segments.index(parent) + 1, Segment(split, parent.end, self.size))
                parent.end = split
        own = row.input_ids[depth:]
        if len(own):
            segment = Segment(self.size, self.size + len(own), self.size + len(own))
            self.segments.append(segment)
            self.path.append((segment, depth))
            self.ids.append(own)
            self.depths.append(np.arange(depth, depth + len(own)))
        self.index = np.concatenate([self.index[:depth], np.arange(self.size, self.size + len(own))])
        self.size += len(own)
        self.targets.append((self.index[row.positions], row.targets))
        self.rows.append(number)

    def finish(self) -> Pass:
        for segment, _ in self.path:
            segment.subtree_end = self.size
        pairs = np.stack([np.concatenate(column) for column in zip(*self.targets, strict=True)])
        # Rows may train the same token at a shared position (equal first turns): one projection, a weight of two.
        (positions, targets), weights = np.unique(pairs, axis=1, return_counts=True)
        return Pass(
            input_ids=np.concatenate(self.ids).astype(np.int64),
            position_ids=np.concatenate(self.depths).astype(np.int64),
            segments=self.segments,
            positions=positions.astype(np.int64),
            targets=targets.astype(np.int64),
            weights=weights.astype(np.float32),
            rows=self.rows,
        )


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common run of ids at the start of two rows."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def plan_passes(
    rows: Sequence[Row], tokens_per_pass: int, share_prefix: bool = True, *, enough: int | None = None
) -> list[Pass]:
    """Cut the rows of one step into passes of at most `tokens_per_pass` computed tokens.

    A row longer than the budget gets a pass of its own. With share_prefix=False every row is a tree of its own:
    packed without padding, nothing shared. A pass of `enough` tokens takes only rows that share much with it.
    """
    # Sorting by the ids' bytes brings equal prefixes together; any total order with that property would do.
    order = sorted(range(len(rows)), key=lambda i: rows[i].input_ids.tobytes())
    passes = _cut(rows, order, tokens_per_pass, share_prefix, enough)
    # As many passes of like size take less memory than full ones and a rest.
    computed = sum(one.input_ids.size for one in passes)
    low, high = computed // max(len(passes), 1), max((one.input_ids.size for one in passes), default=0)
    for _ in range(BALANCED if len(passes) > 1 else 0):
        budget = (low + high) // 2
        tried = _cut(rows, order, budget, share_prefix, enough)
        if len(tried) == len(passes) and sum(one.input_ids.size for one in tried) <= computed:
            passes, high = tried, budget
        else:
            low = budget
    return passes


def _cut(
    rows: Sequence[Row], order: Sequence[int], tokens_per_pass: int, share_prefix: bool, enough: int | None
) -> list[Pass]:
    passes: list[Pass] = []
    packer, last = _Packer(), None
    for number in order:
        row = rows[number]
        common = common_prefix(last.input_ids, row.input_ids) if share_prefix and last is not None else 0
        shared = packer.branch_depth(common)
        full = packer.size + len(row.input_ids) - shared > tokens_per_pass
        if packer.size and (full or (enough is not None and packer.size >= enough and shared <= LITTLE)):
            passes.append(packer.finish())
            packer, common = _Packer(), 0
        packer.add(number, row, common)
        last = row
    if packer.rows:
        passes.append(packer.finish())
    return passes


@dataclass
class PaddedPass:
    """One padded forward pass, for models whose attention cannot take a packed tree.

    input_ids, attention_mask: int64 [B, L], padded on the right; positions: int64 [N] into the flattened B*L.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: list[int]


def plan_padded(rows: Sequence[Row], tokens_per_pass: int, pad_token_id: int) -> list[PaddedPass]:
    """Cut a step into right-padded batches of rows of like length; padding counts towards `tokens_per_pass`."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
    batches: list[list[int]] = []
    for number in order:
        # Rows come in ascending length, so this row's length is the width of its batch.
        if batches and (len(batches[-1]) + 1) * len(rows[number].input_ids) <= tokens_per_pass:
            batches[-1].append(number)
        else:
            batches.append([number])
    return [_pad(rows, batch, pad_token_id) for batch in batches]


def _pad(rows: Sequence[Row], batch: list[int], pad_token_id: int) -> PaddedPass:
    width = max(len(rows[i].input_ids) for i in batch)
    input_ids = np.full((len(batch), width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(batch), width), dtype=np.int64)
    for line, i in enumerate(batch):
        input_ids[line, : len(rows[i].input_ids)] = rows[i].input_ids
        attention_mask[line, : len(rows[i].input_ids)] = 1
    positions = np.concatenate([line * width + rows[i].positions.astype(np.int64) for line, i in enumerate(batch)])
    targets = np.concatenate([rows[i].targets for i in batch]).astype(np.int64)
    return PaddedPass(input_ids, attention_mask, positions, targets, np.ones(len(targets), np.float32), batch)
