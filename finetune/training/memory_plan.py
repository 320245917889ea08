"""Memory of one run of train_lora.py: its plan from flags and rows, its budget per pass, prediction against peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.memory.advice import LONGEST, largest
from finetune.memory.estimate import Plan, estimate, knows, measured_part, total
from finetune.memory.sizes import Sizes
from finetune.passes.plan import CPU_TARGET_TOKENS, make_row, plan_passes
from finetune.training.order import steps_of_epoch

# Steps that are cut into passes on trial, to see how large a pass becomes with shared prefixes.
TRIED_STEPS = 24
# Share of the free memory that a default budget per pass may take. On a CPU larger passes are no faster and other
# programs want memory too; on a card a pass that is too large is halved.
BUDGET = {"cpu": 0.6, "cuda": 0.8}
LEAST_TOKENS, MOST_TOKENS = 1024, 65_536


def kind_of(device: str) -> str:
    """ "cpu" or "cuda" for a torch device's name."""
    return "cpu" if device.startswith("cpu") else "cuda"


def chosen_optimizer(settings: Any, device: str) -> str:
    """What --optim auto means on this device."""
    if settings.optim != "auto":
        return settings.optim
    return "adamw_torch" if kind_of(device) == "cpu" else "adamw_8bit"


def plan_of_run(
    settings: Any, *, dtype: str, load_in_4bit: bool, gradient_checkpointing: bool, device: str, tokens: int = 1
) -> Plan:
    """A run's plan from its flags; `with_rows` adds what the rows decide."""
    return Plan(
        tokens=tokens,
        rank=settings.rank,
        target_modules=tuple(settings.target_modules),
        last_layers=settings.last_layers,
        dropout=settings.dropout,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        gradient_checkpointing=gradient_checkpointing,
        optim=chosen_optimizer(settings, device),
        device=kind_of(device),
    )


def with_rows(
    plan: Plan,
    settings: Any,
    sequences: Sequence,
    tokens_per_pass: int,
    planner: Callable | None = None,
    groups: np.ndarray | None = None,
) -> Plan:
    """The plan with the largest pass that the first steps of this run are cut into.

    sequences: (input_ids, labels) of each row; planner: rows of a step -> its passes (default: packed, by the flags);
    groups: as in `steps_of_epoch`.
    """
    enough = CPU_TARGET_TOKENS if plan.device == "cpu" else None
    planner = planner or (lambda rows: plan_passes(rows, tokens_per_pass, settings.share_prefix, target_tokens=enough))
    rng = np.random.default_rng([settings.seed, 0])  # as the trainer draws the first epoch
    steps = steps_of_epoch(len(sequences), settings.batch_size * settings.grad_accum, rng, groups)
    tokens = trained = check = 0
    for number, step in enumerate(steps[: min(TRIED_STEPS, settings.max_steps or TRIED_STEPS)]):
        rows = [make_row(*sequences[i]) for i in step]
        for one in planner(rows):
            tokens, trained = max(tokens, one.input_ids.size), max(trained, len(one.positions))
        if number == 0:  # the two shortest rows of the first step are checked
            check = sorted(len(row.input_ids) for row in rows)[:2][-1]
    longest = max(len(ids) for ids, _ in sequences)
    return plan.but(tokens=max(tokens, longest), longest=longest, trained=trained, check_tokens=check)


def free_memory() -> float:
    """Bytes this process may still take: free CUDA memory on a GPU, available main memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def all_memory() -> float:
    """Bytes that this machine has, taken or not: of the GPU at hand, else main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().total


def default_tokens_per_pass(sizes: Sizes, plan: Plan, *, loaded: bool) -> int:
    """The largest pass within BUDGET of the free memory; `loaded`: the weights are in memory already.

    An out-of-memory error halves it later if need be.
    """
    if not knows(plan.optim):
        plan = plan.but(optim="adamw_torch")
    room = BUDGET[plan.device] * free_memory()
    if loaded:
        parts = estimate(sizes, plan)
        there = ("weights", "quantization_constants", "embeddings", "norms", "context", "adapter")
        room += sum(parts[name] for name in there)

    def fits(tokens: int) -> bool:
        return total(estimate(sizes, plan.but(tokens=tokens, longest=1, check_tokens=1, trained=None))) <= room

    return max(LEAST_TOKENS, largest(fits, min(MOST_TOKENS, LONGEST)))


def useful_tokens(settings: Any, plan: Plan, sequences: Sequence) -> int | None:
    """Tokens beyond which a larger pass brings nothing; None on a GPU.

    On a CPU a large pass is no faster than two small ones, so a pass never holds more tokens than `batch_size` of the
    longest rows, side by side in an ordinary trainer's micro-batch, would; four rows at least, since a prefix that is
    shared by rows of two passes is computed twice.
    """
    if plan.device != "cpu":
        return None
    return max(LEAST_TOKENS, max(4, settings.batch_size) * max(len(ids) for ids, _ in sequences))


def tokens_of_a_pass(settings: Any, sizes: Sizes, plan: Plan, sequences: Sequence, *, loaded: bool) -> int:
    """--tokens_per_pass, or what the free memory allows by the estimate, and on a CPU no more than is of use.

    A run tries before it believes this (finetune/training/probe.py).
    """
    if settings.tokens_per_pass:
        return settings.tokens_per_pass
    allowed = default_tokens_per_pass(sizes, plan, loaded=loaded)
    return min(allowed, useful_tokens(settings, plan, sequences) or allowed)


def prediction(sizes: Sizes, plan: Plan) -> dict[str, Any]:
    """The `memory` entry of experiment_config.json before the run; GB are 10^9 bytes. `measured_gb` comes with its end.

    predicted_gb is what the run can measure itself: resident memory on a CPU, on a GPU what PyTorch's allocator
    reserves, so without the CUDA context, which `parts` lists.
    """
    try:
        parts = estimate(sizes, plan)
    except UserError as error:  # an optimizer whose states are not known: no run fails of that
        return {"predicted_gb": None, "measured_gb": None, "parts": {}, "reason": str(error)}
    return {
        "predicted_gb": round(measured_part(parts, plan.device) / 1e9, 3),
        "measured_gb": None,
        "parts": {name: round(size / 1e9, 4) for name, size in parts.items()},
        "plan": {**plan.__dict__, "target_modules": list(plan.target_modules)},
    }
