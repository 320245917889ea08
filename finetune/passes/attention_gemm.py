"""The gradient of one block of attention by matrix products, for bfloat16 on a CPU.

PyTorch's flash kernel multiplies small tiles; whole products of bfloat16 run several times as fast on a CPU that
multiplies bfloat16 in hardware, which leaves room for the passes over memory that the kernel saves (docs/speed.md). The
formulas are those of the flash backward (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2).

PyTorch's products round to bfloat16, which is too coarse for a score of ten or for the difference dP - delta. So both
subtractions are made inside the product, in its float32 accumulator: two columns more, with the number to be subtracted
split into a bfloat16 and the bfloat16 of its rest, against two columns of ones.
"""

from __future__ import annotations

import torch

# Query positions at a time: their probabilities stay in the cache until they have been used.
CHUNK = 256


def block_grads(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one block adds to the gradients of query, key and value, in float32.

    grad, query, output: [n, H, Q, D]; key, value: [n, KV, K, D], H % KV == 0; lse: float32 [n, H, Q]. `output` and
    `lse` are those of all blocks together. causal: query i sees the keys up to i (Q = K).
    """
    n, heads, queries, width = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    batch = n * key.shape[1]  # heads that share their keys stand below each other in one product
    query, grad, lse, delta = (
        x.reshape(batch, groups, queries, -1)
        for x in (query, grad, lse, (grad.float() * output.float()).sum(-1))
    )  # fmt: skip
    k, v = key.reshape(batch, keys, width), value.reshape(batch, keys, width)
    k_and_ones, v_and_ones = _with_ones(k), _with_ones(v)
    dq = query.new_empty((batch, groups, queries, width), dtype=torch.float32)
    dk, dv = (k.new_zeros(k.shape, dtype=torch.float32) for _ in range(2))
    for start in range(0, queries, CHUNK):
        end = min(start + CHUNK, queries)
        seen = end if causal else keys
        q, g, log_z, d = (x[:, :, start:end].reshape(batch, groups * (end - start), -1)
                          for x in (query, grad, lse, delta))  # fmt: skip
        # p = exp(scale * q k^T - lse), the probabilities of the forward pass
        p = _product(_minus(q, log_z / scale), k_and_ones[:, :seen].mT, scale)
        if causal:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            p.view(batch, groups, end - start, seen)[..., start:].masked_fill_(hidden, float("-inf"))
        p.exp_()
        dv[:, :seen] += p.mT @ g
        ds = _product(_minus(g, d), v_and_ones[:, :seen].mT).mul_(p)  # p * (dP - delta)
        dk[:, :seen] += _product(ds.mT, q, scale)
        dq[:, :, start:end] = _product(ds, k[:, :seen], scale).view(batch, groups, end - start, width)
    return dq.view(n, heads, queries, width), dk.view(key.shape), dv.view(value.shape)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _minus(rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[b, R, D] and float32 [b, R, 1] -> [b, R, D + 2], whose product with `_with_ones(x)` is rows @ x^T - numbers."""
    high = (-numbers).to(rows.dtype)
    low = (-numbers - high.float()).to(rows.dtype)
    return torch.cat([rows, high, low], -1)


def _with_ones(columns: torch.Tensor) -> torch.Tensor:
    """[b, K, D] -> [b, K, D + 2]; see `_minus`."""
    return torch.cat([columns, columns.new_ones(*columns.shape[:-1], 2)], -1)
