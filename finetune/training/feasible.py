"""Whether a model can be adapted as the flags say, asked of its config.json before half a minute of loading weights."""

from __future__ import annotations

import difflib

from finetune.errors import UserError
from finetune.memory.estimate import estimate, knows
from finetune.memory.sizes import Sizes, model_without_weights, refuse_untrainable, sizes_of_model
from finetune.models.adapter import check_adapter
from finetune.models.loading import load_config
from finetune.settings import Settings
from finetune.training.memory_plan import all_memory, plan_of_run
from finetune.training.run_table import planned_device


def check_feasible(settings: Settings) -> None:
    """UserError for an encoder, for modules or layers that the model has not, and for a rank that no memory holds.

    A model that cannot be built from its config.json alone is let through: loading it says what is wrong.
    """
    config = load_config(settings.model, settings.revision, settings.trust_remote_code)
    refuse_untrainable(config)
    try:
        model = model_without_weights(config)
        sizes = sizes_of_model(model)
    except Exception:  # a stranger's architecture
        return
    if getattr(config, "text_config", None) is None:  # else there are other modules than those of the text's part
        check_adapter(model, settings.target_modules, settings.last_layers)
    _check_rank(settings, sizes)


def _check_rank(settings: Settings, sizes: Sizes) -> None:
    """A rank as large as the widest side of any adapted matrix can express every change of it; one beyond is let pass
    where it at least fits the machine."""
    widest = max((max(m.inputs, m.outputs) for m in sizes.adapted(settings.target_modules)), default=settings.rank)
    if settings.rank <= widest:
        return
    dtype, in_4bit, checkpointing, device = planned_device(settings)
    plan = plan_of_run(settings, dtype=dtype, load_in_4bit=in_4bit, gradient_checkpointing=checkpointing, device=device)
    parts = estimate(sizes, plan if knows(plan.optim) else plan.but(optim="adamw_torch"))
    needed = sum(parts[name] for name in ("adapter", "gradients", "optimizer"))
    if needed > all_memory():
        raise UserError(
            f"--rank {settings.rank}: the adapter, its gradients and the optimizer alone take {needed / 1e9:,.0f} GB, "
            f"and here are {all_memory() / 1e9:,.0f}; the widest layer has {widest:,} numbers, and a rank beyond that "
            "adds nothing"
        )


def check_optimizer(name: str) -> None:
    """UserError when Transformers knows no optimizer of that name."""
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if name != "auto" and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise UserError(f"--optim {name}: Transformers has no such optimizer; {hint}")
