"""LoRA linear layers on a CPU with less memory traffic.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling` as separate operations, each of which reads and writes a tensor of
the size of the layer's output; on a CPU that costs as much as the small products themselves. Here the second product is
accumulated into the result of the first (GEMM with beta = 1), forward and backward. The numbers are the same up to the
order of one addition. Formula: Hu et al., LoRA, arXiv:2106.09685, section 4.1.

Float32 adapters on a bfloat16 base are computed in bfloat16 under autocast, as by PEFT, but without PEFT's conversion
of the layer's input to float32 and back and its additional rounding.

In a gated MLP, `down(silu(gate) * up)`, PyTorch keeps gate, silu(gate), up and their product for the backward pass, the
widest tensors of a layer. Two of the four are enough: the others are recomputed, which costs one more silu. (Unsloth's
GPU kernels do the same.)
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F


class _LoraLinear(torch.autograd.Function):
    """The LoRA linear layer of x, or of silu(x) * up where `up` is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = (x if up is None else F.silu(x).mul_(up)).reshape(-1, x.shape[-1])
        low = flat @ lora_a.to(flat.dtype).T
        out = F.linear(flat, weight, bias).addmm_(low, lora_b.to(flat.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, up, low, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, low, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low = (grad @ lora_b.to(grad.dtype)).mul_(ctx.scaling)
        grad_b = (grad.T @ low).mul_(ctx.scaling).to(lora_b.dtype)
        active = None if up is None else F.silu(x)
        inputs = x if active is None else active * up
        grad_a = (grad_low.T @ inputs.reshape(-1, x.shape[-1])).to(lora_a.dtype)
        grad_x = grad_up = None
        if any(ctx.needs_input_grad[:2]):
            grad_x = (grad @ weight).addmm_(grad_low, lora_a.to(weight.dtype)).view(x.shape)
            if active is not None:
                grad_up = active.mul_(grad_x)
                grad_x = torch.ops.aten.silu_backward(grad_x.mul_(up), x)
        return grad_x, grad_up, None, None, grad_a, grad_b, None


def fuse_lora_linears(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear layer of a CPU model the fused forward; returns how many were changed.

    Gated MLPs whose down projection is such a layer also keep less for their backward pass. Not changed: quantized
    layers, DoRA and other variants, layers with dropout, and adapters in another type than their base, except float32
    adapters, which are fused under autocast to the base's type.
    """
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    for module in model.modules():
        if _is_gated_mlp(module):
            module.forward = types.MethodType(_gated_forward, module)
    return count


def _is_plain(module: Any) -> bool:
    base = module.base_layer
    if type(base) is not torch.nn.Linear or base.weight.requires_grad or base.weight.device.type != "cpu":
        return False
    if len(module.lora_A) != 1 or getattr(module, "lora_variant", None) or any(module.lora_bias.values()):
        return False
    name = next(iter(module.lora_A))
    is_known_type = module.lora_A[name].weight.dtype in (base.weight.dtype, torch.float32)
    return is_known_type and isinstance(module.lora_dropout[name], torch.nn.Identity)


def _fused_parameters(module: Any, dtype: torch.dtype) -> tuple | None:
    """(weight, bias, A, B, scaling) of a layer with one active adapter; None where PEFT's own forward is needed."""
    names = module.active_adapters
    if module.disable_adapters or module.merged or len(names) != 1 or names[0] not in module.lora_A:
        return None
    base, a, b = module.base_layer, module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
    if torch.is_autocast_enabled("cpu"):
        is_same_type = torch.get_autocast_dtype("cpu") == base.weight.dtype
    else:
        is_same_type = dtype == a.dtype == base.weight.dtype
    return (base.weight, base.bias, a, b, module.scaling[names[0]]) if is_same_type else None


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    parameters = None if args or kwargs else _fused_parameters(self, x.dtype)
    if parameters is None:
        return type(self).forward(self, x, *args, **kwargs)
    return _LoraLinear.apply(x.to(self.base_layer.weight.dtype), None, *parameters)


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)) with a fused `down`: tested by its output."""
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


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    parameters = _fused_parameters(self.down_proj, gate.dtype)
    if parameters is None:
        return self.down_proj(self.act_fn(gate) * up)
    return _LoraLinear.apply(gate, up, *parameters)
