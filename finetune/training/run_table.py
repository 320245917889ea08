"""The one table printed before training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune import distributed
from finetune.errors import UserError
from finetune.memory import tables
from finetune.memory.sizes import sizes_of_config
from finetune.settings import Settings
from finetune.training import memory_plan


def print_run_table(
    settings: Settings, rows: Any, eval_rows: Any, fmt: Any, *, experiment: Any = None, trainer: Any = None
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
    add("rows", f"{report['rows']:,} read, {report['kept']:,} kept, {report['sequences']:,} sequences")
    for reason, count in list(report["reasons"].items())[:5]:
        add("dropped", f"{count:,} x {reason}")
    if report["rows"] == report["kept"]:
        add("dropped", "none")
    if report.get("trimmed"):
        add("trimmed", f"{report['trimmed']:,} rows, {report['turns_removed']:,} oldest turns removed")
    if report.get("escaped"):
        add("control tokens", f"{report['escaped']:,} inside contents, {report['control_tokens']}")
    add("tokens", f"{report['tokens']:,} ({share(report['trained_tokens'], report['tokens'])} trained)")
    by_role, trained = report["tokens_by_role"], report["trained_tokens_by_role"]
    add("trained / all by role", "  ".join(f"{role} {trained.get(role, 0):,}/{n:,}" for role, n in by_role.items()))
    add("longest row", f"{report['longest']:,} tokens (at most {settings.max_seq_length:,})")
    if eval_rows is not None:
        of = eval_rows.report
        add("evaluation rows", f"{of['rows']:,} read, {of['kept']:,} kept ({of['trained_tokens']:,} trained tokens)")
    step_rows = settings.batch_size * settings.grad_accum
    steps_per_epoch = -(-report["sequences"] // step_rows)
    steps = settings.max_steps or max(1, int(steps_per_epoch * settings.epochs))
    add(
        "steps",
        f"{steps:,} of {step_rows} rows ({settings.batch_size} x {settings.grad_accum}), {settings.epochs:g} epochs",
    )

    if experiment is not None:
        config = experiment.config
        add("LoRA", f"r {settings.rank}, alpha {settings.alpha}; {parameters(config)}")
        kind = "4-bit NF4" if config["load_in_4bit"] else config["dtype"]
        several = f", {distributed.size()} processes" if distributed.size() > 1 else ""
        add("device", f"{config['device']}, base weights {kind}{several}")
        add("passes", f"{trainer.runner.reason}; at most {trainer.runner.tokens_per_pass:,} tokens each")
        add("memory", memory_line(config["memory"]))
        Console(stderr=True).print(table)
        return
    dtype, in_4bit, checkpointing, device = planned_device(settings)
    add("device", f"{device}, base weights {'4-bit NF4' if in_4bit else dtype}")
    add("LoRA", f"r {settings.rank}, alpha {settings.alpha}")
    console = tables.wide_console()
    console.print(table)
    plan = memory_plan.plan_of_run(settings, dtype=dtype, load_in_4bit=in_4bit and not settings.dequantize_once,
                            gradient_checkpointing=checkpointing,
                            device=device)  # fmt: skip
    print_memory(console, settings, rows, plan, device)


def memory_line(memory: dict[str, Any]) -> str:
    """The prediction of a run that begins."""
    if memory["predicted_gb"] is None:
        return f"not predicted: {memory['reason']}"
    largest = sorted(memory["parts"].items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in largest)
    return f"about {memory['predicted_gb']:.1f} GB ({parts}, …); free now: {memory_plan.free_memory() / 1e9:.1f} GB"


def print_memory(console: Console, settings: Settings, rows: Any, plan: Any, device: str) -> None:
    """What `gpu_memory.py estimate` prints, with the passes that these very rows are cut into."""
    from finetune.models.loading import load_config

    try:
        sizes = sizes_of_config(load_config(settings.model, settings.revision, settings.trust_remote_code))
        tokens_per_pass = memory_plan.tokens_of_a_pass(settings, sizes, plan, rows.sequences, loaded=False)
        plan = memory_plan.with_rows(plan, settings, rows.sequences, tokens_per_pass)
        tables.print_estimate(
            console, sizes, plan, settings.model, memory_plan.free_memory(), f"{device}, free now",
            step_rows=settings.batch_size * settings.grad_accum,
        )  # fmt: skip
    except UserError as error:
        console.print(f"memory not estimated: {error}", markup=False)


def planned_device(settings: Settings) -> tuple[str, bool, bool, str]:
    """(dtype, 4-bit, gradient checkpointing, device) that a run with these flags would use on this machine."""
    import torch

    gpu = torch.cuda.is_available()
    dtype = settings.dtype
    if dtype == "auto":
        if gpu:
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            from finetune.models.loading import default_dtype

            dtype = default_dtype()
    in_4bit = gpu if settings.load_in_4bit is None else settings.load_in_4bit
    checkpointing = gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    return dtype, in_4bit, checkpointing, torch.cuda.get_device_name(0) if gpu else "cpu"


def parameters(config: dict[str, Any]) -> str:
    trainable, total = config["trainable_parameters"], config["total_parameters"]
    return f"{trainable:,} of {total:,} parameters trained ({share(trainable, total)})"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "0%"
