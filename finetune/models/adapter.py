"""LoRA adapters: attached to a base model, checked against it, loaded onto it."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from finetune.errors import UserError, is_out_of_memory
from finetune.models.faults import one_line
from finetune.models.loading import import_unsloth, stdout_to_log

MAX_PATTERN_SECONDS = 1.0


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
    """Attach a new LoRA through Unsloth; UserError names target modules that the model does not have."""
    unsloth = import_unsloth()
    import torch

    from finetune.models.lora_linear import fuse_lora_linears

    check_adapter(model, target_modules, last_layers)
    options: dict[str, Any] = {}
    if target_modules != ["all-linear"]:  # Unsloth's default is all linear layers of attention and MLP
        options["target_modules"] = target_modules
    if last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        options["layers_to_transform"] = list(range(count - last_layers, count))
    try:
        with stdout_to_log():
            adapted = unsloth.FastLanguageModel.get_peft_model(
                model,
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                bias="none",
                use_rslora=use_rslora,
                use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
                random_state=seed,
                **options,
            )
    except ValueError as error:  # PEFT names modules that it has no LoRA for
        raise UserError(f"--target_modules {' '.join(target_modules)}: {one_line(error)}") from error
    # In bfloat16 most updates of a small learning rate would round to nothing, and a resume loads float32.
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    if not torch.cuda.is_available():
        fuse_lora_linears(adapted)
    return adapted


# Unsloth trains these modules themselves instead of an adapter, and only next to an adapter.
_FULLY_TRAINED = {"lm_head", "embed_tokens"}


def check_adapter(model: Any, target_modules: list[str], last_layers: int | None) -> None:
    """UserError when a model, with weights or on the meta device, has no such target modules or too few layers."""
    count = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and last_layers > count:
        raise UserError(f"--last_layers {last_layers}: must be <= {count} (the model has {count} decoder layers)")
    if target_modules == ["all-linear"]:
        return
    adaptable: dict[str, bool] = {}
    for path, module in model.named_modules():
        is_matrix = hasattr(module, "in_features") or any(p.ndim == 2 for p in module.parameters(recurse=False))
        name = path.rsplit(".", 1)[-1]
        adaptable[name] = adaptable.get(name, False) or is_matrix or "conv" in type(module).__name__.lower()
    available = ", ".join(sorted(name for name, can in adaptable.items() if can))
    wanted = sorted(set(target_modules))
    if missing := [name for name in wanted if name not in adaptable]:
        raise UserError(f"--target_modules: the model has no module called {', '.join(missing)}; it has {available}")
    if others := [name for name in wanted if not adaptable[name]]:
        raise UserError(f"--target_modules: {', '.join(others)} has no matrix to adapt; the model has {available}")
    if set(wanted) <= _FULLY_TRAINED:
        raise UserError(
            f"--target_modules {' '.join(wanted)}: fully trained, which works only next to an adapter; add another of "
            f"{available}"
        )


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a third-party adapter; UserError when it does not name its base model."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config["base_model_name_or_path"]:
            raise KeyError("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not name the adapter's base model ({error}); save the adapter again") from error
    return config


def lora_rank(config: dict[str, Any]) -> int:
    """The largest rank in an adapter_config.json; UserError when it is not the config of a LoRA."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"the adapter is of type {config.get('peft_type')}, not LORA, so it has no rank to reduce")
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter of `folder` on it (a PeftModel); UserError when there is none that fits."""
    from peft import PeftModel

    # Only safetensors: PEFT would also load adapter_model.bin, which is a pickle.
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no {weights.name}; save the adapter in that format")
    try:
        matrices = _checked_matrices(folder / "adapter_config.json", weights)
        with _limited_patterns(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder))
        # PEFT leaves what the file lacks as it was initialized, with a warning, and ignores what has no place.
        if absent := next((w for w in caught if "missing adapter keys" in str(w.message)), None):
            raise ValueError(f"its weights are of another model. {absent.message}")
        if 0 < (places := sum("lora_A" in name for name, _ in adapted.named_parameters())) < matrices:
            raise ValueError(f"its weights are of another model: {matrices} matrices for {places} modules")
        return adapted
    except Exception as error:  # of any kind: an edited adapter_config.json can make PEFT raise anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"its adapter_config.json has no {reason}"
        raise UserError(f"the adapter in {folder} cannot be put on its base model: {reason}") from error


class _LimitedPatterns:
    """The module `re`, with a time limit for one match."""

    def __getattr__(self, name: str) -> Any:
        import regex

        return partial(getattr(regex, name), timeout=MAX_PATTERN_SECONDS) if "match" in name else getattr(re, name)


@contextlib.contextmanager
def _limited_patterns() -> Iterator[None]:
    """PEFT matches the patterns of an adapter_config.json with every module's name; one could take it hours."""
    from peft.tuners import tuners_utils
    from peft.tuners.lora import model as lora_model
    from peft.utils import other

    modules = (tuners_utils, lora_model, other)
    for module in modules:
        module.re = _LimitedPatterns()
    try:
        yield
    except TimeoutError as error:
        raise ValueError("a pattern in its adapter_config.json takes too long to match") from error
    finally:
        for module in modules:
            module.re = re


def _checked_matrices(config_file: Path, weights: Path) -> int:
    """How many lora_A the file has. ValueError when the config has a larger rank, for which PEFT would take memory."""
    from safetensors import safe_open

    config = json.loads(config_file.read_text(encoding="utf-8"))
    with safe_open(weights, "numpy") as file:
        ranks = [file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name]  # noqa: SIM118
    if config.get("peft_type") == "LORA" and (rank := lora_rank(config)) > max(ranks, default=rank):
        raise ValueError(f"rank {rank} in {config_file.name}, {max(ranks)} in {weights.name}")
    return len(ranks)
