"""Which settings fit a card: the largest length and batch, what to change, and flags for cards of common sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from finetune.memory.estimate import Plan, estimate, total
from finetune.memory.sizes import Sizes

CARDS_GB = (6, 8, 10, 12, 16, 24, 48, 80)
# Of a card's nominal size (in GiB, as it is sold) what one program can have: error correction and the driver take
# 6% of a T4 or L4; a desktop that draws on the card takes more.
USABLE = 0.94
# Rank, tokens of the longest row and rows in one pass, from frugal to roomy. The described system for 12 GB trains the
# third and tells owners of 10 and of 16 GB to take the second and the fifth.
STEPS_UP = ((4, 512, 1), (4, 1024, 1), (8, 2048, 1), (16, 4096, 1), (16, 4096, 2), (16, 8192, 2), (32, 8192, 4),
            (64, 8192, 8), (64, 16_384, 8))  # fmt: skip
# Quantising costs quality and time, so a card that holds this step with 16-bit weights is told not to.
STEP_FOR_16_BIT = 3
LONGEST = 1 << 20


def usable(card_gb: float) -> float:
    """Bytes one training process can have on a card sold as `card_gb`."""
    return USABLE * card_gb * 2**30


def needs(sizes: Sizes, plan: Plan) -> float:
    """Peak of the plan in bytes."""
    return total(estimate(sizes, plan))


def smallest_card(sizes: Sizes, plan: Plan) -> int | None:
    """The smallest of CARDS_GB that holds the plan, None when none does."""
    peak = needs(sizes, plan)
    return next((card for card in CARDS_GB if peak <= usable(card)), None)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1 … most that fits, 0 when not even 1 does; `fits` must not become true again."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_length(sizes: Sizes, plan: Plan, capacity: float, rows: int = 1) -> int:
    """Most tokens a row may have when `rows` of them make a pass; 0 when not even one fits. At most what the model's
    positions allow."""
    most = min(sizes.max_positions or LONGEST, LONGEST)
    return largest(lambda n: needs(sizes, plan.with_tokens(n * rows, longest=n)) <= capacity, most)


def largest_batch(sizes: Sizes, plan: Plan, capacity: float) -> int:
    """Most rows of the plan's longest length in one pass; 0 when not even one fits."""
    longest = plan.longest or plan.tokens
    return largest(lambda n: needs(sizes, plan.with_tokens(n * longest)) <= capacity, 4096)


@dataclass(frozen=True)
class Change:
    """One change of a plan: in words, as flags of train_lora.py, and the plan after it."""

    what: str
    flags: dict[str, object]
    plan: Plan
    cost: str = ""


def savings(sizes: Sizes, plan: Plan) -> list[Change]:
    """Changes that lower the peak, those that cost nothing first."""
    longest = plan.longest or plan.tokens
    changes = []
    if plan.tokens > longest:
        half = max(plan.tokens // 2, longest)
        changes.append(Change("smaller passes", {"tokens_per_pass": half}, plan.with_tokens(half),
                              "same numbers, a little slower"))  # fmt: skip
    if not plan.gradient_checkpointing:
        changes.append(Change("recompute activations", {"gradient_checkpointing": True},
                              plan.but(gradient_checkpointing=True), "same numbers, about 30% slower"))  # fmt: skip
    if plan.device == "cuda" and not plan.optim.startswith("paged_"):
        changes.append(Change("8-bit optimizer in paged memory", {"optim": "paged_adamw_8bit"},
                              plan.but(optim="paged_adamw_8bit"), "8-bit states"))  # fmt: skip
    if not plan.load_in_4bit:
        changes.append(Change("4-bit base weights", {"load_in_4bit": True}, plan.but(load_in_4bit=True),
                              "coarser weights, slower steps"))  # fmt: skip
    if plan.rank > 4:
        changes.append(Change("half the rank", {"rank": plan.rank // 2}, plan.but(rank=plan.rank // 2),
                              "a smaller adapter"))  # fmt: skip
    if longest > 256:
        half = longest // 2
        changes.append(Change("rows half as long", {"max_seq_length": half, "overlong": "trim_turns"},
                              plan.with_tokens(max(half, plan.tokens // 2), longest=half),
                              "long rows lose their oldest turns"))  # fmt: skip
    layers = plan.last_layers or sizes.layers
    if layers > 4:
        changes.append(Change("adapt half of the layers", {"last_layers": layers // 2},
                              plan.but(last_layers=layers // 2), "a smaller adapter"))  # fmt: skip
    peak = needs(sizes, plan)
    return [change for change in changes if needs(sizes, change.plan) < peak]  # of a tiny model some save nothing


def luxuries(sizes: Sizes, plan: Plan) -> list[Change]:
    """Changes that spend memory."""
    longest = plan.longest or plan.tokens
    rows = max(1, plan.tokens // longest)
    changes = [Change("twice the rank", {"rank": 2 * plan.rank}, plan.but(rank=2 * plan.rank), "a larger adapter")]
    if plan.load_in_4bit:
        changes.append(Change("16-bit base weights", {"load_in_4bit": False}, plan.but(load_in_4bit=False),
                              "exact weights, faster steps"))  # fmt: skip
    if not sizes.max_positions or 2 * longest <= sizes.max_positions:
        changes.append(Change("rows twice as long", {"max_seq_length": 2 * longest},
                              plan.with_tokens(2 * plan.tokens, longest=2 * longest),
                              "longer rows are kept whole"))  # fmt: skip
    changes.append(Change("twice the rows in a pass", {"tokens_per_pass": 2 * rows * longest},
                          plan.with_tokens(2 * rows * longest), "same numbers, faster"))  # fmt: skip
    if plan.gradient_checkpointing:
        changes.append(Change("keep activations", {"gradient_checkpointing": False},
                              plan.but(gradient_checkpointing=False), "same numbers, faster"))  # fmt: skip
    peak = needs(sizes, plan)
    return [change for change in changes if needs(sizes, change.plan) > peak]


@dataclass
class Fitting:
    """A plan brought down to a capacity: the changes in order, `peak` in bytes after them, and whether it fits now."""

    plan: Plan
    peak: float
    fits: bool
    changes: list[Change] = field(default_factory=list)

    def flags(self) -> dict[str, object]:
        """The flags of all changes together; a later one wins."""
        return {name: value for change in self.changes for name, value in change.flags.items()}


def make_fit(sizes: Sizes, plan: Plan, capacity: float) -> Fitting:
    """Change the plan until it fits: each saving as long as it helps, in the order of `savings`."""
    fitting = Fitting(plan, needs(sizes, plan), False)
    while fitting.peak > capacity:
        for change in savings(sizes, fitting.plan):
            peak = needs(sizes, change.plan)
            # A change that gives less than a hundredth of what is missing is not worth its price.
            if fitting.peak - peak > 0.01 * (fitting.peak - capacity):
                fitting.plan, fitting.peak = change.plan, peak
                fitting.changes.append(change)
                break
        else:
            return fitting
    fitting.fits = True
    return fitting


@dataclass(frozen=True)
class Suggestion:
    """Settings for one card; `plan` None when even the most frugal ones do not fit."""

    card_gb: float
    plan: Plan | None
    peak: float
    flags: dict[str, object]


def suggest(sizes: Sizes, card_gb: float, *, step_rows: int = 16, like: Plan | None = None) -> Suggestion:
    """Flags for a card: the roomiest of STEPS_UP that fits, with 16-bit weights where there is room for them.

    step_rows: rows of one optimizer step, which stay what they are. like: optimizer, dtype and target modules to keep.
    """
    base = like or Plan(tokens=0)
    capacity = usable(card_gb)
    for in_4bit, steps in ((False, STEPS_UP[STEP_FOR_16_BIT:]), (True, STEPS_UP)):
        for rank, length, rows in reversed(steps):
            if (sizes.max_positions and length > sizes.max_positions and length > STEPS_UP[0][1]) or step_rows % rows:
                continue
            plan = base.but(
                device="cuda", rank=rank, tokens=rows * length, longest=length, trained=None, load_in_4bit=in_4bit,
                gradient_checkpointing=True,
            )  # fmt: skip
            peak = needs(sizes, plan)
            if peak <= capacity:
                flags = {
                    "load_in_4bit": in_4bit, "rank": rank, "max_seq_length": length, "batch_size": rows,
                    "grad_accum": max(1, step_rows // rows), "tokens_per_pass": rows * length,
                }  # fmt: skip
                return Suggestion(card_gb, plan, peak, flags)
    return Suggestion(card_gb, None, peak, {})


def flag_words(flags: dict[str, object]) -> str:
    """Flags as train_lora.py takes them on a command line."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {value}")
    return " ".join(words)
