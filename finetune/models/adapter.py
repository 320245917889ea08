"""LoRA: attached to a base model, checked against it, loaded onto it."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.faults import one_line
from finetune.models.loading import import_unsloth

log = logging.getLogger("sandwich")


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    last_layers: int | None = None,
    use_rslora: bool,
    gradient_checkpointing: bool,
    seed: int,
) -> Any:
    """Attach a fresh LoRA through Unsloth; UserError names target modules the model does not have."""
    unsloth = import_unsloth()
    import torch

    from finetune.models.lora_linear import fuse_lora_linears

    check_adapter(model, target_modules, last_layers)
    # Unsloth's default is all linear layers of attention and MLP.
    targets = None if target_modules == ["all-linear"] else target_modules
    layers = None
    if last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = list(range(count - last_layers, count))
    news = io.StringIO()
    try:
        with contextlib.redirect_stdout(news):
            adapted = unsloth.FastLanguageModel.get_peft_model(
                model,
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                **({"target_modules": targets} if targets else {}),
                bias="none",
                layers_to_transform=layers,
                use_rslora=use_rslora,
                use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
                random_state=seed,
            )
    except ValueError as error:  # PEFT's own word on modules that it has no LoRA for
        raise UserError(f"--target_modules {' '.join(target_modules)}: {one_line(error)}") from error
    for line in news.getvalue().splitlines():
        log.info("%s", line)
    if not torch.cuda.is_available():
        fuse_lora_linears(adapted)
    return adapted


# What Unsloth trains whole, not by an adapter, and only beside one.
_TRAINED_WHOLE = {"lm_head", "embed_tokens"}


def check_adapter(model: Any, target_modules: list[str], last_layers: int | None) -> None:
    """UserError when a model, with weights or on the meta device, cannot be adapted so."""
    if target_modules != ["all-linear"]:
        adaptable: dict[str, bool] = {}
        for path, module in model.named_modules():
            matrix = hasattr(module, "in_features") or any(p.ndim == 2 for p in module.parameters(recurse=False))
            name = path.rsplit(".", 1)[-1]
            adaptable[name] = adaptable.get(name, False) or matrix or "conv" in type(module).__name__.lower()
        has = ", ".join(sorted(name for name, can in adaptable.items() if can))
        wanted = sorted(set(target_modules))
        if missing := [name for name in wanted if name not in adaptable]:
            raise UserError(f"--target_modules: the model has no module called {', '.join(missing)}; it has {has}")
        if others := [name for name in wanted if not adaptable[name]]:
            raise UserError(f"--target_modules: {', '.join(others)} holds no matrix to adapt; the model has {has}")
        if set(wanted) <= _TRAINED_WHOLE:
            raise UserError(
                f"--target_modules {' '.join(wanted)}: trained whole, and only beside an adapter; add another of {has}"
            )
    count = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and last_layers > count:
        raise UserError(f"--last_layers {last_layers}: the model has {count} decoder layers; give at most so many")


def adapter_config(folder: Path) -> dict[str, Any]:
    """A stranger's adapter_config.json; UserError when it does not name its base model."""
    import json

    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config["base_model_name_or_path"]:
            raise KeyError("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not name the adapter's base model ({error}); save the adapter anew") from error
    return config


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter of `folder` on it (a PeftModel); UserError when there is none that fits."""
    from peft import PeftModel
    from safetensors import SafetensorError

    # Only safetensors: PEFT would take adapter_model.bin too, which is a pickle.
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors; name a folder in which an adapter was saved so")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"its adapter_config.json has no {reason}"
        raise UserError(f"the adapter in {folder} cannot be put on its base model: {reason}") from error
