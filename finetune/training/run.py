"""From settings to a trainer, and the run itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from finetune.memory.sizes import sizes_of_model
from finetune.models.loading import Loaded
from finetune.runs.experiment import COUNTERS, LOG, Experiment
from finetune.runs.run_log import RunLog, read_rows
from finetune.settings import Settings
from finetune.training import memory_plan as memory
from finetune.training.callbacks import LastStepCallback, LogCallback, StopCallback
from finetune.training.trainer import SandwichTrainer  # imports unsloth first

log = logging.getLogger("sandwich")


def make_trainer(
    settings: Settings,
    experiment: Experiment,
    model: Any,
    tokenizer: Any,
    rows: Any,
    eval_rows: Any,
    loaded: Loaded,
    console: Console,
    groups: Any = None,
) -> SandwichTrainer:
    """The trainer for these settings, writing into the experiment's folder; `groups` as in steps_of_epoch."""
    news = io.StringIO()  # stdout is for the run's folder; Unsloth says there what it changes
    with contextlib.redirect_stdout(news):
        args = training_arguments(settings, experiment, rows, eval_rows is not None, loaded)
    for line in news.getvalue().splitlines():
        log.info("%s", line)
    run_log = RunLog(experiment.folder / LOG if args.process_index == 0 else None)
    placement = memory.Placement(
        dtype=loaded.dtype,
        load_in_4bit=loaded.load_in_4bit,
        gradient_checkpointing=experiment.config["gradient_checkpointing"],
        device=loaded.device,
    )
    trainer = SandwichTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        sequences=rows.sequences,
        eval_sequences=eval_rows.sequences if eval_rows is not None else None,
        tokens_per_pass=settings.tokens_per_pass or memory.MIN_DEFAULT_TOKENS_PER_PASS,
        share_prefix=settings.share_prefix,
        groups=groups,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        log_callback=LogCallback(run_log, console, quiet=args.process_index != 0),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LastStepCallback(evaluate=eval_rows is not None, save=settings.load_best))
    trainer.add_callback(StopCallback())
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience, settings.early_stopping_threshold))
    sizes = sizes_of_model(model)
    plan = memory.plan_for(settings, sizes, placement, rows.sequences, runner=trainer.runner, groups=groups)
    # Written before the first step, so that a run that dies of too little memory says what was expected of it.
    experiment.update(memory=plan.as_config())
    return trainer


def training_arguments(
    settings: Settings, experiment: Experiment, rows: Any, has_eval: bool, loaded: Loaded
) -> SFTConfig:
    step_rows = settings.batch_size * settings.grad_accum
    steps_per_epoch = -(-len(rows.sequences) // step_rows)
    steps = settings.max_steps or max(1, int(steps_per_epoch * settings.epochs))
    warmup = settings.warmup_steps if settings.warmup_steps is not None else int(settings.warmup_ratio * steps)
    # Trapezoidal: Haegele et al. 2024 (arXiv:2405.18392) find 20 % of the steps enough for the fall.
    stable = settings.scheduler == "warmup_stable_decay"
    decay = {"num_decay_steps": max(1, round(0.2 * steps)), "decay_type": "linear"} if stable else {}
    evaluation = {"eval_strategy": "no"}
    # In steps, also for "every epoch": an evaluation behind the epoch's last checkpoint would be lost by a resume.
    eval_steps = settings.eval_steps or steps_per_epoch
    if has_eval:
        evaluation = {"eval_strategy": "steps", "eval_steps": eval_steps}
    saving = {"save_strategy": "steps" if settings.save_steps else "no", "save_steps": settings.save_steps or 1}
    if settings.load_best:
        # The best checkpoint can only be one that was evaluated.
        saving["save_steps"] = eval_steps
    return SFTConfig(
        output_dir=str(experiment.folder),
        run_name=experiment.folder.name,
        # One batch of the loader is one optimizer step; passes.py cuts it.
        per_device_train_batch_size=step_rows,
        gradient_accumulation_steps=1,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        lr_scheduler_kwargs=decay,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=memory.chosen_optimizer(settings, loaded.device),
        seed=settings.seed,
        bf16=loaded.dtype == "bfloat16",
        fp16=loaded.dtype == "float16",
        gradient_checkpointing=experiment.config["gradient_checkpointing"],
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        **evaluation,
        **saving,
        save_total_limit=settings.save_total_limit,
        load_best_model_at_end=settings.load_best,
        metric_for_best_model="loss" if has_eval else None,
        greater_is_better=False if has_eval else None,
        restore_callback_states_from_checkpoint=True,
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


def run_training(trainer: SandwichTrainer, checkpoint: Path | None) -> dict[str, Any]:
    """Train, from the checkpoint if there is one; returns the numbers that go into experiment_config.json.

    Signals stay with the trainer's stop_callback, so that one does not cut short what is still to be saved.
    """
    if checkpoint is not None:
        counters = json.loads((checkpoint / COUNTERS).read_text(encoding="utf-8"))
        trainer.log_callback.run_log.restore(counters)
        if trainer.args.should_save:
            remove_later(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.log_callback.stop()
        trainer.log_callback.run_log.flush()
    return results(trainer)


def remove_later(checkpoint: Path) -> None:
    """Remove the run's later checkpoints, as their rows are cut from the log: from here on they are made again."""
    later = Experiment.open(checkpoint.parent).checkpoints()
    for path in later[later.index(checkpoint) + 1 :]:
        log.info("%s is removed: the run goes on from %s", path.name, checkpoint.name)
        shutil.rmtree(path)


def results(trainer: SandwichTrainer) -> dict[str, Any]:
    """Final and best losses, times and the memory peak, from the log that was written."""
    from finetune.runs.run_log import COLUMNS, peak_memory_gb

    run_log = trainer.log_callback.run_log
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
        "tokens_seen": counters.tokens_seen,
        "trained_tokens": counters.trained_tokens,
        "seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.tokens_seen / max(counters.seconds, 1e-9), 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "tokens_per_pass": trainer.runner.tokens_per_pass,
    }


def interrupted_at(trainer: SandwichTrainer) -> int | None:
    """The step after which a signal or the loss of a process stopped the run; None when it came to its end."""
    step = trainer.state.global_step
    if trainer.lost_a_process or (trainer.stop_callback.requested and step < trainer.state.max_steps):
        return step
    return None
