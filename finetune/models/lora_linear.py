"""LoRA linear layers on a CPU with fewer passes over memory.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling` as separate operations, each of which reads and writes a tensor as
large as the layer's output; on a CPU that traffic costs as much as the small products themselves. Here the second
product is accumulated into the first one's result (GEMM with beta = 1), forward and backward. The numbers are the same
up to the order of one addition. Formula: Hu et al., LoRA, arXiv:2106.09685, section 4.1.

Adapters in float32 over a bfloat16 base are computed in bfloat16 under autocast, as PEFT's are then; PEFT takes the
layer's input to float32 and back for that, and rounds once more before it adds.

In a gated MLP, `down(silu(gate) * up)`, PyTorch keeps gate, silu(gate), up and their product for the backward pass, the
widest tensors of a layer. Two of the four are enough: the others are made again from them, which costs one more silu.
(Unsloth's GPU kernels do the same.)
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
        out, low = _product(flat, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(flat, low, weight, lora_a, lora_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_out):
        flat, low, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low, grad_b = _adapter_grads(grad, low, lora_b, ctx.scaling)
        grad_a = (grad_low.T @ flat).to(lora_a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, lora_a.to(weight.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class _GatedLoraLinear(torch.autograd.Function):
    """The LoRA linear layer of silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias, lora_a, lora_b, scaling: float):
        flat = F.silu(gate).mul_(up).reshape(-1, gate.shape[-1])
        out, low = _product(flat, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(gate, up, low, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_out):
        gate, up, low, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low, grad_b = _adapter_grads(grad, low, lora_b, ctx.scaling)
        active = F.silu(gate)
        grad_a = (grad_low.T @ (active * up).reshape(-1, gate.shape[-1])).to(lora_a.dtype)
        grad_product = (grad @ weight).addmm_(grad_low, lora_a.to(weight.dtype)).view(gate.shape)
        grad_up = active.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_gate, grad_up, None, None, grad_a, grad_b, None


def _product(flat, weight, bias, lora_a, lora_b, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(flat @ (W + scaling B A)^T + bias [N, out], flat @ A^T [N, r]) of flat [N, in], all in flat's type."""
    low = flat @ lora_a.to(flat.dtype).T
    return F.linear(flat, weight, bias).addmm_(low, lora_b.to(flat.dtype).T, alpha=scaling), low


def _adapter_grads(grad, low, lora_b, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient at flat @ A^T [N, r], gradient of B) from grad [N, out] and low = flat @ A^T [N, r]."""
    grad_low = (grad @ lora_b.to(grad.dtype)).mul_(scaling)
    return grad_low, (grad.T @ low).mul_(scaling).to(lora_b.dtype)


def fuse_lora_linears(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer of a CPU model the fused forward; returns how many were changed.

    Gated MLPs with such a layer behind them keep less for their backward pass from then on.

    Left alone: quantised layers, DoRA and other variants, dropout, adapters in another type than their base but for
    float32, whose layers are fused under autocast to the base's type.
    """
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = types.MethodType(_forward, module)
            count += 1
    for module in model.modules():
        if _is_gated(module):
            module.forward = types.MethodType(_gated_forward, module)
    return count


def _is_plain(module: Any) -> bool:
    base = module.base_layer
    if type(base) is not torch.nn.Linear or base.weight.requires_grad or base.weight.device.type != "cpu":
        return False
    if len(module.lora_A) != 1 or getattr(module, "lora_variant", None) or any(module.lora_bias.values()):
        return False
    name = next(iter(module.lora_A))
    known_type = module.lora_A[name].weight.dtype in (base.weight.dtype, torch.float32)
    return known_type and isinstance(module.lora_dropout[name], torch.nn.Identity)


def _adapter(module: Any, dtype: torch.dtype) -> str | None:
    """The one active adapter of a fused layer; None where an input of this type is PEFT's own business."""
    names = module.active_adapters
    if module.disable_adapters or module.merged or len(names) != 1 or names[0] not in module.lora_A:
        return None
    base = module.base_layer.weight.dtype
    if torch.is_autocast_enabled("cpu"):
        same = torch.get_autocast_dtype("cpu") == base
    else:
        same = dtype == module.lora_A[names[0]].weight.dtype == base
    return names[0] if same else None


def _numbers(module: Any, name: str) -> tuple:
    base = module.base_layer
    return base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = None if args or kwargs else _adapter(self, x.dtype)
    if name is None:
        return type(self).forward(self, x, *args, **kwargs)
    return _LoraLinear.apply(x.to(self.base_layer.weight.dtype), *_numbers(self, name))


def _is_gated(module: Any) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)) with a fused `down`: tried, not read from its name."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if any(part is None for part in parts) or getattr(parts[2].forward, "__func__", None) is not _forward:
        return False
    gate, up, down, act = parts
    weight = down.base_layer.weight
    probe = torch.linspace(-3, 3, 97, dtype=weight.dtype)
    x = torch.linspace(-1, 1, 2 * weight.shape[0], dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        if not torch.allclose(act(probe), F.silu(probe)):
            return False
        return torch.allclose(module(x), down(F.silu(gate(x)) * up(x)))


def _gated_forward(self, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    name = _adapter(self.down_proj, gate.dtype)
    if name is None:
        return self.down_proj(self.act_fn(gate) * up)
    return _GatedLoraLinear.apply(gate, up, *_numbers(self.down_proj, name))
