"""From settings to a trainer, and the run itself."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from finetune.encoding.encoded import EncodedRows
from finetune.memory.sizes import sizes_of_model
from finetune.models.loading import Loaded, stdout_to_log
from finetune.progress import counted
from finetune.runs.experiment import COUNTERS, LOG, Experiment
from finetune.runs.run_log import COLUMNS, RunLog, peak_memory_gb, read_rows
from finetune.settings import Settings
from finetune.training import memory_plan as memory
from finetune.training.callbacks import LogCallback
from finetune.training.order import Groups
from finetune.training.tracker_run import tracker_callback
from finetune.training.trainer import SandwichTrainer  # imports unsloth first

log = logging.getLogger("sandwich")


def make_trainer(
    settings: Settings,
    experiment: Experiment,
    model: Any,
    tokenizer: Any,
    rows: EncodedRows,
    eval_rows: EncodedRows | None,
    loaded: Loaded,
    console: Console,
    groups: Groups | None = None,
    origins: Sequence[tuple[str, int]] = (),
) -> SandwichTrainer:
    """The trainer for these settings, which writes into the experiment's folder; `groups` as in steps_of_epoch.

    origins  (file, row) of each conversation, for messages
    """
    sequences = rows.sequences
    with stdout_to_log():
        args = training_arguments(settings, experiment, len(sequences), eval_rows is not None, loaded)
    is_first = args.process_index == 0
    trainer = SandwichTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        sequences=sequences,
        eval_sequences=eval_rows.sequences if eval_rows is not None else None,
        tokens_per_pass=settings.tokens_per_pass or memory.MIN_DEFAULT_TOKENS_PER_PASS,
        share_prefix=settings.share_prefix,
        groups=groups,
        origins=[origins[row] for row in rows.rows] if origins else (),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        log_callback=LogCallback(RunLog(experiment.folder / LOG if is_first else None), console, quiet=not is_first),
    )
    trainer.remove_callback(PrinterCallback)
    if settings.report_to != "none":
        trainer.add_callback(tracker_callback(settings.report_to, experiment))
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience, settings.early_stopping_threshold))
    plan_memory(trainer, settings, experiment, loaded)
    return trainer


def plan_memory(trainer: SandwichTrainer, settings: Settings, experiment: Experiment, loaded: Loaded) -> None:
    """Choose the tokens per pass and record the predicted memory, before the first step can run out of it."""
    placement = memory.Placement(
        dtype=loaded.dtype,
        load_in_4bit=loaded.load_in_4bit,
        gradient_checkpointing=experiment.config["gradient_checkpointing"],
        device=loaded.device,
    )
    runner, sizes = trainer.runner, sizes_of_model(trainer.runner.model)
    plan = memory.plan_for(settings, sizes, placement, trainer.sequences, runner=runner, groups=trainer.groups)
    optim = trainer.args.optim  # Unsloth may have replaced the one of the flags
    experiment.update(memory=plan.as_config(), optim=str(getattr(optim, "value", optim)))


def training_arguments(
    settings: Settings, experiment: Experiment, rows: int, has_eval: bool, loaded: Loaded
) -> SFTConfig:
    """Trainer's arguments, where one batch of the loader is one optimizer step."""
    step_rows = settings.batch_size * settings.grad_accum
    steps_per_epoch = math.ceil(rows / step_rows)
    steps = settings.max_steps or max(1, int(steps_per_epoch * settings.epochs))
    options: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "lr_scheduler_kwargs": {}}
    if has_eval:
        # In steps, also for "every epoch": a resume would lose an evaluation that follows the epoch's last checkpoint.
        options.update(
            eval_strategy="steps",
            eval_steps=settings.eval_steps or steps_per_epoch,
            metric_for_best_model=settings.metric_for_best_model,
            greater_is_better=settings.metric_for_best_model != "eval_loss",
        )
    if settings.save_steps:
        # With --load_best every checkpoint must have been evaluated.
        save_steps = options["eval_steps"] if settings.load_best else settings.save_steps
        options.update(save_strategy="steps", save_steps=save_steps)
    if settings.scheduler == "warmup_stable_decay":
        # Decay over the last 20 % of the steps: Haegele et al. 2024 (arXiv:2405.18392).
        options["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, round(0.2 * steps)), "decay_type": "linear"}
    return SFTConfig(
        output_dir=str(experiment.folder),
        run_name=experiment.folder.name,
        per_device_train_batch_size=step_rows,
        gradient_accumulation_steps=1,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_steps if settings.warmup_steps is not None else int(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=memory.chosen_optimizer(settings, loaded.device),
        seed=settings.seed,
        bf16=loaded.dtype == "bfloat16",
        fp16=loaded.dtype == "float16",
        gradient_checkpointing=experiment.config["gradient_checkpointing"],
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_total_limit=settings.save_total_limit,
        load_best_model_at_end=bool(settings.load_best),
        restore_callback_states_from_checkpoint=True,
        report_to="none",  # see tracker_run.py
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        **options,
    )


def run_training(trainer: SandwichTrainer, checkpoint: Path | None) -> dict[str, Any]:
    """Train, from the checkpoint if there is one; returns the numbers that go into experiment_config.json.

    Signals still go to the trainer's stop_callback, so that none interrupts what is still to be saved.
    """
    if checkpoint is not None:
        trainer.run_log.restore(json.loads((checkpoint / COUNTERS).read_text(encoding="utf-8")))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.log_callback.stop()
        trainer.run_log.flush()
    return results(trainer)


def results(trainer: SandwichTrainer) -> dict[str, Any]:
    """Final and best losses of the written log, times and the memory peak."""
    run_log = trainer.run_log
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in read_rows(run_log.path)] if run_log.path else []
    losses, eval_losses = (
        [float(row[name]) for row in rows if row[name] and math.isfinite(float(row[name]))]
        for name in ("loss", "eval_loss")
    )
    counters = run_log.counters
    return {
        "final_loss": losses[-1] if losses else None,
        "min_loss": min(losses, default=None),
        "best_eval_loss": min(eval_losses, default=None),
        "train_loss": next((e["train_loss"] for e in reversed(trainer.state.log_history) if "train_loss" in e), None),
        "tokens_seen": counters.tokens_seen,
        "trained_tokens": counters.trained_tokens,
        "seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.tokens_seen / max(counters.seconds, 1e-9), 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "tokens_per_pass": trainer.runner.tokens_per_pass,
        **({"eval_calls_share": round(trainer.call_scorer.share(), 4)} if trainer.call_scorer else {}),
    }


def interrupted_at(trainer: SandwichTrainer) -> int | None:
    """The step after which a signal or the loss of a process stopped the run; None for a complete run."""
    step = trainer.state.global_step
    is_complete = step >= trainer.state.max_steps and not trainer.run_log.evaluation_pending
    if trainer.lost_a_process or (trainer.stop_callback.requested and not is_complete):
        return step
    return None


def ending(trainer: SandwichTrainer) -> dict[str, Any]:
    """Why a run that was not interrupted ended, and which step's weights it keeps."""
    state = trainer.state
    kept = state.best_global_step if trainer.args.load_best_model_at_end else None
    stopped_early = state.global_step < state.max_steps
    stopping = next((c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)), None)
    why = ""
    if stopped_early and stopping is not None and state.best_metric is not None:
        margin = f" by more than {stopping.early_stopping_threshold:g}" if stopping.early_stopping_threshold else ""
        evaluations = counted(stopping.early_stopping_patience, "evaluation")
        why = (
            f"{trainer.args.metric_for_best_model} did not improve{margin} in {evaluations}; "
            f"its best is {state.best_metric:.4f}, at step {state.best_global_step}"
        )
    reason = "stopped early" if stopped_early else "finished"
    return {"reason": reason, "why": why, "max_steps": state.max_steps, "adapter_step": kept or state.global_step}
