"""Attention over a packed tree of segments, exact and without a mask.

A token sees the tokens before it in its own segment (causal) and all tokens of the segments above it. Each of these
blocks is one call of a flash-attention kernel; their results are merged by log-sum-exp. With the merged output and
log-sum-exp, a flash backward of each block alone gives exactly its share of the gradient, because the kernel rebuilds
the probabilities as exp(q k^T - lse). (Dao et al., FlashAttention-2, arXiv:2307.08691, section 3.1; the merging of
blocks is that of ring attention, arXiv:2310.01889.)

Registered with Transformers' attention interface; the CPU kernels are PyTorch's own, but for the backward of bfloat16
(finetune/passes/attention_gemm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.passes import attention_gemm
from finetune.passes.plan import Pass, Segment

NAME = "sandwich_tree"
# Segments up to this length go through one batched call; the padding is bounded by the power-of-two buckets.
SHORT = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Layout:
    """The attention blocks of one pass of T tokens, made once and used by every layer.

    long: (start, end) of segments whose causal block is a call of its own; short: int64 index [n, L] per bucket of
    segments, -1 where padded; above: (start, end, subtree_end) of segments with others below them.
    """

    long: list[tuple[int, int]]
    short: list[torch.Tensor]
    above: list[tuple[int, int, int]]

    @classmethod
    def of(cls, segments: list[Segment]) -> Layout:
        buckets: dict[int, list[Segment]] = {}
        for segment in segments:
            length = segment.end - segment.start
            if length <= SHORT:
                buckets.setdefault((length - 1).bit_length(), []).append(segment)
        short = []
        for bucket in buckets.values():
            width = max(s.end - s.start for s in bucket)
            index = torch.full((len(bucket), width), -1, dtype=torch.int64)
            for line, s in enumerate(bucket):
                index[line, : s.end - s.start] = torch.arange(s.start, s.end)
            short.append(index)
        return cls(
            long=[(s.start, s.end) for s in segments if s.end - s.start > SHORT],
            short=short,
            above=[(s.start, s.end, s.subtree_end) for s in segments if s.subtree_end > s.end],
        )


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] -> [n, H, L, D]; padded places are zero, which adds nothing to any gradient."""
    rows = x[0][:, index.clamp(min=0)]
    rows = rows.masked_fill((index < 0)[None, :, :, None], 0)
    return rows.transpose(0, 1)


def _scatter(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Inverse of `_gather`, in place: every token belongs to exactly one segment, so nothing is added up."""
    filled = index >= 0
    target[0][:, index[filled]] = rows.transpose(0, 1)[:, filled].to(target.dtype)


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[1, KV, T, D] -> [1, KV * groups, T, D] as grouped-query attention pairs its heads."""
    if groups == 1:
        return x
    _, heads, tokens, width = x.shape
    return x[:, :, None].expand(1, heads, groups, tokens, width).reshape(1, heads * groups, tokens, width)


def _flash_grads(grad, query, key, value, output, lse, causal: bool, scale: float):
    """As attention_gemm.block_grads, by PyTorch's kernel, with keys and values repeated for their heads."""
    return _flash_backward(grad, query, key, value, output, lse, 0.0, causal, scale=scale)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout: Layout, scale: float):
        groups = query.shape[1] // key.shape[1]
        k, v = _repeat(key, groups), _repeat(value, groups)
        # [1, T, H, D] in memory, as the output projection wants it.
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)

        for start, end in layout.long:
            block = slice(start, end)
            output[:, :, block], lse[:, :, block] = _flash(
                query[:, :, block], k[:, :, block], v[:, :, block], 0.0, True, scale=scale
            )
        for index in layout.short:
            out, log = _flash(_gather(query, index), _gather(k, index), _gather(v, index), 0.0, True, scale=scale)
            _scatter(output, index, out)
            _scatter(lse[..., None], index, log[..., None])
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
    def backward(ctx, grad_output):
        query, key, value, output, lse = ctx.saved_tensors
        layout, scale, groups = ctx.layout, ctx.scale, ctx.groups
        if query.dtype == torch.bfloat16:
            k, v, block_grads = key, value, attention_gemm.block_grads
        else:
            k, v, block_grads = _repeat(key, groups), _repeat(value, groups), _flash_grads
        # Sums of many blocks: collected in float32 whatever the kernel's type.
        dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (query, k, v))

        for start, end in layout.long:
            block = slice(start, end)
            tensors = (x[:, :, block] for x in (grad_output, query, k, v, output, lse))
            dq[:, :, block], dk[:, :, block], dv[:, :, block] = block_grads(*tensors, True, scale)
        for index in layout.short:
            tensors = [_gather(x, index) for x in (grad_output, query, k, v, output, lse[..., None])]
            tensors[5] = tensors[5][..., 0].contiguous()
            for target, rows in zip((dq, dk, dv), block_grads(*tensors, True, scale), strict=True):
                _scatter(target, index, rows)
        for start, end, subtree_end in layout.above:
            below, above = slice(end, subtree_end), slice(start, end)
            grads = block_grads(
                grad_output[:, :, below], query[:, :, below], k[:, :, above], v[:, :, above],
                output[:, :, below], lse[:, :, below], False, scale,
            )  # fmt: skip
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


def _interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    if layout is None:
        raise UnsupportedModel("its layers do not hand keyword arguments on to the attention function")
    refuse_options(dropout, kwargs)
    return tree_attention(query, key, value, layout, scaling).transpose(1, 2), None


class UnsupportedModel(Exception):
    """This model's attention cannot run on a packed tree; the text says why."""


def refuse_options(dropout: float, options: dict[str, Any]) -> None:
    """UnsupportedModel for what a model asks of its attention that a packed tree does not have."""
    for option in ("softcap", "s_aux", "sliding_window"):
        if options.get(option) is not None:
            raise UnsupportedModel(f"its attention uses {option}")
    if dropout:
        raise UnsupportedModel("its attention uses dropout")


@contextmanager
def attention_named(model: torch.nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Route the model's attention through `function`; the backward belongs inside too (checkpointing recomputes)."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_inputs(one: Pass, device: torch.device | str, multiple: int = 1) -> dict[str, torch.Tensor]:
    """int64 [1, T] input_ids and position_ids of a pass, filled up at the end to a multiple of `multiple` tokens."""
    more = -len(one.input_ids) % multiple
    ids, places = np.pad(one.input_ids, (0, more)), np.pad(one.position_ids, (0, more), mode="edge")
    return {
        "input_ids": torch.from_numpy(ids).to(device)[None],
        "position_ids": torch.from_numpy(places).to(device)[None],
    }


class CpuTree:
    """The tree on a CPU, through Transformers' attention interface."""

    shares, says = True, ""

    def inputs(self, one: Pass, device: torch.device) -> dict[str, Any]:
        return {**packed_inputs(one, device), "layout": Layout.of(one.segments)}

    def inside(self, model: torch.nn.Module):
        return attention_named(model, NAME, _interface)
