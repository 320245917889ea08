"""Cross entropy of chosen positions only, in chunks, without keeping the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Positions that are projected at a time: 512 x 150,000 logits are 300 MB in float32.
CHUNK = 512
# Of these, positions whose probabilities are made at a time on a CPU, in float32: few enough to stay in its cache.
ROWS_ON_CPU = 32


def _chunk_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


class _FrozenHead(torch.autograd.Function):
    """Sum of weighted cross entropies behind a frozen linear head; the gradient is made while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        rows = ROWS_ON_CPU if hidden.device.type == "cpu" else CHUNK
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = F.linear(hidden[part], weight, bias)
            for some, target, weight_of_some in zip(
                logits.split(rows), targets[part].split(rows), weights[part].split(rows), strict=True
            ):
                log_p = torch.log_softmax(some, dim=-1, dtype=torch.float32)
                total -= (log_p.gather(1, target[:, None])[:, 0] * weight_of_some).sum()
                if needs_grad:
                    # d loss / d logits = w * (softmax(logits) - onehot(target)), written where the logits were
                    p = log_p.exp_()
                    p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
                    some.copy_(p.mul_(weight_of_some[:, None]))
            if needs_grad:
                grad[part] = logits @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None


def head_loss(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Sum over positions of weight * cross entropy, float32 scalar.

    hidden: [N, E]; targets: int64 [N]; weights: float32 [N]. `scale` multiplies the logits and `softcap` c bends them
    to c * tanh(logits / c), as Cohere, Granite and Gemma 2 do behind their heads.
    """
    plain = type(head) is torch.nn.Linear and not head.weight.requires_grad
    if plain and softcap is None and scale == 1.0:
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, weights)

    def chunk(h: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = head(h) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return _chunk_loss(logits, t, w)

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(chunk, hidden[part], targets[part], weights[part], use_reentrant=False)
    return total


def logit_transform(config) -> dict[str, float | None]:
    """The `softcap` and `scale` of a model's config (text config)."""
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
