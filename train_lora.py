"""Fine-tune a language model with LoRA to call tools. The story of a run, from flags to adapter, read top-down."""

from __future__ import annotations

import hashlib
import logging
import math
import shlex
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from finetune import settings as flags_of_a_run
from finetune.errors import UserError, one_line_errors
from finetune.models.bundled import cache_dir
from finetune.settings import Settings

log = logging.getLogger("sandwich")
# A run that loses more of its rows than this (too long, refused by the format) would train something else than asked.
MOST_ROWS_LOST = 0.5


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    settings = flags_of_a_run.parse(argv)
    if settings.doctor:
        from finetune import doctor

        return doctor.report()

    from rich.console import Console

    from finetune import distributed
    from finetune.logs import start_logging
    from finetune.runs.experiment import check_free, check_writable, find_resumable

    console = Console(stderr=True, quiet=distributed.rank() != 0)
    start_logging(console)
    resumed, checkpoint = None, None
    if settings.resume is not None:
        resumed, checkpoint = find_resumable(settings.resume, settings.experiments_dir)
        settings = flags_of_a_run.resumed(settings, resumed.config["flags"], str(resumed.folder))
        settings.revision = resumed.config.get("base_model_revision") or settings.revision
        if not settings.dry_run:
            distributed.hold(resumed.folder)
        log.info("resuming %s at %s", resumed.folder, checkpoint.name)
    elif not settings.dry_run:
        check_writable(settings.experiments_dir, make=False)
        check_free(settings.experiments_dir, settings.name)
    check_tracker(settings.report_to)
    check_upload(settings.push_to_hub)
    distributed.refuse_sharding()

    # 1. Conversations. Read and checked before anything slow is imported, so that a bad row shows within a second.
    train, held_out = load_data(settings)
    if resumed is not None:
        refuse_changed(resumed, "data", "data", "fingerprint", train.fingerprint)
        refuse_changed(resumed, "evaluation data", "eval_data", "fingerprint", held_out and held_out.fingerprint)

    # 2. Format: template, masks, tokens.
    if not settings.dry_run:
        from finetune.models.loading import import_unsloth

        import_unsloth()
        distributed.start()
    from finetune.models.loading import load_tokenizer
    from finetune.training.feasible import check_feasible, check_optimizer
    from formats import check_tokenizer, choose_format, get_format

    check_optimizer(settings.optim)
    check_feasible(settings)
    tokenizer = load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)
    if settings.format == "auto":
        fmt, why = choose_format(tokenizer)
        log.info("format %s: %s", fmt.name, why)
    else:
        fmt = get_format(settings.format, tokenizer=tokenizer)
    end_of_turn_ids = check_tokenizer(tokenizer, fmt)
    template_sha256 = hashlib.sha256(fmt.pinned_template().encode("utf-8")).hexdigest()
    if resumed is not None:
        refuse_changed(resumed, "chat template", "format", "template_sha256", template_sha256)
    rows = encode(train, tokenizer, fmt, settings)
    eval_rows = encode(held_out, tokenizer, fmt, settings) if held_out is not None else None
    refuse_to_train_nothing(rows.report)
    if eval_rows is not None and not eval_rows.report["trained_tokens"]:
        raise UserError(f"no rows left to evaluate on: {lost_rows(eval_rows.report)}")
    if settings.show_mask:
        show_masks(rows, tokenizer, settings.show_mask)

    # 3. The run in one table. A dry run ends here.
    from finetune.training.run_table import print_run_table

    if settings.dry_run:
        print_run_table(settings, rows, eval_rows, fmt)
        return 0

    # 4. Model and adapter.
    from finetune.models.adapter import add_lora
    from finetune.models.loading import load_base

    loaded = load_base(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        load_in_4bit=settings.load_in_4bit,
        max_seq_length=settings.max_seq_length,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.dequantize_once:
        from finetune.models.dequantize import dequantize
        from finetune.training.memory_plan import free_memory

        log.info("unpacked %d 4-bit layers", dequantize(loaded.model, free_memory()))
    gradient_checkpointing = settings.gradient_checkpointing
    if gradient_checkpointing is None:
        gradient_checkpointing = not loaded.device.startswith("cpu")
    model = add_lora(
        loaded.model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=settings.target_modules,
        last_layers=settings.last_layers,
        use_rslora=settings.use_rslora,
        gradient_checkpointing=gradient_checkpointing,
        seed=settings.seed,
    )

    # 5. The experiment folder, then the steps. From here on there is something to tidy when we are told to end.
    from finetune.training.callbacks import TERMINATION_SIGNALS

    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    from finetune.logs import log_to_file
    from finetune.runs.experiment import CONFIG, Experiment, git_sha, package_versions, run_name
    from finetune.training.order import tool_sets
    from finetune.training.run import interrupted_at, make_trainer, run_training

    config = {
        "flags": settings.run_flags(),
        "argv": sys.argv[1:] if argv is None else list(argv),
        "base_model": settings.model,
        "base_model_revision": loaded.revision,
        "dtype": loaded.dtype,
        "load_in_4bit": loaded.load_in_4bit,
        "device": loaded.device,
        "gradient_checkpointing": gradient_checkpointing,
        "format": {
            "name": fmt.name,
            "template_sha256": template_sha256,
            "template_kwargs": dict(fmt.template_kwargs),
            "end_of_turn_ids": end_of_turn_ids,
        },
        "data": {"fingerprint": train.fingerprint, "counts": train.counts, "notes": dict(train.notes), **rows.report},
        "eval_data": {"fingerprint": held_out.fingerprint, **eval_rows.report} if held_out is not None else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "versions": package_versions(),
        "git_sha": git_sha(),
        "seed": settings.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ended": None,
        "status": "running",
    }
    is_main = distributed.rank() == 0
    if resumed is not None:
        experiment = resumed
        experiment.writes = is_main
        experiment.update(status="running", resumed=[*resumed.config.get("resumed", []), config["started"]])
    else:
        name = settings.name or run_name(
            settings.model, settings.rank, settings.alpha, settings.lr, settings.epochs, datetime.now()
        )
        exact = settings.name is not None
        if is_main:
            experiment = Experiment.create(settings.experiments_dir, name, config, exact_name=exact)
        folder = distributed.from_first(lambda: str(experiment.folder))
        if not is_main:
            experiment = Experiment(Path(folder), config, writes=False)

    with experiment.end_recorded():
        if is_main:
            if resumed is None:
                distributed.hold(experiment.folder)
            log_to_file(experiment.folder / "training.log")
        groups = tool_sets(train.conversations, rows.rows) if settings.order == "group_tools" else None
        trainer = make_trainer(settings, experiment, model, tokenizer, rows, eval_rows, loaded, console, groups)
        if is_main:
            print_run_table(settings, rows, eval_rows, fmt, experiment=experiment, trainer=trainer)
        result = run_training(trainer, checkpoint)
        experiment.writes = trainer.args.should_save  # another rank's task where rank 0 was lost
        memory = {**experiment.config["memory"], "measured_gb": result["peak_memory_gb"]}
        experiment.update(steps=trainer.state.global_step, result=result, memory=memory)
        if (step := interrupted_at(trainer)) is not None:
            experiment.ended("interrupted")
            go_on = ["--resume", str(experiment.folder)] if step else ["--config", str(experiment.folder / CONFIG)]
            log.warning("stopped after step %d; go on with: python train_lora.py %s", step, shlex.join(go_on))
            return 130

        # 6. Save.
        from finetune.runs.saving import push_to_hub, save_final_model

        if is_main:
            final = save_final_model(experiment, model, tokenizer, fmt, end_of_turn_ids)
            experiment.ended("finished")
    trainer.stop_callback.restore_handlers()
    if is_main:
        log.info("finished: loss %.4f in %d steps", result["final_loss"] or math.nan, trainer.state.global_step)
        print(experiment.folder)
        if settings.push_to_hub:
            log.info("uploaded: %s", push_to_hub(final, settings.push_to_hub))
    distributed.end()
    return 0


def load_data(settings: Settings):
    """(training conversations, evaluation conversations or None). The held-out share is drawn by the run's seed."""
    from finetune.preparing.splits import split_off
    from finetune.reading.conversations import load_conversations

    kept = cache_dir() / "rows"
    train = load_conversations(settings.dataset, limit=settings.limit, seed=settings.seed, cache_dir=kept)
    for mapping, count in train.mappings.items():
        log.info("%s (%d rows)", mapping, count)
    for note, count in train.notes.items():
        if "not read" in note or "left as text" in note:  # the other notes tell of what was kept, written otherwise
            log.info("%s (%d times)", note, count)
    if settings.eval_dataset:
        return train, load_conversations(settings.eval_dataset, seed=settings.seed, cache_dir=kept)
    if settings.eval_fraction:
        return split_off(train, settings.eval_fraction, settings.seed)
    return train, None


def refuse_changed(run, what: str, part: str, key: str, now: str | None) -> None:
    """UserError where the run to be resumed began with another `part` of its config than it would go on with."""
    if (run.config.get(part) or {}).get(key) != now:
        raise UserError(f"--resume {run.folder}: the {what} changed since; start a new run instead")


def encode(conversations, tokenizer, fmt, settings: Settings):
    """Token ids and labels of all rows, from the cache when nothing changed."""
    from finetune.encoding.encode import encode_conversations

    return encode_conversations(
        conversations.conversations,
        tokenizer,
        fmt,
        max_seq_length=settings.max_seq_length,
        train_on=settings.train_on,
        control_tokens=settings.control_tokens,
        overlong=settings.overlong,
        cache_dir=cache_dir() / "tokens",
        origins=conversations.origins,
        fingerprint=conversations.fingerprint,
    )


def refuse_to_train_nothing(report: dict) -> None:
    """UserError when no token would be trained, or when most rows were lost on the way."""
    if not report["trained_tokens"]:
        raise UserError(f"no rows left to train on: {lost_rows(report)}")
    if report["rows"] - report["kept"] > MOST_ROWS_LOST * report["rows"]:
        raise UserError(
            f"most rows would be lost: {lost_rows(report)}; "
            "raise --max_seq_length, choose another --format or --overlong trim_turns, or mend the data"
        )


def lost_rows(report: dict) -> str:
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(report["reasons"].items())[:3])
    return f"{report['rows']} read, {report['kept']} kept ({reasons or 'the data is empty'})"


def show_masks(rows, tokenizer, count: int) -> None:
    """Print rows with the trained tokens in colour."""
    from rich.console import Console

    from finetune.preparing.mask_view import print_sequence

    console = Console()
    for number in range(min(count, len(rows.sequences))):
        print_sequence(console, *rows.sequences[number], tokenizer, f"sequence {number + 1}")


def check_tracker(name: str) -> None:
    import importlib.util

    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no origin: a folder called wandb/, as that tracker makes them, no package
        raise UserError(f"--report_to {name}: {name} is not installed; run: pip install {name}")


def check_upload(repository: str | None) -> None:
    """UserError when the upload that stands at the end of hours of training cannot succeed."""
    if repository is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from finetune.models.hub import hub_token

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repository}: no name of a repository; write OWNER/NAME") from error
    if not (hub_token() or get_token()):
        raise UserError(f"--push_to_hub {repository}: there is no token; set HF_TOKEN to one with write access")


if __name__ == "__main__":
    sys.exit(main())
