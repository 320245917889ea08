"""Dequantizing a 4-bit base once: QLoRA's numbers without dequantizing every matrix in every pass.

QLoRA computes x @ dequantize(W) in each forward and backward (Dettmers et al., arXiv:2305.14314, equation 5). The
rounded weights never change, so dequantize(W) can be stored: the same products, for 2 bytes per weight (4 in float32)
instead of about 0.55.
"""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError

MAX_MEMORY_FRACTION = 0.7  # of the free memory, for the dequantized weights; the rest is for activations


def dequantize(model: Any, free_bytes: float) -> int:
    """Replace every 4-bit linear layer by a plain one with dequantized weights; returns how many were replaced.

    Raises UserError when the model has no such layer or the weights need too much of the free memory.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    if not layers:
        raise UserError("--dequantize_once: the base has no 4-bit layers; use it with --load_in_4bit")
    dtype = model.dtype
    needed = sum(layer.in_features * layer.out_features for _, _, layer in layers) * dtype.itemsize
    if needed > MAX_MEMORY_FRACTION * free_bytes:
        raise UserError(
            f"--dequantize_once: the dequantized weights take {needed / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are "
            "free; omit the flag (4-bit weights are then dequantized layer by layer)"
        )
    for parent, name, layer in layers:
        # As Linear4bit itself does: dequantized to the type it was quantized from, then cast to its compute type.
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype or dtype).to(dtype)
        with torch.device("meta"):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    # PEFT and Unsloth choose their LoRA layers by these.
    for owner in (model, getattr(model, "model", None)):
        for flag in ("is_loaded_in_4bit", "is_quantized"):
            if getattr(owner, flag, False):
                setattr(owner, flag, False)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    return len(layers)
