"""Key-value cache for prompts with a common prefix, which is stored and read once for all rows.

A batch of B rows is cut into segments; the rows of a segment share a prefix of P tokens. A query attends to

    softmax([q Kp^T, q Ks^T]) [Vp; Vs]

where Kp, Vp (P tokens, one copy for the segment) and Ks, Vs (the row's suffix) are never concatenated: both parts are
exponentiated against the same maximum and divided by the same sum, which gives the ordinary softmax. The queries of
all rows of a segment are multiplied by Kp in one matrix product, so the prefix is read from memory once a step instead
of once a row; on a CPU that is most of the time of a decoding step.

It implements Transformers' attention interface. The model is called with `use_cache=False`: the attention function
receives keys with their rotary positions and stores them here.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "sandwich_prefix_decoding"
MAX_SCORES = 16 * 1024 * 1024  # attention scores in memory at once (64 MB in float32); longer queries are split

_active: contextvars.ContextVar = contextvars.ContextVar("active_prefix_cache")


class Unsupported(RuntimeError):
    """The model's attention cannot be computed here; the caller falls back to the model's own `generate`."""


@dataclass
class Prefix:
    """The common prefix of a segment: per layer keys and values of shape (kv_heads, P, head_dim)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __len__(self) -> int:
        return self.keys[0].shape[1]


Segment = tuple[int, int, Prefix | None]


class PrefixCache:
    """Keys and values of the suffixes of B rows, up to `capacity` tokens each, and the prefixes they share.

    `segments` is a list of (first row, end row, Prefix or None), covering the rows in order.
    """

    def __init__(self, segments: list[Segment], capacity: int):
        self.segments = segments
        self.capacity = capacity
        self.rows = segments[-1][1]
        self.keys: list[torch.Tensor] = []  # per layer (B, kv_heads, capacity, head_dim), allocated at the first write
        self.values: list[torch.Tensor] = []
        self.part = (0, self.rows)  # rows in the current forward pass
        self.slots = torch.zeros(0)  # decoding: index of each row's new token in its suffix, shape (B,)
        self.longest = 0  # decoding: tokens of the longest suffix, the new one included

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Length of each row's prefix, shape (B,): the position of its first suffix token."""
        lengths = [len(prefix) if prefix else 0 for _, _, prefix in self.segments]
        counts = [end - start for start, end, _ in self.segments]
        return torch.repeat_interleave(torch.tensor(lengths, device=device), torch.tensor(counts, device=device))

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows except `rows` (sorted indices, shape (n,))."""
        kept = set(rows.tolist())
        segments, count = [], 0
        for start, end, prefix in self.segments:
            left = sum(row in kept for row in range(start, end))
            if left:
                segments.append((count, count + left, prefix))
                count += left
        self.segments, self.rows, self.part = segments, count, (0, count)
        self.keys = [layer.index_select(0, rows) for layer in self.keys]
        self.values = [layer.index_select(0, rows) for layer in self.values]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new keys and values (rows of `part`, kv_heads, S, head_dim) of one layer."""
        if layer == len(self.keys):
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros((*shape[:3], value.shape[3])))
        elif layer > len(self.keys):
            raise Unsupported(f"layer {layer} ran before layer {len(self.keys)}")
        if key.shape[2] == 1 and self.slots.numel():
            rows = torch.arange(self.rows, device=key.device)
            self.keys[layer][rows, :, self.slots] = key[:, :, 0]
            self.values[layer][rows, :, self.slots] = value[:, :, 0]
        else:
            start, end = self.part
            self.keys[layer][start:end, :, : key.shape[2]] = key
            self.values[layer][start:end, :, : key.shape[2]] = value


@contextlib.contextmanager
def prefix_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use this attention in `model` inside the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise Unsupported("this model does not use Transformers' attention interface")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def active_cache(cache: PrefixCache) -> Iterator[None]:
    """Let forward passes inside the block read and write this cache."""
    token = _active.set(cache)
    try:
        yield
    finally:
        _active.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens: query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim).

    Returns (B, S, heads, head_dim) and no weights, as the interface requires.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise Unsupported("soft-capped attention or attention sinks")
    cache: PrefixCache = _active.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    cache.write(layer, key, value)
    start, end = cache.part
    segments = [(max(a, start) - start, min(b, end) - start, p) for a, b, p in cache.segments if a < end and b > start]
    length = query.shape[2]
    decoding = length == 1 and cache.slots.numel() > 0
    if not decoding and all(prefix is None for _, _, prefix in segments):
        return _causal(query, key, value, scaling, sliding_window), None
    if not decoding and sliding_window is None and query.device.type == "cpu":
        return _merged_flash(query, key, value, segments, layer, scaling), None
    slots = cache.slots[:, None] if decoding else torch.arange(length, device=query.device).expand(end - start, -1)
    suffix = cache.longest if decoding else length
    keys, values = cache.keys[layer][start:end, :, :suffix], cache.values[layer][start:end, :, :suffix]
    widest = suffix + max(len(prefix) if prefix else 0 for _, _, prefix in segments)
    block = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * widest))
    outputs = [
        _two_part(part, at, keys, values, segments, layer, scaling, sliding_window)
        for part, at in zip(query.split(block, dim=2), slots.split(block, dim=1), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _causal(query, key, value, scaling, sliding_window):
    """Causal attention of S tokens to each other; padding is on the right, where no token attends to it."""
    length = query.shape[2]
    mask = None
    if sliding_window is not None and length > sliding_window:
        at = torch.arange(length, device=query.device)
        mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - sliding_window)
    grouped = query.shape[1] != key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2)


def _merged_flash(query, key, value, segments: list[Segment], layer: int, scaling: float) -> torch.Tensor:
    """Prefill on a CPU: its flash kernel for prefix and suffix, merged by their log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log_sum = flash(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 0.0, True, scale=scaling
    )
    for start, end, prefix in segments:
        if prefix is None:
            continue
        part = query[start:end]
        stacked = part.transpose(0, 1).reshape(1, part.shape[1], -1, part.shape[3])  # (1, heads, n * S, head_dim)
        keys, values = (x[layer].repeat_interleave(group, 0)[None] for x in (prefix.keys, prefix.values))
        shared, shared_log_sum = flash(stacked, keys, values, 0.0, False, scale=scaling)
        shared = shared.view(part.shape[1], end - start, part.shape[2], -1).transpose(0, 1)
        shared_log_sum = shared_log_sum.view(part.shape[1], end - start, part.shape[2]).transpose(0, 1)
        weight = torch.sigmoid(shared_log_sum - log_sum[start:end])[..., None].to(shared.dtype)
        output[start:end] = torch.lerp(output[start:end], shared, weight)
    return output.transpose(1, 2)


def _two_part(query, slots, keys, values, segments: list[Segment], layer: int, scaling: float, sliding_window):
    """One softmax over prefix and suffix. `slots` (B, S): each query's index in its suffix."""
    rows, heads, length, size = query.shape
    kv_heads, suffix = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    query = (query * scaling).reshape(rows, kv_heads, group * length, size)

    at = torch.arange(suffix, device=query.device)
    visible = at <= slots[:, :, None]  # (B, S, suffix)
    if sliding_window is not None:
        visible &= at > slots[:, :, None] - sliding_window
    scores = (query @ keys.transpose(-1, -2)).float().view(rows, kv_heads, group, length, suffix)
    scores.masked_fill_(~visible[:, None, None], float("-inf"))
    maximum = scores.amax(-1)  # finite: a token always sees itself

    shared = []
    for start, end, prefix in segments:
        if prefix is None:
            continue
        stacked = query[start:end].transpose(0, 1).reshape(kv_heads, -1, size)
        prefix_scores = (stacked @ prefix.keys[layer].transpose(-1, -2)).float()
        prefix_scores = prefix_scores.view(kv_heads, end - start, group, length, len(prefix))
        if sliding_window is not None:
            position = len(prefix) + slots[start:end, :, None]  # (n, S, 1)
            seen = torch.arange(len(prefix), device=query.device) > position - sliding_window
            prefix_scores.masked_fill_(~seen[None, :, None], float("-inf"))
        maximum[start:end] = torch.maximum(maximum[start:end], prefix_scores.amax(-1).transpose(0, 1))
        shared.append((slice(start, end), prefix, prefix_scores))

    scores = scores.sub_(maximum[..., None]).exp_()
    total = scores.sum(-1)
    output = scores.to(values.dtype).view(rows, kv_heads, group * length, suffix) @ values
    output = output.view(rows, kv_heads, group, length, -1).float()
    for part, prefix, prefix_scores in shared:
        prefix_scores = prefix_scores.sub_(maximum[part].transpose(0, 1)[..., None]).exp_()
        total[part] += prefix_scores.sum(-1).transpose(0, 1)
        mixed = prefix_scores.to(values.dtype).view(kv_heads, -1, len(prefix)) @ prefix.values[layer]
        output[part] += mixed.view(kv_heads, -1, group, length, mixed.shape[-1]).transpose(0, 1)
    output = (output / total[..., None]).to(values.dtype)
    return output.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)
