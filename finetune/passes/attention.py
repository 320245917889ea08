"""Attention over a packed tree of segments, exact and without a mask.

A token attends to the earlier tokens of its own segment (causal) and to all tokens of the segments above it. Each of
these blocks is one call of a flash attention kernel; the results are merged by log-sum-exp. With the merged output and
log-sum-exp, a flash backward of each block alone gives exactly its part of the gradient, because the kernel recomputes
the probabilities as exp(q k^T - lse). (Dao et al., FlashAttention-2, arXiv:2307.08691, section 3.1; merging of blocks:
ring attention, arXiv:2310.01889.)

Registered with Transformers' attention interface. The CPU kernels are PyTorch's, except for the backward in bfloat16
(finetune/passes/attention_gemm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.passes import attention_gemm
from finetune.passes.plan import Pass, Segment

MAX_BATCHED_LENGTH = 256  # shorter segments share a call, padded to the longest of their power-of-two bucket

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Bucket:
    """Short segments as n rows of L positions for one call; the last token of a shorter segment is repeated at its end.

    No earlier token attends to a repetition, and a repetition has no gradient: its query is one of the segment, so its
    recomputed probabilities are at most 1 and cannot overflow.
    """

    index: torch.Tensor  # int64 [n, L], the token of each position
    is_own: torch.Tensor  # bool [n, L], false for repetitions

    @classmethod
    def of(cls, segments: list[Segment]) -> Bucket:
        start, end = (torch.tensor([getattr(s, name) for s in segments])[:, None] for name in ("start", "end"))
        positions = start + torch.arange(int((end - start).max()))
        return cls(torch.minimum(positions, end - 1), positions < end)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[1, H, T, D] -> [n, H, L, D]; in memory both are ordered as [T, H, D], so that tokens are copied whole."""
        rows = x.transpose(1, 2)[0].index_select(0, self.index.flatten())
        return rows.view(*self.index.shape, *rows.shape[1:]).transpose(1, 2)

    def gather_grad(self, x: torch.Tensor) -> torch.Tensor:
        """`gather` with zeros for repetitions."""
        return self.gather(x).masked_fill_(~self.is_own[:, None, :, None], 0)

    def scatter(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Inverse of `gather`, in place: every token belongs to exactly one segment, so nothing is summed."""
        tokens = rows.transpose(1, 2)[self.is_own].to(target.dtype)
        target.transpose(1, 2)[0].index_copy_(0, self.index[self.is_own], tokens)


@dataclass
class Layout:
    """The attention blocks of one pass of T tokens, computed once and used by every layer.

    long: (start, end) of segments whose causal block is a call of its own; short: the others, in buckets of similar
    length; above: (start, end, subtree_end) of segments that have descendants.
    """

    long: list[tuple[int, int]]
    short: list[Bucket]
    above: list[tuple[int, int, int]]

    @classmethod
    def of(cls, segments: list[Segment]) -> Layout:
        long: list[tuple[int, int]] = []
        buckets: dict[int, list[Segment]] = {}
        for s in segments:
            if s.end - s.start > MAX_BATCHED_LENGTH:
                long.append((s.start, s.end))
            else:
                buckets.setdefault((s.end - s.start - 1).bit_length(), []).append(s)
        above = [(s.start, s.end, s.subtree_end) for s in segments if s.subtree_end > s.end]
        return cls(long, [Bucket.of(bucket) for bucket in buckets.values()], above)


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized [1, H, T, D] like x, ordered as [T, H, D] in memory, as the projections want it."""
    return x.new_empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=dtype).transpose(1, 2)


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[1, KV, T, D] -> [1, KV * groups, T, D], the key or value of each query head (grouped-query attention)."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def flash_grads(*tensors: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """As attention_gemm.block_grads, by PyTorch's kernel; key and value have all H heads."""
    return _flash_backward(*tensors, 0.0, causal, scale=scale)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        k, v = _repeat(key, groups), _repeat(value, groups)
        output = _empty(query, query.dtype)
        lse = _empty(query[..., :1], torch.float32)[..., 0]

        for start, end in layout.long:
            block = slice(start, end)
            output[:, :, block], lse[:, :, block] = _flash(
                query[:, :, block], k[:, :, block], v[:, :, block], 0.0, True, scale=scale
            )
        for bucket in layout.short:
            out, log = _flash(*(bucket.gather(x) for x in (query, k, v)), 0.0, True, scale=scale)
            bucket.scatter(output, out)
            bucket.scatter(lse[..., None], log[..., None])
        for start, end, subtree_end in layout.above:
            below = slice(end, subtree_end)
            out, log = _flash(query[:, :, below], k[:, :, start:end], v[:, :, start:end], 0.0, False, scale=scale)
            merged = torch.logaddexp(lse[:, :, below], log)
            own_share = (lse[:, :, below] - merged).exp()[..., None]
            above_share = (log - merged).exp()[..., None]
            output[:, :, below] = output[:, :, below] * own_share + out * above_share
            lse[:, :, below] = merged

        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale, ctx.groups = layout, scale, groups
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        layout, scale, groups = ctx.layout, ctx.scale, ctx.groups
        block_grads: Callable[..., tuple[torch.Tensor, ...]]
        if query.dtype == torch.bfloat16:
            k, v, block_grads = key, value, attention_gemm.block_grads
        else:
            k, v, block_grads = _repeat(key, groups), _repeat(value, groups), flash_grads
        # Sums of many blocks: accumulated in float32 whatever the kernel's type.
        dq, dk, dv = (_empty(x, torch.float32) for x in (query, k, v))

        for start, end in layout.long:
            block = slice(start, end)
            tensors = [x[:, :, block] for x in (grad_output, query, k, v, output, lse)]
            dq[:, :, block], dk[:, :, block], dv[:, :, block] = block_grads(*tensors, causal=True, scale=scale)
        for bucket in layout.short:
            tensors = [bucket.gather_grad(grad_output), *(bucket.gather(x) for x in (query, k, v, output))]
            tensors.append(bucket.gather(lse[..., None])[..., 0])
            grads = block_grads(*tensors, causal=True, scale=scale)
            for target, rows in zip((dq, dk, dv), grads, strict=True):
                bucket.scatter(target, rows)
        for start, end, subtree_end in layout.above:
            below, above = slice(end, subtree_end), slice(start, end)
            tensors = [grad_output[:, :, below], query[:, :, below], k[:, :, above], v[:, :, above],
                       output[:, :, below], lse[:, :, below]]  # fmt: skip
            grads = block_grads(*tensors, causal=False, scale=scale)
            dq[:, :, below] += grads[0]
            dk[:, :, above] += grads[1]
            dv[:, :, above] += grads[2]

        if dk.shape != key.shape:
            dk, dv = (x.view(1, key.shape[1], groups, *x.shape[2:]).sum(2) for x in (dk, dv))
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float | None = None
) -> torch.Tensor:
    """Attention of a packed tree. query [1, H, T, D], key and value [1, KV, T, D] -> [1, H, T, D]; H % KV == 0."""
    return _TreeAttention.apply(query, key, value, layout, scale if scale is not None else query.shape[-1] ** -0.5)


class UnsupportedModelError(Exception):
    """This model's attention cannot process a packed tree; the message says why."""


def refuse_options(options: dict[str, Any]) -> None:
    """UnsupportedModelError for attention options that a packed tree does not support."""
    for name in ("softcap", "s_aux", "sliding_window"):
        if options.get(name) is not None:
            raise UnsupportedModelError(f"its attention uses {name}")
    if options.get("dropout"):
        raise UnsupportedModelError("its attention uses dropout")


def packed_inputs(pass_: Pass, device: torch.device, multiple: int = 1) -> dict[str, torch.Tensor]:
    """int64 [1, T] input_ids and position_ids of a pass, padded at the end to a multiple of `multiple` tokens."""
    padding = -len(pass_.input_ids) % multiple
    ids, positions = np.pad(pass_.input_ids, (0, padding)), np.pad(pass_.position_ids, (0, padding), mode="edge")
    return {
        "input_ids": torch.from_numpy(ids).to(device)[None],
        "position_ids": torch.from_numpy(positions).to(device)[None],
    }


class PackedAttention:
    """How packed rows go through a model; this base class is the model's own attention, for padded rows.

    label: its name in messages; shares_prefixes: whether it accepts a tree.
    """

    label = ""
    shares_prefixes = True

    def inputs(self, pass_: Pass, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        return packed_inputs(pass_, device)

    def patched(self, model: Any) -> AbstractContextManager[None]:
        """Context in which `model` accepts these inputs, for the backward too (checkpointing recomputes)."""
        return nullcontext()


class InterfaceAttention(PackedAttention):
    """Through Transformers' attention interface; `attend` gets the keyword argument `tree` of the model's forward."""

    name: str

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Any, scale: float | None
    ) -> torch.Tensor:
        """Attention output [1, H, T, D]; shapes as in `tree_attention`."""
        raise NotImplementedError

    def _forward(self, module, query, key, value, attention_mask, scaling=None, tree=None, **kwargs):
        if tree is None:
            raise UnsupportedModelError("its layers do not pass keyword arguments to the attention function")
        refuse_options(kwargs)
        return self.attend(query, key, value, tree, scaling).transpose(1, 2), None

    @contextmanager
    def patched(self, model: Any) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(self.name, self._forward)
        config = model.config.get_text_config()
        before = config._attn_implementation
        # Not set_attn_implementation: it walks all modules and only warns where it fails (transformers 5.17).
        config._attn_implementation = self.name
        try:
            yield
        finally:
            config._attn_implementation = before


class CpuTree(InterfaceAttention):
    """Flash kernels on a CPU."""

    name = "sandwich_tree"

    def inputs(self, pass_: Pass, device: torch.device) -> dict[str, Any]:
        return {**packed_inputs(pass_, device), "tree": Layout.of(pass_.segments)}

    def attend(self, query, key, value, tree, scale):
        return tree_attention(query, key, value, tree, scale)
