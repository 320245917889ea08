"""Fine-tune a language model with LoRA to call tools; `main` tells a run from its flags to its adapter."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import distributed
from finetune.errors import Terminated, UserError, one_line_errors
from finetune.files import free_path
from finetune.models.bundled import cache_dir
from finetune.packages import hide_unused, install_command, wants_wandb
from finetune.progress import counted, print_text
from finetune.runs.experiment import (
    CONFIG,
    Experiment,
    check_free,
    check_writable,
    find_resumable,
    list_checkpoints,
)  # fmt: skip
from finetune.settings import Settings, parse, resumed
from finetune.training import record
from finetune.training.data import RunData

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from finetune.models.limits import LengthLimit
    from finetune.models.loading import Loaded
    from finetune.training.call_scores import CallScorer
    from finetune.training.trainer import SandwichTrainer
    from formats import Format

log = logging.getLogger("sandwich")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    settings = parse(arguments)
    if settings.doctor:
        from finetune import doctor

        return doctor.report(deep=settings.doctor == "deep")

    # 1. Check the flags and read the rows before anything slow is imported, so that mistakes show within a second.
    console = start_console_log()
    settings, stopped_run, checkpoint = find_stopped_run(settings)
    if stopped_run is None:
        settings = complete_flags(settings)
    check_tracker(settings.report_to)
    check_upload(settings.push_to_hub, settings.model)
    distributed.refuse_sharding()
    check_names(settings, with_model=stopped_run is None)
    data = load_data(settings)
    eval_fingerprint = data.held_out and data.held_out.fingerprint
    record.refuse_changed(stopped_run, settings.force, data=data.train.fingerprint, eval_data=eval_fingerprint)

    # 2. Turn the rows into tokens and masks. A dry run ends here.
    if not settings.dry_run:
        from finetune.models.loading import import_unsloth

        import_unsloth()
        distributed.start()
    else:
        hide_unused()
    tokenizer, fmt, end_of_turn_ids, limit = load_format(settings)
    record.refuse_changed(stopped_run, settings.force, format=record.template_sha256(fmt))
    data.encode(tokenizer, fmt, settings, limit)
    scorer = call_scorer(settings, data, fmt, tokenizer, end_of_turn_ids) if settings.eval_calls else None
    show_masks(data, tokenizer, settings.show_mask)
    if settings.dry_run:
        from finetune.training.run_table import print_run_table

        print_run_table(settings, data.rows, data.eval_rows, fmt)
        return 0

    # 3. Load the model, and record the run in its experiment folder.
    loaded, model = load_model(settings)
    interrupt_on_signals()
    config = record.run_config(settings, arguments, data, fmt, end_of_turn_ids, loaded, model) | limit.as_config()
    experiment = record.open_experiment(settings, config, stopped_run)

    # 4. Train and save.
    with experiment.record_outcome():
        trainer = prepare_training(settings, experiment, data, fmt, tokenizer, loaded, model, console, scorer)
        if not train(trainer, experiment, checkpoint):
            return trainer.stop_callback.exit_status
        save(trainer, experiment, model, tokenizer, fmt, end_of_turn_ids, settings.eval_ranks or [])
    trainer.stop_callback.restore_handlers()
    if distributed.rank() == 0:
        finish(experiment, settings.push_to_hub)
    distributed.end()
    return 0


def start_console_log() -> Console:
    """Show log messages on stderr, those of the first process only."""
    from rich.console import Console

    from finetune.logs import start_logging

    console = Console(stderr=True, quiet=distributed.rank() != 0)
    start_logging(console)
    return console


def find_stopped_run(settings: Settings) -> tuple[Settings, Experiment | None, Path | None]:
    """(flags, run to resume, its checkpoint) with --resume; otherwise check that a new run can be written."""
    if settings.resume is None:
        if not settings.dry_run and distributed.rank() == 0:  # others may still see what it has just renamed
            check_writable(settings.experiments_dir, make=False)
            check_free(settings.experiments_dir, settings.name)
        return settings, None, None
    if settings.resume == "auto":
        settings.resume = auto_target(settings)
        if settings.resume is None:
            return find_stopped_run(settings)
        settings.given.discard("name")  # it has named the folder, which may have been renamed since
    lock = None if settings.dry_run else distributed.lock_run
    run, checkpoint = find_resumable(settings.resume, settings.experiments_dir, lock)
    settings = resumed(settings, run.config["flags"], str(run.folder), record.changed_versions(run))
    settings.revision = run.config.get("base_model_revision") or settings.revision
    log.info("resuming %s at %s", run.folder, checkpoint.name)
    return settings, run, checkpoint


def complete_flags(settings: Settings) -> Settings:
    """Flags of a new run that follow from the adapter of --init_adapter or from the environment."""
    if settings.init_adapter:
        from finetune.training.second_stage import with_adapter_flags

        settings = with_adapter_flags(settings)
    if wants_wandb() and "report_to" not in settings.given:
        settings.report_to = "wandb"
        log.info("USE_WANDB is set: --report_to wandb")
    return settings


def auto_target(settings: Settings) -> str | None:
    """The folder that `--resume auto` continues: --experiments_dir/--name; None where the run has to start.

    A run that was killed before its first checkpoint starts again; its folder is renamed, as it may hold a log.
    """
    if settings.name is None:
        raise UserError("--resume auto continues the run of --name; add --name")
    folder = Path(settings.experiments_dir) / settings.name
    if not (folder / CONFIG).exists():
        return None
    try:
        if list_checkpoints(folder) or Experiment.open(folder).config.get("status") == "finished":
            return str(folder)
    except (FileNotFoundError, UserError):
        if distributed.rank() == 0:
            raise
        return None  # the first process has renamed it meanwhile
    if not settings.dry_run and distributed.rank() == 0:
        distributed.lock_run(folder)
        archived = free_path(folder.with_name(f"{folder.name}.no_checkpoint_{number}") for number in itertools.count(1))
        folder.rename(archived)
        log.info("%s has no checkpoint: starting again; its former files are in %s", folder, archived)
    return None


def check_tracker(name: str) -> None:
    """UserError when the tracker of --report_to is not installed."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no origin: not a package but a folder such as wandb/, made by the tracker
        raise UserError(f"--report_to {name}: {name} is not installed; run: {install_command(name)}")


def check_upload(repository: str | None, model: str) -> None:
    """UserError when the upload at the end of the run could not succeed."""
    if repository is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from finetune.models.hub import check_public_base, hub_token

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repository} is not a repository name; write OWNER/NAME") from error
    check_public_base(model, f"--push_to_hub {repository}", "name its Hub id with --model, or omit --push_to_hub")
    if not hub_token():
        raise UserError(f"--push_to_hub {repository}: there is no token; set HF_TOKEN to one with write access")


def check_names(settings: Settings, *, with_model: bool) -> None:
    """UserError for a data set or format that does not exist; for a new run also for such a model."""
    from finetune.models.hub import check_available
    from finetune.reading.sources import parse_spec
    from formats import check_format_name

    check_format_name(settings.format)
    for spec in [*settings.dataset, *(settings.eval_dataset or [])]:
        parse_spec(spec)
    if with_model:
        check_available(settings.model, settings.revision)


def load_data(settings: Settings) -> RunData:
    """Read the conversations; --eval_fraction splits off a part that depends on the seed."""
    from finetune.preparing.splits import split_off
    from finetune.reading.conversations import load_conversations
    from finetune.reading.row_filter import parse_where
    from finetune.reading.tool_schemas import load_tools_file
    from finetune.training.row_checks import check_rows

    options = {
        "seed": settings.seed, "cache_dir": cache_dir() / "rows", "refuse_marked_splits": True,
        "include_rejected": settings.include_rejected,
        "tools": load_tools_file(settings.tools) if settings.tools else None,
    }  # fmt: skip
    train = load_conversations(settings.dataset, limit=settings.limit, where=parse_where(settings.where), **options)
    check_rows(train, cache_dir() / "checks")
    for mapping, count in train.mappings.items():
        log.info("%s (%s)", mapping, counted(count, "row"))
    for note, count in train.notes.items():
        if "not read" in note or "left as text" in note:  # the other notes do not concern lost content
            log.info("%s (%s)", note, counted(count, "time"))
    if settings.eval_dataset:
        held_out = load_conversations(settings.eval_dataset, **options)
        check_rows(held_out, cache_dir() / "checks")
        return RunData(train, held_out)
    if settings.eval_fraction:
        return RunData(*split_off(train, settings.eval_fraction, settings.seed))
    return RunData(train)


def load_format(settings: Settings) -> tuple[PreTrainedTokenizerBase, Format, list[int], LengthLimit]:
    """(tokenizer, chat format, ids that end a turn, limit of a row), after checking optimizer and model config."""
    from finetune.models.limits import check_vocabulary
    from finetune.models.loading import load_tokenizer
    from finetune.training.feasible import check_feasible, check_optimizer, length_limit
    from formats import check_tokenizer, choose_format, get_format
    from formats.comparison import own_difference

    check_optimizer(settings.optim)
    config = check_feasible(settings)
    tokenizer = load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)
    check_vocabulary(tokenizer, getattr(config.get_text_config(), "vocab_size", None), settings.model)
    if settings.format == "auto":
        fmt, why = choose_format(tokenizer)
        log.info("format %s: %s", fmt.name, why)
    else:
        fmt = get_format(settings.format, tokenizer=tokenizer)
        if difference := own_difference(fmt, tokenizer):
            log.info("format %s %s; --format auto chooses one that does not", fmt.name, difference)
    return tokenizer, fmt, check_tokenizer(tokenizer, fmt), length_limit(settings, config)


def show_masks(data: RunData, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Print the first `count` sequences with the trained tokens in color."""
    if not count:
        return
    from rich.console import Console

    from finetune.preparing.mask_view import print_sequence

    console = Console()
    for number, sequence in enumerate(data.rows.sequences[:count], start=1):
        print_sequence(console, *sequence, tokenizer, f"sequence {number}")


def load_model(settings: Settings) -> tuple[Loaded, PeftModel]:
    """The base model, and the same with a new adapter."""
    from finetune.models.adapter import add_lora
    from finetune.models.loading import load_base

    loaded = load_base(
        settings.model, revision=settings.revision, dtype=settings.dtype, load_in_4bit=settings.load_in_4bit,
        max_seq_length=settings.max_seq_length, trust_remote_code=settings.trust_remote_code,
        rope_scaling=settings.rope_scaling,
    )  # fmt: skip
    if settings.dequantize_once:
        from finetune.models.dequantize import dequantize
        from finetune.training.memory_plan import free_memory

        log.info("dequantized %d 4-bit layers", dequantize(loaded.model, free_memory()))
    model = add_lora(
        loaded.model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
        target_modules=settings.target_modules, last_layers=settings.last_layers, use_rslora=settings.use_rslora,
        gradient_checkpointing=record.checkpoints_gradients(settings, loaded), seed=settings.seed,
    )  # fmt: skip
    if settings.init_adapter and settings.resume is None:
        from finetune.training.second_stage import load_adapter_weights

        load_adapter_weights(model, settings.init_adapter)
    return loaded, model


def interrupt_on_signals() -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C from here on, because there is a run to finish."""
    from finetune.training.callbacks import TERMINATION_SIGNALS

    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, terminate if number == signal.SIGTERM else signal.default_int_handler)


def terminate(number: int, frame: object) -> None:
    raise Terminated


def prepare_training(
    settings: Settings, experiment: Experiment, data: RunData, fmt: Format, tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded, model: PeftModel, console: Console, scorer: CallScorer | None,
) -> SandwichTrainer:  # fmt: skip
    """The trainer; the first process also prints the run table and logs into the experiment folder."""
    from finetune.logs import log_to_file
    from finetune.runs.saving import with_format
    from finetune.training.order import groups_for
    from finetune.training.run import make_trainer
    from finetune.training.run_table import print_run_table

    is_main = distributed.rank() == 0
    if is_main:
        if settings.resume is None:
            distributed.lock_run(experiment.folder)
        log_to_file(experiment.folder / "training.log")
    groups = groups_for(settings.order, data.train.conversations, data.rows.rows)
    saved = with_format(tokenizer, fmt)  # every checkpoint carries the run's own template, not the base's
    trainer = make_trainer(
        settings, experiment, model, saved, data.rows, data.eval_rows, loaded, console, groups, data.train.origins
    )
    if scorer is not None:  # how many calls it scores is kept in the run's config, so that a resume scores the same
        trainer.call_scorer = scorer
        scorer.begin(experiment.config.get("scored_calls"), lambda chosen: experiment.update(scored_calls=chosen))
    if is_main:
        print_run_table(settings, data.rows, data.eval_rows, fmt, experiment=experiment, trainer=trainer)
    return trainer


def call_scorer(
    settings: Settings, data: RunData, fmt: Format, tokenizer: PreTrainedTokenizerBase, end_of_turn_ids: list[int]
) -> CallScorer:
    """Scores calls at each evaluation. UserError when no row that is held out has one."""
    from finetune.training.call_scores import CallScorer

    return CallScorer(
        data.held_out, data.eval_rows.rows, tokenizer, fmt, end_of_turn_ids, count=settings.eval_calls,
        budget=settings.eval_calls_budget, seed=settings.seed, longest=data.rows.report["max_seq_length"],
    )  # fmt: skip


def train(trainer: SandwichTrainer, experiment: Experiment, checkpoint: Path | None) -> bool:
    """Train, from the checkpoint if there is one; False when a signal or a lost process stopped the run early."""
    from finetune.training.run import ending, interrupted_at, run_training

    result = run_training(trainer, checkpoint)
    if trainer.call_scorer:
        log.info("--eval_calls took %.1f%% of the time", 100 * result["eval_calls_share"])
    experiment.writes = trainer.args.should_save  # another process writes if the first one was lost
    memory = {**experiment.config["memory"], "measured_gb": result["peak_memory_gb"]}
    experiment.update(steps=trainer.state.global_step, result=result, memory=memory)
    step = interrupted_at(trainer)
    if step is None:
        experiment.update(ending=ending(trainer))
        return True
    experiment.ended("interrupted")
    flags = ["--resume", str(experiment.folder)] if step else ["--config", str(experiment.folder / CONFIG)]
    log.warning("stopped after step %d; continue with: python train_lora.py %s", step, shlex.join(flags))
    return False


def save(
    trainer: SandwichTrainer, experiment: Experiment, model: PeftModel, tokenizer: PreTrainedTokenizerBase, fmt: Format,
    end_of_turn_ids: list[int], ranks: list[int],
) -> None:  # fmt: skip
    """Save the adapter, evaluate it at smaller ranks (by all processes), and mark the run as finished."""
    from finetune.runs.saving import save_final_model
    from finetune.training.rank_use import record_rank_use

    if distributed.rank() == 0:
        save_final_model(experiment, model, tokenizer, fmt, end_of_turn_ids)
    record_rank_use(trainer, experiment, ranks)
    if distributed.rank() == 0:
        experiment.ended("finished")


def finish(experiment: Experiment, repository: str | None) -> None:
    """Print the results and the experiment folder, and upload the adapter if the user wants it."""
    from finetune.training.run_table import print_closing_table

    loss = experiment.config["result"]["final_loss"] or math.nan
    steps, ending = experiment.config["steps"], experiment.config["ending"]
    why = f"; {ending['why']}" if ending.get("why") else ""
    log.info(
        "%s at step %d of %d; adapter of step %d; loss %.4f%s",
        ending["reason"], steps, ending["max_steps"], ending["adapter_step"], loss, why,
    )  # fmt: skip
    print_closing_table(experiment)
    print_text(experiment.folder)
    if repository:
        from finetune.export.hub import publish

        log.info("uploaded: %s", publish(experiment.folder, repository))


if __name__ == "__main__":
    sys.exit(main())
