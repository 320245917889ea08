"""A LoRA adapter at a smaller rank: the truncated SVD of each layer's update, scale * B @ A.

No matrix of rank k is closer to the update in the Frobenius norm than its first k singular directions (Eckart and Young
1936). The SVD comes from QR decompositions of B and A, in O((in + out) r^2): PEFT's `convert_to_lora` has the same
result, but decomposes the full matrix, which takes minutes where this takes a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# With any other initialization (pissa, olora, corda, loftq, …) the base's weights depend on the adapter's rank.
RANK_FREE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraUpdate:
    """One adapted layer: its update of the base's weight is scale * b @ a. keys: of a and b in the adapter's file."""

    keys: tuple[str, str]
    a: Tensor  # parameter, (r, in)
    b: Tensor  # parameter, (out, r)
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def lora_updates(model: Any) -> list[LoraUpdate]:
    """The adapted layers of a PeftModel; UserError, naming the cause, for an adapter that is not a plain LoRA."""
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter
    if (init := getattr(model.peft_config[adapter], "init_lora_weights", None)) not in RANK_FREE_INITS:
        raise UserError(f"the adapter was initialized with {init}, which changes the base model with the rank; its "
                        "rank cannot be changed")  # fmt: skip
    updates = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if variant := module.lora_variant.get(adapter):
            what = "DoRA" if "Dora" in type(variant).__name__ else type(variant).__name__
            raise UserError(f"layer {name} uses {what}, whose update is not B @ A alone; only plain LoRA can be cut to "
                            "a smaller rank")  # fmt: skip
        if module.lora_bias.get(adapter):
            raise UserError(f"layer {name} has a bias in its LoRA (lora_bias); only plain LoRA can be cut")
        if adapter in module.lora_embedding_A:
            keys = (f"{name}.lora_embedding_A", f"{name}.lora_embedding_B")
            pair = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        elif adapter in module.lora_A:
            keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
            pair = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        else:
            continue
        if any(matrix.ndim != 2 for matrix in pair) or len(pair[0]) != pair[1].shape[1]:
            raise UserError(f"layer {name} ({type(module).__name__}) is not a linear layer; its LoRA cannot be cut to "
                            "a smaller rank")  # fmt: skip
        updates.append(LoraUpdate(keys, *pair, float(module.scaling[adapter])))
    if not updates:
        raise UserError("the adapter has no LoRA layer")
    return updates


def adapter_spectra(model: Any) -> list[np.ndarray]:
    """The singular values of each layer's update, largest first; UserError as `lora_updates`, and for nan weights."""
    import torch

    spectra = []
    for update in lora_updates(model):
        a, b = _finite(update)
        right, left = torch.linalg.qr(a.T, mode="r").R, torch.linalg.qr(b, mode="r").R
        spectra.append((abs(update.scale) * torch.linalg.svdvals(left @ right.T)).cpu().numpy())
    return spectra


def energy_share(spectra: list[np.ndarray], rank: int) -> float:
    """Share of the squared singular values of all layers that lies in the first `rank` directions of each.

    1 for an adapter that does nothing.
    """
    total = sum(float((values**2).sum()) for values in spectra)
    return sum(float((values[:rank] ** 2).sum()) for values in spectra) / total if total else 1.0


def rank_use(model: Any) -> dict[str, Any]:
    """Which part of its rank r an adapter uses: the energy in the first r/4 and r/2 directions, as recorded."""
    spectra, rank = adapter_spectra(model), max(update.rank for update in lora_updates(model))
    shares = {str(part): round(energy_share(spectra, part), 6) for part in sorted({-(-rank // 4), -(-rank // 2)})}
    enough = next(k for k in range(1, rank + 1) if energy_share(spectra, k) >= 0.99 or k == rank)
    return {"rank": rank, "energy": shares, "rank_of_99_percent": enough}


def _finite(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    """(a, b) in float64."""
    a, b = update.a.detach().double(), update.b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(f"the adapter has weights that are not finite ({update.keys[0]}); train again")
    return a, b


class TruncatableAdapter:
    """The adapter of a PeftModel, decomposed once, and applied to the model at any smaller rank.

    rank     the largest of its layers
    spectra  singular values of each layer's update
    """

    def __init__(self, model: Any):
        self.updates = lora_updates(model)
        self.rank = max(update.rank for update in self.updates)
        self._factors = [_factors(update) for update in self.updates]
        self.spectra = [values for _, _, values in self._factors]

    @contextlib.contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """Inside, the model computes with the adapter cut to `rank`; at its own rank with its own weights."""
        if rank >= self.rank:
            yield
            return
        own = [(update.a.data, update.b.data) for update in self.updates]
        try:
            for update, (a, b, _) in zip(self.updates, self._factors, strict=True):
                cut_a, cut_b = update.a.new_zeros(update.a.shape), update.b.new_zeros(update.b.shape)
                kept = min(rank, len(a))
                cut_a[:kept], cut_b[:, :kept] = a[:kept], b[:, :kept]
                update.a.data, update.b.data = cut_a, cut_b
            yield
        finally:
            for update, (a, b) in zip(self.updates, own, strict=True):
                update.a.data, update.b.data = a, b

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """The adapter's LoRA tensors at `rank`, for a config with lora_alpha = r: the scale is inside them.

        Layers of a smaller rank are filled up with zeros.
        """
        tensors = {}
        for update, (a, b, _) in zip(self.updates, self._factors, strict=True):
            root, sign = abs(update.scale) ** 0.5, 1.0 if update.scale >= 0 else -1.0
            kept = min(rank, len(a))
            new_a = update.a.new_zeros(rank, update.a.shape[1])
            new_b = update.b.new_zeros(update.b.shape[0], rank)
            new_a[:kept], new_b[:, :kept] = a[:kept] * root, b[:, :kept] * (sign * root)
            tensors |= dict(zip(update.keys, (new_a.detach().cpu(), new_b.detach().cpu()), strict=True))
        return tensors


def _factors(update: LoraUpdate) -> tuple[Tensor, Tensor, np.ndarray]:
    """(a, b, singular values of scale * b @ a), where b @ a is the layer's product and its first k rows and columns
    are the best approximation of rank k; a and b have equal norms, as after training from small weights."""
    import torch

    a, b = _finite(update)
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values.sqrt()
    new_a = (root[:, None] * (vh @ q_a.T)).float()
    new_b = ((q_b @ u) * root).float()
    return new_a, new_b, (abs(update.scale) * values).cpu().numpy()
