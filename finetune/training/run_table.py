"""The table printed before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune import distributed
from finetune.charts.curves import duration
from finetune.errors import UserError
from finetune.memory import tables
from finetune.memory.sizes import sizes_of_name
from finetune.progress import counted
from finetune.settings import Settings
from finetune.terminal_tables import fit
from finetune.training.memory_plan import Placement, default_placement, free_memory, plan_for
from formats import Format

if TYPE_CHECKING:
    from finetune.encoding.encoded import EncodedRows
    from finetune.runs.experiment import Experiment
    from finetune.training.trainer import SandwichTrainer

MAX_DROP_REASONS = 5
MAX_PARTS = 4  # of the memory line


def print_run_table(
    settings: Settings,
    rows: EncodedRows,
    eval_rows: EncodedRows | None,
    fmt: Format,
    *,
    experiment: Experiment | None = None,
    trainer: SandwichTrainer | None = None,
) -> None:
    """Rows, dropped rows and why, tokens, trained tokens by role, longest row, steps, parameters, device, memory.

    Without an experiment (a dry run) model and device are what config.json and the flags say.
    """
    report = rows.report
    title = "dry run" if experiment is None else escape(experiment.folder.name)
    table = Table(show_header=False, title=title, title_style="bold")
    table.add_column(style="dim")
    table.add_column()

    def add(name: str, text: str) -> None:
        table.add_row(name, escape(text))

    add("model", settings.model)
    add("format", fmt.name)
    add("rows", f"{report['rows']:,} read, {report['kept']:,} kept, {counted(report['sequences'], 'sequence')}")
    for reason, count in list(report["reasons"].items())[:MAX_DROP_REASONS]:
        add("dropped", f"{count:,} x {reason}")
    if report["rows"] == report["kept"]:
        add("dropped", "none")
    for warning in report.get("warnings", []):
        turns = f"{counted(warning['turns'], 'turn')} in " if warning["turns"] != warning["rows"] else ""
        add("warning", f"{turns}{counted(warning['rows'], 'row')}: {warning['warning']} (first: {warning['first']})")
    if report.get("trimmed"):
        turns = counted(report["turns_removed"], "oldest turn")
        add("trimmed", f"{counted(report['trimmed'], 'row')}, {turns} removed")
    if report.get("escaped"):
        add("control tokens", f"{report['escaped']:,} inside contents, {report['control_tokens']}")
    add("tokens", f"{report['tokens']:,} ({share(report['trained_tokens'], report['tokens'])} trained)")
    by_role, trained = report["tokens_by_role"], report["trained_tokens_by_role"]
    add("trained / all by role", "  ".join(f"{role} {trained.get(role, 0):,}/{n:,}" for role, n in by_role.items()))
    add("longest row", f"{report['longest']:,} tokens (limit {report['max_seq_length']:,})")
    if eval_rows is not None:
        of = eval_rows.report
        add("evaluation rows", f"{of['rows']:,} read, {of['kept']:,} kept ({of['trained_tokens']:,} trained tokens)")
    step_rows = settings.batch_size * settings.grad_accum
    steps_per_epoch = -(-report["sequences"] // step_rows)
    steps = settings.max_steps or max(1, int(steps_per_epoch * settings.epochs))
    of_rows = f"{counted(step_rows, 'row')} ({settings.batch_size} x {settings.grad_accum})"
    add("steps", f"{steps:,} of {of_rows}, {counted(f'{steps / steps_per_epoch:.3g}', 'epoch')}")
    lora = f"r {settings.rank}, alpha {settings.alpha}"

    if experiment is not None and trainer is not None:
        config = experiment.config
        trainable, total = config["trainable_parameters"], config["total_parameters"]
        add("LoRA", f"{lora}; {trainable:,} of {total:,} parameters trained ({share(trainable, total)})")
        processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
        add("device", f"{config['device']}, base weights {dtype_label(config)}{processes}")
        add("passes", f"{trainer.runner.reason}; up to {trainer.runner.tokens_per_pass:,} tokens each")
        add("memory", memory_line(config["memory"]))
        console = Console(stderr=True)
        console.print(fit(table, console.width))
        return
    placement = default_placement(settings)
    add("device", f"{placement.device}, base weights {dtype_label(vars(placement))}")
    add("LoRA", lora)
    console = tables.wide_console()
    console.print(fit(table, console.width))
    print_memory(console, settings, rows, placement)


def print_closing_table(experiment: Experiment) -> None:
    """Losses, time, memory and the rank that a finished run has used."""
    config, result = experiment.config, experiment.config["result"]
    table = Table(show_header=False, title=escape(experiment.folder.name), title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    losses = {"at the end": result["final_loss"], "lowest": result["min_loss"], "evaluation": result["best_eval_loss"]}
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
    table.add_row("loss", shown or "not logged")
    table.add_row("time", f"{duration(result['seconds'])}, {result['tokens_per_second']:,.0f} tokens/s")
    table.add_row("peak memory", f"{result['peak_memory_gb']:.1f} GB")
    if ranks := config.get("ranks"):
        table.add_row("rank used", rank_line(ranks))
        if losses := ranks.get("eval_loss"):
            table.add_row("loss by rank", ", ".join(f"{rank}: {loss:.4f}" for rank, loss in losses.items()))
    Console(stderr=True).print(table)


def rank_line(ranks: dict[str, Any]) -> str:
    """A `ranks` entry of experiment_config.json in one line."""
    parts = ", ".join(f"{share:.1%} in the first {count}" for count, share in ranks["energy"].items())
    return f"of {ranks['rank']}: {parts} directions of each layer; {ranks['rank_of_99_percent']} hold 99% of its energy"


def memory_line(memory: dict[str, Any]) -> str:
    """A `memory` entry of experiment_config.json in one line."""
    if memory["predicted_gb"] is None:
        return f"not predicted: {memory['reason']}"
    largest = sorted(memory["parts"].items(), key=lambda part: -part[1])[:MAX_PARTS]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in largest)
    return f"about {memory['predicted_gb']:.1f} GB ({parts}, …); free now: {free_memory() / 1e9:.1f} GB"


def print_memory(console: Console, settings: Settings, rows: EncodedRows, placement: Placement) -> None:
    """Print what `gpu_memory.py estimate` prints, for the passes of these rows."""
    try:
        sizes = sizes_of_name(settings.model, settings.revision, settings.trust_remote_code)
        plan = plan_for(settings, sizes, placement, rows.sequences)
        step_rows = settings.batch_size * settings.grad_accum
        tables.print_estimate(console, plan, settings.model, f"{placement.device}, free now", step_rows)
    except UserError as error:
        console.print(f"memory not estimated: {error}", markup=False)


def dtype_label(loaded: dict[str, Any]) -> str:
    return "4-bit NF4" if loaded["load_in_4bit"] else loaded["dtype"]


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "0%"
