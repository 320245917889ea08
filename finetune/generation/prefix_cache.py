"""Keys and values for decoding many prompts that start alike: the common start is stored, and read, once.

A batch of B rows is cut into segments; the rows of a segment share a prefix of P tokens. A query attends to

    softmax([q Kp^T, q Ko^T]) [Vp; Vo]

where Kp, Vp (P tokens, one copy for the segment) and Ko, Vo (the row's own tokens) are never concatenated: both parts
are exponentiated against the same maximum and divided by the same sum, so the result is the ordinary softmax. The
queries of all rows of a segment meet Kp in one matrix product, so the prefix is read from memory once a step instead
of once a row; on a CPU that reading is most of the time of a decoding step.

It plugs into Transformers' attention interface. The model is called without a cache of its own (`use_cache=False`):
the attention function receives keys that already carry their rotary positions and keeps them here.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

NAME = "sandwich_prefix_decoding"
MAX_SCORES = 16 * 1024 * 1024  # attention scores held at once (64 MB in float32); longer queries are cut into blocks

_active: contextvars.ContextVar = contextvars.ContextVar("active_prefix_cache")


class Unsupported(RuntimeError):
    """This model's attention cannot be computed here; the caller falls back to the model's own `generate`."""


@dataclass
class Prefix:
    """The common start of a segment: per layer keys and values of shape (kv_heads, P, head_dim)."""

    input_ids: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


class PrefixCache:
    """Own keys and values of B rows, at most `capacity` tokens each, and the prefixes they share.

    `segments` is a list of (first row, end row, Prefix or None), covering the rows in order.
    """

    def __init__(self, segments: list[tuple[int, int, Prefix | None]], capacity: int):
        self.segments = segments
        self.capacity = capacity
        self.rows = segments[-1][1]
        self.keys: list[torch.Tensor] = []  # per layer (B, kv_heads, capacity, head_dim), made at the first write
        self.values: list[torch.Tensor] = []
        self.building: Prefix | None = None  # set while a prefix itself is computed
        self.part = (0, self.rows)  # rows that the current call computes
        self.slots = torch.zeros(0)  # decoding: index of each row's new token among its own tokens, shape (B,)
        self.longest = 0  # decoding: own tokens of the longest row, the new one included

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Length of each row's prefix, shape (B,): the position of its own token 0."""
        lengths = [len(prefix) if prefix else 0 for _, _, prefix in self.segments]
        counts = [end - start for start, end, _ in self.segments]
        return torch.repeat_interleave(torch.tensor(lengths, device=device), torch.tensor(counts, device=device))

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but those in `rows` (sorted indices, shape (n,)); finished rows cost nothing from here on."""
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
        """Store new keys and values (rows of the current part, kv_heads, S, head_dim) of one layer."""
        if layer == len(self.keys):
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros((*shape[:3], value.shape[3])))
        elif layer > len(self.keys):
            raise Unsupported(f"layer {layer} came before layer {len(self.keys)}")
        if key.shape[2] == 1 and self.slots.numel():
            rows = torch.arange(self.rows, device=key.device)
            self.keys[layer][rows, :, self.slots] = key[:, :, 0]
            self.values[layer][rows, :, self.slots] = value[:, :, 0]
        else:
            start, end = self.part
            self.keys[layer][start:end, :, : key.shape[2]] = key
            self.values[layer][start:end, :, : key.shape[2]] = value


@contextlib.contextmanager
def attention_on(model: torch.nn.Module) -> Iterator[None]:
    """Let `model` (a Transformers model) use this attention inside the block, and its own again afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise Unsupported("this model does not use Transformers' attention interface")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def using(cache: PrefixCache) -> Iterator[None]:
    """The cache that forward passes inside the block read and write."""
    token = _active.set(cache)
    try:
        yield
    finally:
        _active.reset(token)


def _attention(module, query, key, value, attention_mask=None, *, scaling=None, sliding_window=None, **kwargs):
    """Attention of new tokens: query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim).

    Returns (B, S, heads, head_dim) and None for the weights, as the interface asks.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise Unsupported("soft-capped attention or attention sinks")
    cache: PrefixCache = _active.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    if cache.building is not None:
        if layer != len(cache.building.keys):
            raise Unsupported(f"layer {layer} came before layer {len(cache.building.keys)}")
        cache.building.keys.append(key[0])
        cache.building.values.append(value[0])
        return _causal(query, key, value, scaling, sliding_window), None
    cache.write(layer, key, value)
    start, end = cache.part
    segments = [(max(a, start), min(b, end), p) for a, b, p in cache.segments if a < end and b > start]
    length = query.shape[2]
    decoding = length == 1 and cache.slots.numel() > 0
    if not decoding and all(prefix is None for _, _, prefix in segments):
        return _causal(query, key, value, scaling, sliding_window), None
    segments = [(a - start, b - start, prefix) for a, b, prefix in segments]
    if not decoding and sliding_window is None and query.device.type == "cpu":
        return _merged_blocks(query, key, value, segments, layer, scaling), None
    slots = cache.slots[:, None] if decoding else torch.arange(length, device=query.device).expand(end - start, -1)
    own = cache.longest if decoding else length
    own_keys, own_values = cache.keys[layer][start:end, :, :own], cache.values[layer][start:end, :, :own]
    widest = own + max(len(prefix) if prefix else 0 for _, _, prefix in segments)
    block = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * widest))
    outputs = [
        _two_part(
            query[:, :, at : at + block],
            slots[:, at : at + block],
            own_keys,
            own_values,
            segments,
            layer,
            scaling,
            sliding_window,
        )
        for at in range(0, length, block)
    ]
    return torch.cat(outputs, dim=1), None


def _causal(query, key, value, scaling, sliding_window):
    """Plain causal attention of S tokens among themselves; padding on the right is never looked at."""
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


def _merged_blocks(query, key, value, segments, layer, scaling):
    """Many new tokens on a CPU: its flash kernel for each part, merged by the parts' log-sum-exp."""
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


def _two_part(query, slots, own_keys, own_values, segments, layer, scaling, sliding_window):
    """One softmax over two sets of keys, prefix and own. `slots` (B, S): each query's index among its own tokens."""
    rows, heads, length, size = query.shape
    kv_heads, own = own_keys.shape[1], own_keys.shape[2]
    group = heads // kv_heads
    query = (query * scaling).reshape(rows, kv_heads, group * length, size)

    at = torch.arange(own, device=query.device)
    visible = at <= slots[:, :, None]  # (B, S, own)
    if sliding_window is not None:
        visible &= at > slots[:, :, None] - sliding_window
    own_scores = (query @ own_keys.transpose(-1, -2)).float().view(rows, kv_heads, group, length, own)
    own_scores.masked_fill_(~visible[:, None, None], float("-inf"))
    maximum = own_scores.amax(-1)  # finite: a token always sees itself

    shared = []
    for start, end, prefix in segments:
        if prefix is None:
            continue
        keys = prefix.keys[layer]  # (kv_heads, P, head_dim)
        stacked = query[start:end].transpose(0, 1).reshape(kv_heads, -1, size)
        scores = (stacked @ keys.transpose(-1, -2)).float()
        scores = scores.view(kv_heads, end - start, group, length, len(prefix))
        if sliding_window is not None:
            position = len(prefix) + slots[start:end, :, None]  # (n, S, 1)
            seen = torch.arange(len(prefix), device=query.device) > position - sliding_window
            scores.masked_fill_(~seen[None, :, None], float("-inf"))
        maximum[start:end] = torch.maximum(maximum[start:end], scores.amax(-1).transpose(0, 1))
        shared.append((start, end, prefix, scores))

    own_scores = own_scores.sub_(maximum[..., None]).exp_()
    total = own_scores.sum(-1)
    output = own_scores.to(own_values.dtype).view(rows, kv_heads, group * length, own) @ own_values
    output = output.view(rows, kv_heads, group, length, -1).float()
    for start, end, prefix, scores in shared:
        scores = scores.sub_(maximum[start:end].transpose(0, 1)[..., None]).exp_()
        total[start:end] += scores.sum(-1).transpose(0, 1)
        values = prefix.values[layer]
        mixed = scores.to(values.dtype).view(kv_heads, -1, len(prefix)) @ values
        output[start:end] += mixed.view(kv_heads, end - start, group, length, -1).transpose(0, 1)
    output = (output / total[..., None]).to(own_values.dtype)
    return output.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)
