"""--rope_scaling: rotary positions of a base stretched by a fixed factor, in its config and checked in its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stretched(config: PreTrainedConfig, scaling: str, name: str) -> dict[str, Any]:
    """{"rope_parameters", "max_position_embeddings"} of the stretched model.

    Raises UserError for a model without rotary positions, or with a scaling of its own.
    """
    text = config.get_text_config()
    positions, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    where = f"--rope_scaling {scaling}: model {name}"
    if not isinstance(rope, Mapping) or not rope.get("rope_theta") or not isinstance(positions, int):
        raise UserError(f"{where} has no rotary positions that can be stretched; omit the flag")
    if (kind := rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise UserError(f"{where} has {kind} scaling of its own, which is used without the flag; omit it")
    kind, _, factor = scaling.partition(":")
    parameters = {**rope, "rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = positions
    return {"rope_parameters": parameters, "max_position_embeddings": int(positions * float(factor))}


def stretched_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """The entries that `stretched` has changed in a config."""
    text = config.get_text_config()
    return {key: getattr(text, key) for key in ("rope_parameters", "max_position_embeddings")}


def set_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Write the entries of `stretched` into a config."""
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)


def check_applied(model: Any, config: PreTrainedConfig, scaling: str, name: str) -> None:
    """UserError unless every rotary layer of a loaded model has the frequencies of the stretched config."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    wanted, scale = ROPE_INIT_FUNCTIONS[scaling.partition(":")[0]](text, torch.device("cpu"))

    def follows(layer: Any) -> bool:
        found = layer.inv_freq.float().cpu()
        is_same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3)
        return is_same and abs(getattr(layer, "attention_scaling", 1.0) - scale) < 1e-3

    layers = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not layers or not all(map(follows, layers)):
        raise UserError(
            f"--rope_scaling {scaling}: Unsloth's code for model {name} does not apply it; omit the flag, or choose "
            "a model that was made for more positions"
        )
