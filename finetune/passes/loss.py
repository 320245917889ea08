"""Cross entropy at the trained positions only, in chunks, without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_POSITIONS = 512  # projected at a time: 512 x 150,000 logits take 300 MB in float32
CPU_SOFTMAX_POSITIONS = 32  # converted to float32 probabilities at a time on a CPU: few enough to stay in its cache


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross entropies after a frozen linear head; the gradient is computed while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = CPU_SOFTMAX_POSITIONS if hidden.device.type == "cpu" else CHUNK_POSITIONS
        for start in range(0, len(hidden), CHUNK_POSITIONS):
            chunk = slice(start, start + CHUNK_POSITIONS)
            logits = F.linear(hidden[chunk], weight, bias)
            for part, target, w in zip(
                logits.split(size), targets[chunk].split(size), weights[chunk].split(size), strict=True
            ):
                log_p = torch.log_softmax(part, dim=-1, dtype=torch.float32)
                total -= (log_p.gather(1, target[:, None])[:, 0] * w).sum()
                if grad is not None:
                    # d loss / d logits = w * (softmax(logits) - onehot(target)), written over the logits
                    p = log_p.exp_()
                    p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
                    part.copy_(p.mul_(w[:, None]))
            if grad is not None:
                grad[chunk] = logits @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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

    hidden: [N, E]; targets: int64 [N]; weights: float32 [N]. The logits are multiplied by `scale` and, with a `softcap`
    c, become c * tanh(logits / c), as Cohere, Granite and Gemma 2 do after their heads.
    """
    is_plain = type(head) is torch.nn.Linear and not head.weight.requires_grad
    if is_plain and softcap is None and scale == 1.0:
        return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets, weights)

    def chunk_loss(h: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = head_logits(head, h, softcap=softcap, scale=scale)
        return (F.cross_entropy(logits.float(), t, reduction="none") * w).sum()

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, t, w in zip(*(x.split(CHUNK_POSITIONS) for x in (hidden, targets, weights)), strict=True):
        total = total + checkpoint(chunk_loss, h, t, w, use_reentrant=False)
    return total


def head_logits(
    head: torch.nn.Module, hidden: torch.Tensor, *, softcap: float | None = None, scale: float = 1.0
) -> torch.Tensor:
    """The model's logits [N, vocabulary] of hidden states [N, E], as `head_loss` describes them."""
    logits = head(hidden) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def logit_transform(config: Any) -> dict[str, Any]:
    """`softcap` and `scale` of a text config, as `head_loss` takes them."""
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
