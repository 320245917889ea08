"""Checks on config.json and the flags before the slow loading of weights."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.memory.plan import MemoryPlan
from finetune.memory.sizes import Sizes, check_trainable, model_without_weights, sizes_of_model
from finetune.models.adapter import check_adapter
from finetune.models.limits import LengthLimit, model_positions
from finetune.models.loading import load_config
from finetune.settings import Settings
from finetune.training.memory_plan import default_placement, total_memory, with_known_optimizer, workload_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger("sandwich")


def check_feasible(settings: Settings) -> PreTrainedConfig:
    """The model's config.

    UserError for an encoder, for target modules or layers that the model lacks, and for a rank beyond all memory.
    A model that cannot be built from its config.json is not checked: loading it reports the reason.
    """
    config = load_config(settings.model, settings.revision, settings.trust_remote_code, settings.rope_scaling)
    check_trainable(config)
    try:
        model = model_without_weights(config)
        sizes = sizes_of_model(model)
    except Exception:  # a third-party architecture
        return config
    if getattr(config, "text_config", None) is None:  # otherwise the model has more modules than its text part
        check_adapter(model, settings.target_modules, settings.last_layers)
    check_rank(settings, sizes)
    return config


def length_limit(settings: Settings, config: PreTrainedConfig) -> LengthLimit:
    """The maximum length of a row, logged if the model lowers it."""
    limit = LengthLimit(settings.max_seq_length, model_positions(config))
    if limit.is_lowered:
        log.info("%s", limit.message(settings.model))
    return limit


def check_rank(settings: Settings, sizes: Sizes) -> None:
    """UserError for a rank beyond the widest adapted layer, where it adds nothing, that does not fit the machine."""
    widest = max((max(m.inputs, m.outputs) for m in sizes.adapted(settings.target_modules)), default=settings.rank)
    if settings.rank <= widest:
        return
    workload = with_known_optimizer(workload_of(settings, default_placement(settings)))
    parts = MemoryPlan(sizes, workload).parts
    needed = sum(parts[name] for name in ("adapter", "gradients", "optimizer"))
    if needed > total_memory():
        raise UserError(
            f"--rank {settings.rank}: the adapter, its gradients and the optimizer states need {needed / 1e9:,.0f} GB, "
            f"this machine has {total_memory() / 1e9:,.0f} GB; the widest layer is {widest:,} wide, and a higher rank "
            "adds nothing"
        )


def check_optimizer(name: str) -> None:
    """UserError when Transformers has no optimizer of that name."""
    known = _optimizers()
    if name != "auto" and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise UserError(f"--optim {name}: Transformers has no such optimizer; {hint}")


def _optimizers() -> list[str]:
    """The names of Transformers' optimizers, out of its source: importing it takes seconds and most of its packages."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations  # type: ignore[union-attr, misc]
    source = (Path(folder) / "training_args.py").read_text(encoding="utf-8")
    names = re.search(r"class OptimizerNames\b.*?(?=\n\S)", source, re.DOTALL)
    if found := re.findall(r'^    [A-Z0-9_]+ = "(\w+)"', names[0] if names else "", re.MULTILINE):
        return found
    from transformers.training_args import OptimizerNames

    return [optimizer.value for optimizer in OptimizerNames]
