"""The one table printed before training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from finetune import memory
from finetune.settings import Settings


def print_run_table(
    settings: Settings, rows: Any, eval_rows: Any, fmt: Any, *, experiment: Any = None, trainer: Any = None
) -> None:
    """Rows, dropped rows and why, tokens, trained tokens by role, longest row, steps, parameters, device, memory.

    Without an experiment (a dry run) model and device are what config.json and the flags say.
    """
    report = rows.report
    table = Table(
        show_header=False, title="dry run" if experiment is None else experiment.folder.name, title_style="bold"
    )
    table.add_column(style="dim")
    table.add_column()
    add = table.add_row
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
        add("evaluation rows", f"{eval_rows.report['kept']:,} ({eval_rows.report['trained_tokens']:,} trained tokens)")
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
        add("device", f"{config['device']}, base weights {kind}")
        add("passes", f"{trainer.runner.why}; at most {trainer.runner.tokens_per_pass:,} tokens each")
        shape_config = trainer.runner.causal_lm.config
        dtype, in_4bit = config["dtype"], config["load_in_4bit"]
        checkpointing, tokens_per_pass = config["gradient_checkpointing"], trainer.runner.tokens_per_pass
    else:
        from finetune.model import load_config

        shape_config = load_config(settings.model, settings.revision, settings.trust_remote_code)
        dtype, in_4bit, checkpointing, device = planned_device(settings)
        add("device", f"{device}, base weights {'4-bit NF4' if in_4bit else dtype}")
        add("LoRA", f"r {settings.rank}, alpha {settings.alpha}")
        tokens_per_pass = settings.tokens_per_pass
    add("memory", memory_line(settings, shape_config, rows, dtype, in_4bit, checkpointing, tokens_per_pass))
    Console(stderr=experiment is not None).print(table)


def memory_line(settings, config, rows, dtype, in_4bit, checkpointing, tokens_per_pass) -> str:
    try:
        shape = memory.Shape.of(config)
    except AttributeError as error:
        return f"not estimated: config.json of this model has no {error.name}"
    options = {"rank": settings.rank, "dtype": dtype, "load_in_4bit": in_4bit, "gradient_checkpointing": checkpointing}
    step_tokens = settings.batch_size * settings.grad_accum * rows.report["tokens"] // rows.report["sequences"]
    most = tokens_per_pass or memory.default_tokens_per_pass(shape, **options)
    # A pass is never larger than a step; sharing prefixes makes it smaller than this.
    parts = memory.estimate(shape, **options, tokens_per_pass=max(min(most, step_tokens), rows.report["longest"]))
    text = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if name != "total")
    return f"at most about {parts['total']:.1f} GB ({text}); free: {memory.free_memory_gb():.1f} GB"


def planned_device(settings: Settings) -> tuple[str, bool, bool, str]:
    """(dtype, 4-bit, gradient checkpointing, device) that a run with these flags would use on this machine."""
    import torch

    gpu = torch.cuda.is_available()
    dtype = settings.dtype
    if dtype == "auto":
        if gpu:
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            from finetune.model import default_dtype

            dtype = default_dtype()
    in_4bit = gpu if settings.load_in_4bit is None else settings.load_in_4bit
    checkpointing = gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    return dtype, in_4bit, checkpointing, torch.cuda.get_device_name(0) if gpu else "cpu"


def parameters(config: dict[str, Any]) -> str:
    trainable, total = config["trainable_parameters"], config["total_parameters"]
    return f"{trainable:,} of {total:,} parameters trained ({share(trainable, total)})"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "0%"
