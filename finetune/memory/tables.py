"""Tables of an estimate and of the cards, for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.memory import advice
from finetune.memory.devices import Card
from finetune.memory.estimate import Plan, estimate, total
from finetune.memory.sizes import Sizes

NAMES = {
    "weights": "weights of the layers",
    "quantization_constants": "constants of the 4-bit weights",
    "embeddings": "embedding and lm_head",
    "norms": "norms, biases",
    "adapter": "LoRA adapter (float32)",
    "gradients": "its gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "backward": "backward pass of one layer",
    "loss": "loss (logits in chunks)",
    "unpacked_weights": "a matrix unpacked from 4 bit",
    "first_check": "check before the first step",
    "context": "CUDA context",
    "slack": "the allocator's slack",
}


def wide_console() -> Console:
    """stdout. A log or a pipe has no width of its own; the tables need more than the 80 columns rich takes it for."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def gb(size: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{size / 1e9:.2f} GB"


def parts_table(parts: dict[str, float], plan: Plan, title: str) -> Table:
    """Every part that is not nothing, and the total."""
    table = Table(title=escape(title), title_style="bold", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("share", justify="right")
    peak = total(parts)
    for name, size in parts.items():
        if size >= 0.005e9 or name in ("weights", "activations"):
            label = "Python and the libraries" if name == "context" and plan.device == "cpu" else NAMES[name]
            table.add_row(label, f"{size / 1e9:.2f}", f"{size / peak:.0%}")
    table.add_section()
    table.add_row("peak", f"{peak / 1e9:.2f}", "", style="bold")
    return table


def changes_table(sizes: Sizes, plan: Plan) -> Table:
    """One line per setting that may be changed alone: its flags, the peak after it, the smallest card for it."""
    table = Table(title="Less and more memory, one change at a time", title_style="bold", title_justify="left")
    for column in ("change", "flags", "GB", "smallest card", "price or gain"):
        table.add_column(column, justify="right" if column in ("GB", "smallest card") else "left", overflow="fold")
    peak = advice.needs(sizes, plan)
    for changes in (advice.savings(sizes, plan), advice.luxuries(sizes, plan)):
        for change in changes:
            difference = advice.needs(sizes, change.plan) - peak
            table.add_row(change.what, advice.flag_words(change.flags), f"{difference / 1e9:+.2f}",
                          _smallest(sizes, change.plan), change.cost)  # fmt: skip
        table.add_section()
    return table


def _smallest(sizes: Sizes, plan: Plan) -> str:
    return card_words(advice.smallest_card(sizes, plan)) if plan.device == "cuda" else "-"


def cards_table(suggestions: Iterable[advice.Suggestion]) -> Table:
    """Flags for cards of common sizes."""
    table = Table(title="Flags for cards of common sizes", title_style="bold", title_justify="left")
    for column in ("card", "peak GB", "flags"):
        table.add_column(column, justify="right" if column != "flags" else "left", overflow="fold")
    for one in suggestions:
        if one.plan is None:
            table.add_row(card_words(one.card_gb), f"{one.peak / 1e9:.1f}", "does not fit: take a smaller model")
        else:
            table.add_row(card_words(one.card_gb), f"{one.peak / 1e9:.1f}", advice.flag_words(one.flags))
    return table


def print_estimate(
    console: Console, sizes: Sizes, plan: Plan, name: str, capacity: float | None, place: str, step_rows: int = 16
) -> None:
    """The whole estimate; `capacity` bytes of `place` (None: no card is known, only common ones are looked at)."""
    kind = "4-bit NF4" if plan.load_in_4bit else plan.dtype
    passes = f"{plan.tokens:,} tokens in a pass, longest row {plan.longest or plan.tokens:,}"
    title = f"Memory of {name}: {sizes.parameters / 1e9:.2f} B parameters, {kind}, rank {plan.rank}, {passes}"
    console.print(parts_table(estimate(sizes, plan), plan, title))
    if capacity is not None:
        for line in verdict(sizes, plan, capacity, place):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    elif plan.device == "cuda":
        console.print(f"Smallest card it fits: {card_words(advice.smallest_card(sizes, plan))}.", highlight=False)
    console.print(changes_table(sizes, plan))
    like = plan if plan.device == "cuda" else plan.but(optim="adamw_8bit", dtype="bfloat16")
    console.print(cards_table([advice.suggest(sizes, gb, step_rows=step_rows, like=like) for gb in advice.CARDS_GB]))


def card_words(card_gb: float | None) -> str:
    return "none" if card_gb is None else f"{card_gb:g} GB"


def verdict(sizes: Sizes, plan: Plan, capacity: float, name: str) -> list[str]:
    """Whether the plan fits, in words: what is left, or what to change; and the largest row and pass."""
    peak = advice.needs(sizes, plan)
    rows = max(1, plan.tokens // (plan.longest or plan.tokens))
    lines = []
    if peak <= capacity:
        lines.append(f"Fits {name}: {gb(peak)} of {gb(capacity)}, {gb(capacity - peak)} left.")
    else:
        lines.append(f"Does not fit {name}: {gb(peak)} needed, {gb(capacity)} there.")
        fitting = advice.make_fit(sizes, plan, capacity)
        changes = "; ".join(dict.fromkeys(change.what for change in fitting.changes))
        if fitting.fits:
            lines.append(f"Fits with {advice.flag_words(fitting.flags())} ({gb(fitting.peak)}): {changes}.")
        else:
            lines.append(f"Nothing makes it fit (at best {gb(fitting.peak)}): take a smaller model or a larger card.")
    length, batch = advice.largest_length(sizes, plan, capacity, rows), advice.largest_batch(sizes, plan, capacity)
    if length:
        with_rows = "" if rows == 1 else f" with {rows} rows in a pass"
        lines.append(
            f"Largest: rows of {length:,} tokens{with_rows}, or {batch:,} rows of {plan.longest or plan.tokens:,} "
            "tokens in a pass."
        )
    return lines


def live_table(cards: list[Card], time: str) -> Table:
    """One reading of all cards."""
    table = Table(title=time, title_style="dim", title_justify="left")
    for column in ("card", "memory in use", "free", "load", "°C", "W"):
        table.add_column(column, justify="left" if column == "card" else "right")

    def show(value: Any, text: str) -> str:
        return "-" if value is None else text.format(value)

    for card in cards:
        name = escape(f"{card.index} {card.name}")
        if card.status == "lost":
            table.add_row(name, "lost", *["-"] * 4, style="red")
            continue
        used = show(card.memory_used_gb, "{:.2f}") + " / " + show(card.memory_total_gb, "{:.2f} GB")
        table.add_row(name, used, show(card.memory_free_gb, "{:.2f} GB"), show(card.utilization_percent, "{} %"),
                      show(card.temperature_c, "{}"), show(card.power_w, "{:.0f}"))  # fmt: skip
    return table


def as_json(sizes: Sizes, plan: Plan, suggestions: list[advice.Suggestion], card: tuple[str, float] | None) -> dict:
    """Everything the tables say, for programs. Sizes in GB (10^9 bytes)."""

    def in_gb(size: float) -> float:
        return round(size / 1e9, 4)

    parts = estimate(sizes, plan)
    changes = [*advice.savings(sizes, plan), *advice.luxuries(sizes, plan)]
    result: dict[str, Any] = {
        "parameters": round(sizes.parameters),
        "plan": {**plan.__dict__, "target_modules": list(plan.target_modules)},
        "parts_gb": {name: in_gb(size) for name, size in parts.items()},
        "total_gb": in_gb(total(parts)),
        "smallest_card_gb": advice.smallest_card(sizes, plan) if plan.device == "cuda" else None,
        "changes": [{"change": c.what, "flags": c.flags, "total_gb": in_gb(advice.needs(sizes, c.plan))}
                    for c in changes],
        "cards": [{"card_gb": s.card_gb, "fits": s.plan is not None, "total_gb": in_gb(s.peak), "flags": s.flags}
                  for s in suggestions],
    }  # fmt: skip
    if card is not None:
        name, capacity = card
        fitting = advice.make_fit(sizes, plan, capacity)
        result["card"] = {
            "name": name, "usable_gb": in_gb(capacity), "fits": total(parts) <= capacity,
            "largest_max_seq_length": advice.largest_length(sizes, plan, capacity),
            "largest_rows_per_pass": advice.largest_batch(sizes, plan, capacity),
            "to_fit": fitting.flags() if fitting.fits else None,
        }  # fmt: skip
    return result
