"""Attention over a packed tree on a GPU: FlexAttention with the tree's block mask, called by whoever runs the model.

A pass is written in preorder, so one number per token says everything: `reach`, the end of the tokens that may see it
(the subtree of its segment). Query q sees key k exactly when k <= q < reach[k]. (FlexAttention: arXiv:2412.05496.)

Three ways into a model, tried in this order by passes.py:
* Unsloth's own forward of Llama, Mistral, Qwen, Gemma 2, Granite, Cohere takes the mask as `prefix_seg_info`;
* models that go through Transformers' attention interface get FlexAttention there;
* where neither works, Unsloth's forward packs rows without padding and without sharing (`packed_seq_lengths`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from finetune.passes.attention import UnsupportedModel, attention_named, packed_inputs, refuse_options
from finetune.passes.plan import Pass, Segment

NAME = "sandwich_flex"
# FlexAttention's block. Passes are filled up to a multiple of it before the model runs: filled up in each layer,
# queries, keys and values would be copied there, and the attention's output kept twice for the backward pass.
BLOCK = 128


def fill_up(tokens: int) -> int:
    """The multiple of BLOCK that holds so many tokens."""
    return -(-tokens // BLOCK) * BLOCK


def reach_of(segments: Sequence[Segment], padded: int) -> np.ndarray:
    """int32 [padded]: the first token behind those that may see a token. What fills up sees itself and nothing else, so
    that its numbers stay finite."""
    reach = np.arange(1, padded + 1, dtype=np.int32)
    for segment in segments:
        reach[segment.start : segment.end] = segment.subtree_end
    return reach


def block_counts(reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of the mask are seen at all, and which wholly: two bool [query blocks, key blocks].

    Key k is seen by the queries k … reach[k] - 1, one run. So its blocks are runs too, and sums over difference arrays
    count them without ever making the mask of T x T.
    """
    blocks = len(reach) // BLOCK
    key = np.arange(len(reach))
    column = key // BLOCK

    def runs(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """How many keys of each key block see to it that query blocks first … last - 1 are counted."""
        marks = np.zeros((blocks + 1, blocks), dtype=np.int64)
        valid = last > first
        np.add.at(marks, (first[valid], column[valid]), 1)
        np.add.at(marks, (last[valid], column[valid]), -1)
        return marks.cumsum(0)[:-1]

    touched = runs(column, np.where(reach > key, -(-reach // BLOCK), 0))
    whole = runs(-(-key // BLOCK), reach // BLOCK)
    full = whole == BLOCK
    return (touched > 0) & ~full, full


def block_mask(segments: Sequence[Segment], tokens: int, device: torch.device | str) -> Any:
    """FlexAttention's BlockMask of a pass of `tokens` tokens, filled up to a multiple of BLOCK."""
    from torch.nn.attention.flex_attention import BlockMask

    padded = fill_up(tokens)
    numbers = reach_of(segments, padded)
    reach = torch.from_numpy(numbers).to(device)

    def sees(batch, head, query, key):
        return (key <= query) & (query < reach[key])

    def ordered(dense: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[Q, K] bool -> ([1, 1, Q] how many, [1, 1, Q, K] their indices first), as BlockMask stores rows."""
        indices = np.argsort(~dense, axis=1, kind="stable").astype(np.int32)
        count = dense.sum(1).astype(np.int32)
        return torch.from_numpy(count).to(device)[None, None], torch.from_numpy(indices).to(device)[None, None]

    partial, full = block_counts(numbers)
    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(padded, padded)
    )


class _Flex:
    """FlexAttention, compiled on first use; uncompiled on a CPU, where only tests use it."""

    _compiled: Callable | None = None

    def __call__(self, query, key, value, mask, scale):
        from torch.nn.attention.flex_attention import flex_attention

        function = flex_attention
        if query.device.type != "cpu":
            if _Flex._compiled is None:
                # Passes differ in length; without dynamic shapes each length would be compiled anew.
                _Flex._compiled = torch.compile(flex_attention, dynamic=True)
            function = _Flex._compiled
        return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


flex = _Flex()


def _interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, flex_mask=None, **kwargs):
    if flex_mask is None:
        raise UnsupportedModel("its layers do not hand keyword arguments on to the attention function")
    refuse_options(dropout, kwargs)
    return flex(query, key, value, flex_mask, scaling).transpose(1, 2), None


class FlexTree:
    """Through Transformers' attention interface."""

    shares, says = True, "FlexAttention"

    def inputs(self, one: Pass, device: torch.device) -> dict[str, Any]:
        return {**packed_inputs(one, device, BLOCK), "flex_mask": block_mask(one.segments, len(one.input_ids), device)}

    @contextmanager
    def inside(self, model: torch.nn.Module) -> Iterator[None]:
        with attention_named(model, NAME, _interface):
            yield


class UnslothTree:
    """Through Unsloth's own forward on CUDA."""

    shares, says = True, "Unsloth's shared-prefix kernel"

    def inputs(self, one: Pass, device: torch.device) -> dict[str, Any]:

        mask = block_mask(one.segments, len(one.input_ids), device)
        return {**packed_inputs(one, device, BLOCK), "prefix_seg_info": unsloth_segments(mask, device)}

    def inside(self, model: torch.nn.Module):
        config = model.config.get_text_config()
        # Its kernel knows neither; on the short rows of a trial that would hardly show.
        refuse_options(0.0, {
            "sliding_window": getattr(config, "sliding_window", None),
            "softcap": getattr(config, "attn_logit_softcapping", None),
        })  # fmt: skip
        return nullcontext()


class UnslothPacked:
    """Packed without padding through Unsloth's own forward; nothing is shared."""

    shares, says = False, "Unsloth's packed attention"

    def inputs(self, one: Pass, device: torch.device) -> dict[str, Any]:
        lengths = [segment.end - segment.start for segment in one.segments]
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        return {**packed_inputs(one, device), "packed_seq_lengths": lengths}

    def inside(self, model: torch.nn.Module):
        return nullcontext()


def unsloth_segments(block_mask: Any, device: Any) -> Any:
    """Unsloth's `prefix_seg_info` for a pass of as many tokens as its FlexAttention mask, which is made already.

    Its kernel looks the mask up by `signature` (unsloth 2026.10.9, utils/prefix_grouper_kernel.py); labels of its own,
    one prefix and many suffixes, could not say what a deeper tree is, so the mask is put there beforehand.
    """
    import torch
    from unsloth.utils import prefix_grouper_kernel as kernel

    tokens = block_mask.seq_lengths[0]
    signature = ("sandwich", id(block_mask))
    nobody = torch.full((tokens,), -99, dtype=torch.long, device=device)
    kernel.clear_block_mask_cache()
    kernel._BLOCK_MASK_CACHE[(signature, str(device))] = block_mask
    return kernel.PrefixSegInfo(
        group_of_kv=nobody, is_prefix=torch.zeros(tokens, dtype=torch.bool, device=device), suffix_of_kv=nobody,
        signature=signature, T=tokens, T_pad=tokens,
    )  # fmt: skip
