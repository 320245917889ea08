"""--init_adapter: a new run, with its own data, optimizer and schedule, that starts from the adapter of another."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.adapter import adapter_config
from finetune.models.bundled import resolve_model
from finetune.runs.find import Run, find_run
from finetune.settings import Settings, checked

log = logging.getLogger("sandwich")
# What makes an adapter more than two matrices beside each named module.
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "lora_bias")


def with_adapter_flags(settings: Settings) -> Settings:
    """The flags with those that the adapter of --init_adapter decides; UserError for a given one that differs."""
    where = f"--init_adapter {settings.init_adapter}"
    run = find_run(str(settings.init_adapter))
    if run.adapter is None:
        raise UserError(
            f"{where}: not a run or an adapter; name a run folder, one of its checkpoints or its final_model"
        )
    flags = _run_flags(run) if run.experiment is not None else _third_party_flags(run.adapter, where)
    flags = {name: checked(where, name, value) for name, value in flags.items()}
    for name, value in flags.items():
        given = getattr(settings, name)
        if name in settings.given and given not in (None, value) and not _is_same_folder(given, value):
            raise UserError(f"{where}: it was made with --{name} {_shown(value)}, not {_shown(given)}; omit --{name}")
    for name, value in _base_flags(run).items():
        given = getattr(settings, name)
        if name not in settings.given:
            flags[name] = value
        elif given != value:
            log.info("%s: it was made on a base with %s, not %s", where, _switch(name, value), _switch(name, given))
    log.info("starting from the adapter in %s", run.adapter)
    return replace(settings, **flags)  # recorded as the new run's own, so that its resume does not need the other run


def _run_flags(run: Run) -> dict[str, Any]:
    assert run.experiment is not None
    config, stored = run.experiment.config, run.experiment.config["flags"]
    names = ("rank", "alpha", "use_rslora", "target_modules", "last_layers", "format")
    flags = {name: stored[name] for name in names if name in stored}
    return flags | {"model": run.base_name, "revision": config.get("base_model_revision")}


def _base_flags(run: Run) -> dict[str, Any]:
    """How the run loaded the base to which its adapter belongs; another run may choose otherwise."""
    if run.experiment is None:
        return {}
    config = run.experiment.config
    found = {"load_in_4bit": config.get("load_in_4bit"), "rope_scaling": config["flags"].get("rope_scaling")}
    return {name: value for name, value in found.items() if value is not None}


def _switch(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {_shown(value)}"


def _third_party_flags(adapter: Path, where: str) -> dict[str, Any]:
    config = adapter_config(adapter)
    kind, modules = config.get("peft_type"), config.get("target_modules")
    extras = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        extras.append("bias")
    if kind != "LORA" or extras or not isinstance(modules, list):
        reason = ", ".join(extras) or (f"peft_type {kind}" if kind != "LORA" else "target_modules as a pattern")
        raise UserError(
            f"{where}: its adapter_config.json has {reason}, which cannot be continued; train a new adapter"
        )
    flags = {
        "rank": config.get("r"), "alpha": config.get("lora_alpha"), "use_rslora": bool(config.get("use_rslora")),
        "target_modules": sorted([*modules, *(config.get("modules_to_save") or [])]),
        "model": str(config["base_model_name_or_path"]),
    }  # fmt: skip
    return flags | ({"revision": config["revision"]} if config.get("revision") else {})


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_same_folder(given: Any, value: Any) -> bool:
    if not (isinstance(given, str) and isinstance(value, str)):
        return False
    given = resolve_model(given)  # an adapter of the bundled model names its folder
    return Path(given).is_dir() and Path(given).resolve() == Path(value).resolve()


def load_adapter_weights(model: Any, folder: str) -> None:
    """Set the model's new adapter to the one in `folder`; UserError when their tensors differ in name or shape."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(str(find_run(folder).adapter)) / "adapter_model.safetensors"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.fill_(torch.nan)  # what the file lacks is found below
    try:
        found: Any = set_peft_model_state_dict(model, load_file(path))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--init_adapter {folder}: {' '.join(str(error).split())[:300]}") from error
    absent = [name for name, parameter in trained.items() if parameter.isnan().any()]
    if unknown := [*found.unexpected_keys, *absent]:
        raise UserError(
            f"--init_adapter {folder}: its {path.name} does not fit this model ({len(unknown)} tensors, {unknown[0]})"
        )
