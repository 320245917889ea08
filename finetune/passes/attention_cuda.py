"""Attention over a packed tree on a GPU: FlexAttention (arXiv:2412.05496) with the tree's block mask.

A pass is written in preorder, so one number per token defines the mask: visible_until, the end of its segment's
subtree. Query q attends to key k exactly when k <= q < visible_until[k].

Three attentions, tried in this order by runner.py:
* Unsloth's own forward of Llama, Mistral, Qwen, Gemma 2, Granite and Cohere takes the mask as `prefix_seg_info`;
* models that use Transformers' attention interface get FlexAttention there;
* where neither works, Unsloth's forward packs rows without padding and without sharing (`packed_seq_lengths`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from finetune.passes.attention import InterfaceAttention, PackedAttention, packed_inputs, refuse_options
from finetune.passes.plan import Pass, Segment

# FlexAttention's block. Passes are padded to a multiple of it before the model runs: with padding in each layer,
# queries, keys and values would be copied there, and the attention's output kept twice for the backward pass.
BLOCK_SIZE = 128


def padded_length(tokens: int) -> int:
    """`tokens`, rounded up to a multiple of BLOCK_SIZE."""
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


def visible_until(segments: Sequence[Segment], padded: int) -> np.ndarray:
    """int32 [padded]: the end of the tokens that may attend to each token.

    A padding token is visible to itself only, which keeps its numbers finite.
    """
    until = np.arange(1, padded + 1, dtype=np.int32)
    for segment in segments:
        until[segment.start : segment.end] = segment.subtree_end
    return until


def classify_blocks(until: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask's (partial, full) blocks, each bool [query blocks, key blocks].

    Key k is visible to the consecutive queries k to until[k] - 1, so its query blocks are consecutive too. Cumulative
    sums over their starts and ends count the keys per block without creating the T x T mask.
    """
    blocks = len(until) // BLOCK_SIZE
    key = np.arange(len(until))
    key_block = key // BLOCK_SIZE

    def count_keys(first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """int64 [query blocks, key blocks]: number of keys k whose range [first[k], end[k]) holds the query block."""
        changes = np.zeros((blocks + 1, blocks), dtype=np.int64)
        valid = end > first
        np.add.at(changes, (first[valid], key_block[valid]), 1)
        np.add.at(changes, (end[valid], key_block[valid]), -1)
        return changes.cumsum(0)[:-1]

    touched = count_keys(key_block, np.where(until > key, -(-until // BLOCK_SIZE), 0))
    full = count_keys(-(-key // BLOCK_SIZE), until // BLOCK_SIZE) == BLOCK_SIZE
    return (touched > 0) & ~full, full


def block_mask(segments: Sequence[Segment], tokens: int, device: torch.device | str) -> BlockMask:
    """FlexAttention's BlockMask of a pass of `tokens` tokens, padded to a multiple of BLOCK_SIZE."""
    padded = padded_length(tokens)
    until = visible_until(segments, padded)
    until_on_device = torch.from_numpy(until).to(device)

    def is_visible(batch, head, query, key):
        return (key <= query) & (query < until_on_device[key])

    def block_rows(dense: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[Q, K] bool -> ([1, 1, Q] number of blocks, [1, 1, Q, K] their indices first), as BlockMask stores rows."""
        indices = np.argsort(~dense, axis=1, kind="stable").astype(np.int32)
        count = dense.sum(1).astype(np.int32)
        return torch.from_numpy(count).to(device)[None, None], torch.from_numpy(indices).to(device)[None, None]

    partial, full = classify_blocks(until)
    return BlockMask.from_kv_blocks(
        *block_rows(partial), *block_rows(full), BLOCK_SIZE=BLOCK_SIZE, mask_mod=is_visible,
        seq_lengths=(padded, padded),
    )  # fmt: skip


@functools.cache
def _compiled() -> Callable:
    # Passes differ in length; without dynamic shapes each length would be compiled again.
    return torch.compile(flex_attention, dynamic=True)


class FlexTree(InterfaceAttention):
    """FlexAttention, compiled on first use; uncompiled on a CPU, where only tests use it."""

    name, label = "sandwich_flex", "FlexAttention"

    def inputs(self, pass_: Pass, device: torch.device) -> dict[str, Any]:
        mask = block_mask(pass_.segments, len(pass_.input_ids), device)
        return {**packed_inputs(pass_, device, BLOCK_SIZE), "tree": mask}

    def attend(self, query, key, value, tree, scale):
        attention: Any = flex_attention if query.device.type == "cpu" else _compiled()
        return attention(query, key, value, block_mask=tree, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


class UnslothTree(PackedAttention):
    """Unsloth's own forward on CUDA."""

    label = "Unsloth's shared-prefix kernel"

    def inputs(self, pass_: Pass, device: torch.device) -> dict[str, Any]:
        mask = block_mask(pass_.segments, len(pass_.input_ids), device)
        return {**packed_inputs(pass_, device, BLOCK_SIZE), "prefix_seg_info": unsloth_segments(mask, device)}

    def patched(self, model: Any) -> AbstractContextManager[None]:
        config = model.config.get_text_config()
        # Its kernel ignores both, and the short rows of the compatibility check would hardly show it.
        options = {"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"}
        refuse_options({option: getattr(config, name, None) for option, name in options.items()})
        return nullcontext()


class UnslothPacked(PackedAttention):
    """Unsloth's own forward on CUDA: packed without padding, nothing shared."""

    label, shares_prefixes = "Unsloth's packed attention", False

    def inputs(self, pass_: Pass, device: torch.device) -> dict[str, Any]:
        lengths = [segment.end - segment.start for segment in pass_.segments]
        packed_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        return {**packed_inputs(pass_, device), "packed_seq_lengths": packed_lengths}


def unsloth_segments(mask: BlockMask, device: torch.device) -> Any:
    """Unsloth's `prefix_seg_info` for a pass with this mask.

    Unsloth's own labels, one prefix and many suffixes, cannot describe a deeper tree. Its kernel looks its mask up by
    `signature` (unsloth 2026.10.9, utils/prefix_grouper_kernel.py), so this mask is put into that cache.
    """
    from unsloth.utils import prefix_grouper_kernel as kernel

    tokens = mask.seq_lengths[0]
    signature = ("sandwich", id(mask))
    no_group = torch.full((tokens,), -99, dtype=torch.long, device=device)
    kernel.clear_block_mask_cache()
    kernel._BLOCK_MASK_CACHE[(signature, str(device))] = mask
    return kernel.PrefixSegInfo(
        group_of_kv=no_group, is_prefix=torch.zeros(tokens, dtype=torch.bool, device=device), suffix_of_kv=no_group,
        signature=signature, T=tokens, T_pad=tokens,
    )  # fmt: skip
