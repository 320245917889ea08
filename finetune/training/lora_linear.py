"""LoRA linear layers on a CPU with fewer passes over memory.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling` as separate operations, each of which reads and writes a tensor as
large as the layer's output; on a CPU that traffic costs as much as the small products themselves. Here the second
product is accumulated into the first one's result (GEMM with beta = 1), forward and backward. The numbers are the same
up to the order of one addition. Formula: Hu et al., LoRA, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling: float):
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ lora_a.T
        out = F.linear(flat, weight, bias)
        out.addmm_(low, lora_b.T, alpha=scaling)
        ctx.save_for_backward(flat, low, weight, lora_a, lora_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_out):
        flat, low, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low = (grad @ lora_b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, lora_a).view(ctx.shape)
        return grad_x, None, None, grad_low.T @ flat, (grad.T @ low).mul_(ctx.scaling), None


def fuse_lora_linears(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer of a CPU model the fused forward; returns how many were changed.

    Left alone: quantised layers, DoRA and other variants, dropout, adapters in another type than their base.
    """
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = types.MethodType(_forward, module)
            count += 1
    return count


def _is_plain(module: Any) -> bool:
    base = module.base_layer
    if type(base) is not torch.nn.Linear or base.weight.requires_grad or base.weight.device.type != "cpu":
        return False
    if len(module.lora_A) != 1 or getattr(module, "lora_variant", None) or any(module.lora_bias.values()):
        return False
    name = next(iter(module.lora_A))
    same_type = module.lora_A[name].weight.dtype == base.weight.dtype
    return same_type and isinstance(module.lora_dropout[name], torch.nn.Identity)


def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
        return type(self).forward(self, x, *args, **kwargs)
    name = names[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    if x.dtype != a.dtype or torch.is_autocast_enabled("cpu"):
        return type(self).forward(self, x)
    return _LoraLinear.apply(x, self.base_layer.weight, self.base_layer.bias, a, b, self.scaling[name])
