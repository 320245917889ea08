"""The model card of a run: front matter by huggingface_hub, body from model_card.md.jinja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.hub import public_base, public_name
from finetune.progress import counted, printable
from finetune.runs.experiment import CONFIG, Experiment

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
Scores = dict[str, dict[str, Any]]  # "base" and/or "tuned" -> metrics of evaluate_lora.py


def model_card(
    experiment: Experiment, *, scores: Scores | None = None, metrics: Sequence[str] = (), has_curve: bool = False
) -> str:
    """Markdown with the front matter that the Hub reads; paths of this machine are shortened to their last part.

    metrics    the scores to show, in this order
    has_curve  whether loss.png is beside the card
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    scores = scores or {}
    try:
        settings = _settings(experiment.config)
    except KeyError as error:
        raise UserError(f"{experiment.folder / CONFIG} has no entry {error}, which the model card shows") from error
    base = public_base(experiment.config["base_model"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name="held-out rows",
            metric_type=name,
            metric_value=round(scores["tuned"][name], 4),
        )
        for name in metrics
        if scores.get("tuned", {}).get(name) is not None
    ]
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "tool-calling", "sandwich"],
        model_name=experiment.folder.name,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=experiment.folder.name,
        base=base,
        settings=settings,
        has_curve=has_curve,
        metrics=metrics,
        scores=scores,
        last=list(scores)[-1] if scores else None,
        number=lambda value: "" if value is None else f"{value:.3f}",
        interval=_interval,
    )
    return printable(card.content.rstrip()) + "\n"


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """What the run was trained with, and the losses it reached, by name."""
    flags, data, result = config["flags"], config["data"], config.get("result", {})
    names = ", ".join(map(public_name, flags["dataset"]))
    step_rows = flags["batch_size"] * flags["grad_accum"]
    epochs = config["steps"] / max(1, -(-data["sequences"] // step_rows))  # not the flag: --max_steps may have ended it
    settings = {
        "data": f"{names} ({counted(data['sequences'], 'sequence')}, {data['trained_tokens']:,} trained tokens)",
        "format": f"{config['format']['name']} (template in `chat_template.jinja`)",
        "LoRA": f"r {flags['rank']}, alpha {flags['alpha']}, dropout {flags['dropout']}, "
        f"{', '.join(flags['target_modules'])}",
        "training": f"lr {flags['lr']:g}, {counted(f'{epochs:.3g}', 'epoch')}, {step_rows} "
        f"rows per step, {counted(config['steps'], 'step')}, seed {flags['seed']}",
        "base weights": "4-bit NF4" if config["load_in_4bit"] else config["dtype"],
    }
    if flags.get("rope_scaling"):
        settings["rotary positions"] = f"stretched by {flags['rope_scaling']}; serve the base with the same scaling"
    for name, key in (("training loss", "final_loss"), ("best evaluation loss", "best_eval_loss")):
        if result.get(key) is not None:
            settings[name] = f"{result[key]:.4f}"
    return settings


def _interval(metrics: dict[str, Any], name: str) -> str:
    bounds = metrics.get("intervals_95", {}).get(name)
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
