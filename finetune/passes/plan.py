"""Rows of one optimizer step -> packed forward passes that compute each shared prefix once.

The rows of a step form a trie over token ids. Its segments are written in preorder, without padding; a token attends to
the earlier tokens of its own segment and to all segments above it. In a causal model every row then gets the hidden
states that it has alone, so the gradient of the summed loss is the same.

Uses numpy only: a plan can be tested and timed without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from formats import IGNORE_INDEX

# A branch shorter than this costs more in additional attention calls than recomputing its tokens.
MIN_SHARED_TOKENS = 32
# On a CPU a pass of CPU_TARGET_TOKENS accepts only rows that share more than MIN_SHARED_TO_JOIN tokens with it: larger
# passes need more memory and are not faster. Measured on SmolLM2-135M (docs/speed.md): passes of 150 tokens are 40 %
# slower than large ones, passes of 290 tokens 2 to 15 %. MIN_SHARED_TO_JOIN is an estimate.
CPU_TARGET_TOKENS, MIN_SHARED_TO_JOIN = 384, 64
BALANCING_ROUNDS = 6  # bisection steps towards the smallest budget with the same number of passes


@dataclass(frozen=True)
class Row:
    """The part of a row that the model has to compute.

    input_ids: int32 [n]; positions: int32 [m], ascending indices into input_ids; targets: int32 [m], the id that each
    position must predict; length: number of tokens in the original row.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    length: int


def make_row(input_ids: Sequence[int], labels: Sequence[int]) -> Row:
    """Cut a row after the token that predicts its last trained token: later tokens cannot change a causal model's loss.

    labels are aligned with input_ids (not shifted). Raises ValueError when the row has no trained token.
    """
    ids = np.asarray(input_ids, dtype=np.int32)
    next_labels = np.asarray(labels, dtype=np.int32)[1:]
    positions = np.flatnonzero(next_labels != IGNORE_INDEX).astype(np.int32)
    if len(positions) == 0:
        raise ValueError("the row has no trained token")
    return Row(ids[: positions[-1] + 1], positions, next_labels[positions], len(ids))


@dataclass
class Predictions:
    """At each of a row's m trained tokens: log-probability of that token, of the most likely one, and the latter's id.

    log_p, best_log_p: float32 [m]; best_ids: int64 [m].
    """

    log_p: np.ndarray
    best_log_p: np.ndarray
    best_ids: np.ndarray


@dataclass
class Segment:
    """Tokens [start, end) of a pass. Its descendants in the tree follow directly, up to subtree_end."""

    start: int
    end: int
    subtree_end: int


@dataclass
class Pass:
    """One forward pass over T packed tokens.

    input_ids, position_ids: int64 [T]; segments: the tree in preorder; positions: int64 [N], indices into the pass
    whose hidden states are projected by the lm_head; targets: int64 [N]; weights: float32 [N], number of rows that
    train this (position, target); rows: indices of the step's rows; trained: int64 [M], for each trained token of each
    of these rows, in their order, its index into positions.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: list[Segment]
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: list[int]
    trained: np.ndarray


@dataclass
class _Packer:
    """Builds one pass from rows that arrive in trie order."""

    ids: list[np.ndarray] = field(default_factory=list)
    depths: list[np.ndarray] = field(default_factory=list)
    targets: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    size: int = 0
    # Segments from the root to the last row's own segment: (segment, depth of its first token).
    path: list[tuple[Segment, int]] = field(default_factory=list)
    index: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # depth -> token of the pass

    def branch_depth(self, common: int) -> int:
        """The depth at which a row that shares `common` tokens with the last row branches off."""
        for segment, depth in reversed(self.path):
            segment_end = depth + segment.end - segment.start
            if common >= segment_end:
                return segment_end
            if common - depth >= MIN_SHARED_TOKENS:
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
                # The row branches off inside a segment: the rest of the segment becomes its child.
                self.segments.insert(self.segments.index(parent) + 1, Segment(split, parent.end, self.size))
                parent.end = split
        own = row.input_ids[depth:]
        end = self.size + len(own)
        if len(own):
            segment = Segment(self.size, end, end)
            self.segments.append(segment)
            self.path.append((segment, depth))
            self.ids.append(own)
            self.depths.append(np.arange(depth, depth + len(own)))
        self.index = np.concatenate([self.index[:depth], np.arange(self.size, end)])
        self.size = end
        self.targets.append((self.index[row.positions], row.targets))
        self.rows.append(number)

    def finish(self) -> Pass:
        for segment, _ in self.path:
            segment.subtree_end = self.size
        pairs = np.stack([np.concatenate(column) for column in zip(*self.targets, strict=True)])
        # Rows may train the same target at a shared position: it is projected once, with a higher weight.
        (positions, targets), trained, weights = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
        return Pass(
            input_ids=np.concatenate(self.ids).astype(np.int64),
            position_ids=np.concatenate(self.depths).astype(np.int64),
            segments=self.segments,
            positions=positions.astype(np.int64),
            targets=targets.astype(np.int64),
            weights=weights.astype(np.float32),
            rows=self.rows,
            trained=trained.ravel(),
        )


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two rows of ids."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def plan_passes(
    rows: Sequence[Row], tokens_per_pass: int, share_prefix: bool = True, *, target_tokens: int | None = None
) -> list[Pass]:
    """Split the rows of one step into passes of at most `tokens_per_pass` computed tokens.

    A longer row gets a pass of its own. With share_prefix=False rows are packed without padding and share nothing. Once
    a pass has `target_tokens`, only rows that share more than MIN_SHARED_TO_JOIN tokens with it are added.
    """

    def split(budget: int) -> list[Pass]:
        passes, packer, previous = [], _Packer(), None
        for number in order:
            row = rows[number]
            common = common_prefix(previous.input_ids, row.input_ids) if share_prefix and previous is not None else 0
            shared = packer.branch_depth(common)
            too_large = packer.size + len(row.input_ids) - shared > budget
            reached = target_tokens is not None and packer.size >= target_tokens and shared <= MIN_SHARED_TO_JOIN
            if packer.size and (too_large or reached):
                passes.append(packer.finish())
                packer, common = _Packer(), 0
            packer.add(number, row, common)
            previous = row
        return [*passes, packer.finish()] if packer.rows else passes

    # Any total order that puts equal prefixes next to each other would do.
    order = sorted(range(len(rows)), key=lambda i: rows[i].input_ids.tobytes())
    passes = split(tokens_per_pass)
    if len(passes) < 2:
        return passes
    # The same number of passes of similar size takes less memory than full passes and a small last one.
    sizes = [pass_.input_ids.size for pass_ in passes]
    low, high = sum(sizes) // len(passes), max(sizes)
    for _ in range(BALANCING_ROUNDS):
        budget = (low + high) // 2
        balanced = split(budget)
        if len(balanced) == len(passes) and sum(pass_.input_ids.size for pass_ in balanced) <= sum(sizes):
            passes, high = balanced, budget
        else:
            low = budget
    return passes


@dataclass
class PaddedPass:
    """One padded forward pass, for models whose attention cannot process a packed tree.

    input_ids, attention_mask: int64 [B, L], padded on the right; positions: int64 [N], indices into the flattened B*L;
    the others as in Pass.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    rows: list[int]
    trained: np.ndarray


def plan_padded(rows: Sequence[Row], tokens_per_pass: int, pad_token_id: int) -> list[PaddedPass]:
    """Split a step into right-padded batches of rows of similar length; padding counts towards `tokens_per_pass`."""
    batches: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids)):
        # Rows arrive in ascending length, so this row's length is the width of its batch.
        if batches and (len(batches[-1]) + 1) * len(rows[number].input_ids) <= tokens_per_pass:
            batches[-1].append(number)
        else:
            batches.append([number])
    return [_pad(rows, batch, pad_token_id) for batch in batches]


def _pad(rows: Sequence[Row], batch: list[int], pad_token_id: int) -> PaddedPass:
    lengths = np.array([len(rows[i].input_ids) for i in batch])
    is_token = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(is_token.shape, pad_token_id, dtype=np.int64)
    input_ids[is_token] = np.concatenate([rows[i].input_ids for i in batch])
    starts = np.arange(len(batch)) * lengths.max()
    positions = np.concatenate([start + rows[i].positions for start, i in zip(starts, batch, strict=True)])
    targets = np.concatenate([rows[i].targets for i in batch]).astype(np.int64)
    return PaddedPass(
        input_ids, is_token.astype(np.int64), positions.astype(np.int64), targets,
        np.ones(len(targets), np.float32), batch, np.arange(len(targets)),
    )  # fmt: skip
