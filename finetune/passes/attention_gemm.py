"""Gradient of one attention block by matrix products, for bfloat16 on a CPU.

PyTorch's flash kernel multiplies small tiles; large bfloat16 products are several times as fast on a CPU with bfloat16
hardware (docs/speed.md). Formulas: the flash backward (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2).

PyTorch rounds products to bfloat16, which is too coarse for scores around 10 and for the difference dP - delta. Both
subtractions therefore happen inside the product, in its float32 accumulator: two additional columns hold the number to
subtract, split into a bfloat16 and the bfloat16 of the remainder, against two columns of ones.
"""

from __future__ import annotations

import torch

QUERY_CHUNK = 256  # positions at a time: their probabilities stay in the cache until they have been used


def block_grads(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block's contribution to the gradients of query, key and value, in float32.

    grad, query, output: [n, H, Q, D]; key, value: [n, KV, K, D], H % KV == 0; lse: float32 [n, H, Q]. `output` and
    `lse` are those of all blocks together. causal: query i attends to keys 0 to i (Q = K).
    """
    n, heads, queries, width = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    batch = n * key.shape[1]  # heads that share their keys are stacked in one product
    delta = (grad.float() * output.float()).sum(-1)
    query, grad, lse, delta = (x.reshape(batch, groups, queries, -1) for x in (query, grad, lse, delta))
    k, v = key.reshape(batch, keys, width), value.reshape(batch, keys, width)
    k_and_ones, v_and_ones = _append_ones(k), _append_ones(v)
    dq = query.new_empty((batch, groups, queries, width), dtype=torch.float32)
    dk, dv = (k.new_zeros(k.shape, dtype=torch.float32) for _ in range(2))
    for start in range(0, queries, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, queries)
        seen = end if causal else keys
        q, g, log_z, d = (x[:, :, start:end].reshape(batch, groups * (end - start), -1)
                          for x in (query, grad, lse, delta))  # fmt: skip
        # p = exp(scale * q k^T - lse), the probabilities of the forward pass
        p = _product(_append_negative(q, log_z / scale), k_and_ones[:, :seen].mT, scale)
        if causal:
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            p.view(batch, groups, end - start, seen)[..., start:].masked_fill_(future, float("-inf"))
        p.exp_()
        dv[:, :seen] += p.mT @ g
        ds = _product(_append_negative(g, d), v_and_ones[:, :seen].mT).mul_(p)  # p * (dP - delta)
        dk[:, :seen] += _product(ds.mT, q, scale)
        dq[:, :, start:end] = _product(ds, k[:, :seen], scale).view(batch, groups, end - start, width)
    return dq.view(n, heads, queries, width), dk.view(key.shape), dv.view(value.shape)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _append_negative(rows: torch.Tensor, subtrahend: torch.Tensor) -> torch.Tensor:
    """[b, R, D], float32 [b, R, 1] -> [b, R, D + 2]; its product with `_append_ones(x)` is rows @ x^T - subtrahend."""
    high = (-subtrahend).to(rows.dtype)
    low = (-subtrahend - high.float()).to(rows.dtype)
    return torch.cat([rows, high, low], -1)


def _append_ones(x: torch.Tensor) -> torch.Tensor:
    """[b, K, D] -> [b, K, D + 2]; see `_append_negative`."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 2)], -1)
