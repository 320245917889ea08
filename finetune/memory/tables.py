"""Memory plans and GPU readings as terminal tables and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.memory.devices import Gpu
from finetune.memory.plan import GPU_SIZES_GB, MemoryPlan, command_line, merged_flags, suggest
from finetune.progress import counted
from finetune.terminal_tables import fit

Suggestions = dict[int, tuple[MemoryPlan, dict[str, Any]]]  # GPU size in GB -> what `suggest` returns

PART_LABELS = {
    "weights": "weights of the layers",
    "quantization_constants": "constants of the 4-bit weights",
    "embeddings": "embedding and lm_head",
    "norms": "norms, biases",
    "adapter": "LoRA adapter (float32)",
    "gradients": "LoRA gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "backward": "backward pass of one layer",
    "loss": "loss (logits in chunks)",
    "unpacked_weights": "one matrix dequantized from 4 bit",
    "first_check": "check before the first step",
    "context": "CUDA context",
    "slack": "allocator overhead",
}
MIN_SHOWN_BYTES = 0.005e9


def wide_console() -> Console:
    """stdout; a log or a pipe gets 140 columns in place of rich's default of 80."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def gb(size: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{size / 1e9:.2f} GB"


def gpu_size(gpu_gb: float | None) -> str:
    return "none" if gpu_gb is None else f"{gpu_gb:g} GB"


def new_table(columns: Sequence[str], *, right: Sequence[str] = (), **options: Any) -> Table:
    """A table with these columns, those named in `right` aligned to the right."""
    table = Table(title_justify="left", **options)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def parts_table(plan: MemoryPlan, title: str) -> Table:
    """The parts of a plan that are not negligible, and the peak."""
    table = new_table(("part", "GB", "share"), right=("GB", "share"), title=escape(title), title_style="bold")
    for name, size in plan.parts.items():
        if size >= MIN_SHOWN_BYTES or name in ("weights", "activations"):
            on_cpu = name == "context" and plan.workload.device == "cpu"
            label = "Python and the libraries" if on_cpu else PART_LABELS[name]
            table.add_row(label, f"{size / 1e9:.2f}", f"{size / plan.peak:.0%}")
    table.add_section()
    table.add_row("peak", f"{plan.peak / 1e9:.2f}", "", style="bold")
    return table


def changes_table(plan: MemoryPlan) -> Table:
    """Each single change of a plan: its flags, the difference in GB, and the smallest GPU it then fits."""
    table = new_table(("change", "flags", "GB", "smallest GPU", "effect"), right=("GB", "smallest GPU"),
                      title="Less and more memory, one change at a time", title_style="bold")  # fmt: skip
    for changes in (plan.reductions(), plan.increases()):
        for change in changes:
            smallest = gpu_size(change.plan.smallest_gpu_gb) if plan.workload.device == "cuda" else "-"
            difference = f"{(change.plan.peak - plan.peak) / 1e9:+.2f}"
            table.add_row(change.what, command_line(change.flags), difference, smallest, change.effect)
        table.add_section()
    return table


def suggestions_table(suggestions: Suggestions) -> Table:
    """Flags for GPUs of common sizes."""
    table = new_table(("GPU", "peak GB", "flags"), right=("GPU", "peak GB"),
                      title="Flags for GPUs of common sizes", title_style="bold")  # fmt: skip
    for gpu_gb, (plan, flags) in suggestions.items():
        text = command_line(flags) if plan.fits else "does not fit: use a smaller model"
        table.add_row(gpu_size(gpu_gb), f"{plan.peak / 1e9:.1f}", text)
    return table


def suggestions_for(plan: MemoryPlan, step_rows: int) -> Suggestions:
    """Suggestions for GPUs of common sizes that keep the plan's settings; for a CPU plan the defaults of a GPU."""
    like = plan.workload
    if like.device == "cpu":
        like = like.replace(optim="adamw_8bit", dtype="bfloat16")
    return {gpu_gb: suggest(plan.sizes, gpu_gb, step_rows=step_rows, like=like) for gpu_gb in GPU_SIZES_GB}


def print_estimate(console: Console, plan: MemoryPlan, model: str, place: str, step_rows: int = 16) -> None:
    """The complete estimate; `place` names what `plan.capacity` belongs to."""
    workload = plan.workload
    kind = "4-bit NF4" if workload.load_in_4bit else workload.dtype
    passes = f"{workload.tokens:,} tokens per pass, longest row {workload.longest_row:,}"
    title = f"Memory of {model}: {plan.sizes.parameters / 1e9:.2f} B parameters, {kind}, rank {workload.rank}, {passes}"
    console.print(fit(parts_table(plan, title), console.width))
    if plan.capacity is not None:
        for line in verdict(plan, plan.capacity, place):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    elif workload.device == "cuda":
        console.print(f"Smallest GPU it fits: {gpu_size(plan.smallest_gpu_gb)}.", highlight=False)
    console.print(fit(changes_table(plan), console.width))
    console.print(fit(suggestions_table(suggestions_for(plan, step_rows)), console.width))


def verdict(plan: MemoryPlan, capacity: float, place: str) -> list[str]:
    """Lines that say whether the plan fits, what to change, and the longest row and largest pass that fit."""
    workload = plan.workload
    rows = max(1, workload.tokens // workload.longest_row)
    if plan.fits:
        lines = [f"Fits {place}: {gb(plan.peak)} of {gb(capacity)}, {gb(capacity - plan.peak)} left."]
    else:
        lines = [f"Does not fit {place}: {gb(plan.peak)} needed, {gb(capacity)} available."]
        fitted, changes = plan.fitted()
        if fitted.fits:
            names = "; ".join(dict.fromkeys(change.what for change in changes))
            lines.append(f"Fits with {command_line(merged_flags(changes))} ({gb(fitted.peak)}): {names}.")
        else:
            lines.append(f"No change makes it fit (at best {gb(fitted.peak)}): use a smaller model or a larger GPU.")
    if length := plan.max_row_tokens(rows):
        with_rows = "" if rows == 1 else f" with {rows} rows per pass"
        lines.append(f"Largest: rows of {length:,} tokens{with_rows}, or {counted(plan.max_rows_per_pass(), 'row')} of "
                     f"{workload.longest_row:,} tokens per pass.")  # fmt: skip
    return lines


def live_table(gpus: Sequence[Gpu], time: str) -> Table:
    """One reading of all GPUs."""
    columns = ("GPU", "memory in use", "free", "load", "°C", "W")
    table = new_table(columns, right=columns[1:], title=time, title_style="dim")

    def show(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    for gpu in gpus:
        name = escape(f"{gpu.index} {gpu.name}")
        if gpu.status == "lost":
            table.add_row(name, "lost", *["-"] * 4, style="red")
            continue
        used = show(gpu.memory_used_gb, "{:.2f}") + " / " + show(gpu.memory_total_gb, "{:.2f} GB")
        table.add_row(name, used, show(gpu.memory_free_gb, "{:.2f} GB"), show(gpu.utilization_percent, "{} %"),
                      show(gpu.temperature_c, "{}"), show(gpu.power_w, "{:.0f}"))  # fmt: skip
    return table


def as_json(plan: MemoryPlan, place: str, step_rows: int) -> dict[str, Any]:
    """The contents of the tables as JSON; sizes in GB (10^9 bytes)."""

    def in_gb(size: float) -> float:
        return round(size / 1e9, 4)

    result: dict[str, Any] = {
        "parameters": round(plan.sizes.parameters),
        "plan": asdict(plan.workload),
        "parts_gb": {name: in_gb(size) for name, size in plan.parts.items()},
        "total_gb": in_gb(plan.peak),
        "smallest_card_gb": plan.smallest_gpu_gb if plan.workload.device == "cuda" else None,
        "changes": [{"change": change.what, "flags": change.flags, "total_gb": in_gb(change.plan.peak)}
                    for change in (*plan.reductions(), *plan.increases())],
        "cards": [{"card_gb": gpu_gb, "fits": one.fits, "total_gb": in_gb(one.peak), "flags": flags}
                  for gpu_gb, (one, flags) in suggestions_for(plan, step_rows).items()],
    }  # fmt: skip
    if plan.capacity is not None:
        fitted, changes = plan.fitted()
        result["card"] = {
            "name": place, "usable_gb": in_gb(plan.capacity), "fits": plan.fits,
            "largest_max_seq_length": plan.max_row_tokens(),
            "largest_rows_per_pass": plan.max_rows_per_pass(),
            "to_fit": merged_flags(changes) if fitted.fits else None,
        }  # fmt: skip
    return result
