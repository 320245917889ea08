"""The memory plan of a run of train_lora.py: its workload from flags and rows, and its budget of tokens per pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.memory.estimate import Workload, is_known_optimizer, optimizer_bytes
from finetune.memory.plan import MemoryPlan, largest_fitting
from finetune.memory.sizes import Sizes
from finetune.passes.plan import CPU_TARGET_TOKENS, PaddedPass, Pass, Row, make_row, plan_passes
from finetune.settings import Settings
from finetune.training.order import Groups, steps_of_epoch

if TYPE_CHECKING:
    from finetune.passes.runner import PassRunner

log = logging.getLogger("sandwich")
PLANNED_STEPS = 24  # cut into passes in advance, to see how large a pass becomes with shared prefixes
# Share of the free memory that the default budget uses. Larger passes are no faster on a CPU, and other programs need
# memory too; on a GPU a pass that is too large is halved.
BUDGET_SHARE = {"cpu": 0.6, "cuda": 0.8}
MIN_DEFAULT_TOKENS_PER_PASS, MAX_DEFAULT_TOKENS_PER_PASS = 1024, 65_536
MIN_ROWS_PER_CPU_PASS = 4  # a prefix that rows of two passes share is computed twice
GPU_OPTIMIZERS = ("8bit", "paged", "bnb")  # parts of the names of bitsandbytes' optimizers, which Unsloth has for GPUs
CPU_PROBE_TOKENS = (512, 1024)  # two passes, which take seconds on a CPU; a chunk of the loss is 512
LOADED_PARTS = ("weights", "quantization_constants", "embeddings", "norms", "context", "adapter")

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # (input_ids, labels) of each row


@dataclass(frozen=True)
class Placement:
    """How a run's base model is loaded. device: "cpu", or a GPU's name."""

    dtype: str
    load_in_4bit: bool
    gradient_checkpointing: bool
    device: str

    @property
    def device_type(self) -> str:
        return "cpu" if self.device.startswith("cpu") else "cuda"


def default_placement(settings: Settings) -> Placement:
    """The placement that a run with these flags would use on this machine."""
    import torch

    from finetune.models.loading import compute_dtype

    gpu = torch.cuda.is_available()
    dtype = compute_dtype(settings.dtype)
    in_4bit = gpu if settings.load_in_4bit is None else settings.load_in_4bit
    checkpointing = gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    return Placement(dtype, in_4bit, checkpointing, torch.cuda.get_device_name(0) if gpu else "cpu")


def chosen_optimizer(settings: Settings, device: str) -> str:
    """--optim, with "auto" resolved for this device; on a CPU AdamW in place of those that only a GPU has."""
    if not device.startswith("cpu"):
        return "adamw_8bit" if settings.optim == "auto" else settings.optim
    only_gpu = any(part in settings.optim for part in GPU_OPTIMIZERS)
    return "adamw_torch" if settings.optim == "auto" or only_gpu else settings.optim


def plan_for(
    settings: Settings,
    sizes: Sizes,
    placement: Placement,
    sequences: Sequences,
    *,
    runner: PassRunner | None = None,
    groups: Groups | None = None,
) -> MemoryPlan:
    """The plan of a run: tokens per pass, bytes of each part, peak; its capacity is the free memory.

    runner: the loaded model, which is measured where the estimate decides the budget; its tokens_per_pass is set to the
    plan's. None: nothing is loaded yet. groups: as in `steps_of_epoch`.
    """
    workload = workload_of(settings, placement)
    budget = choose_tokens_per_pass(settings, sizes, workload, sequences, runner, groups)
    planner = None
    if runner is not None:
        runner.tokens_per_pass = budget
        planner = runner.plan
    workload = with_rows(workload, settings, sequences, budget, planner, groups)
    return MemoryPlan(sizes, workload, free_memory(), budget)


def workload_of(settings: Settings, placement: Placement) -> Workload:
    """The workload as far as the flags decide it; `with_rows` adds what the rows decide."""
    return Workload(
        tokens=1,
        rank=settings.rank,
        target_modules=tuple(settings.target_modules),
        last_layers=settings.last_layers,
        dropout=settings.dropout,
        dtype=placement.dtype,
        load_in_4bit=placement.load_in_4bit and not settings.dequantize_once,
        gradient_checkpointing=placement.gradient_checkpointing,
        optim=chosen_optimizer(settings, placement.device),
        device=placement.device_type,
    )


def with_known_optimizer(workload: Workload) -> Workload:
    """The workload with AdamW in place of an optimizer whose memory is unknown."""
    return workload if is_known_optimizer(workload.optim) else workload.replace(optim="adamw_torch")


def with_rows(
    workload: Workload,
    settings: Settings,
    sequences: Sequences,
    tokens_per_pass: int,
    planner: Callable[[Sequence[Row]], Sequence[Pass | PaddedPass]] | None = None,
    groups: Groups | None = None,
) -> Workload:
    """The workload with the largest pass of the run's first steps.

    planner: cuts the rows of a step into passes (None: packed passes as the flags say).
    """
    enough = CPU_TARGET_TOKENS if workload.device == "cpu" else None
    planner = planner or (lambda rows: plan_passes(rows, tokens_per_pass, settings.share_prefix, target_tokens=enough))
    rng = np.random.default_rng([settings.seed, 0])  # the trainer's generator for the first epoch
    steps = steps_of_epoch(len(sequences), settings.batch_size * settings.grad_accum, rng, groups)
    tokens = trained = check = 0
    for number, step in enumerate(steps[: min(PLANNED_STEPS, settings.max_steps or PLANNED_STEPS)]):
        rows = [make_row(*sequences[i]) for i in step]
        for one in planner(rows):
            tokens, trained = max(tokens, one.input_ids.size), max(trained, len(one.positions))
        if number == 0:  # the two shortest rows of the first step are checked
            check = sorted(len(row.input_ids) for row in rows)[:2][-1]
    longest = max_row_tokens(sequences)
    return workload.replace(tokens=max(tokens, longest), longest=longest, trained=trained, check_tokens=check)


def max_row_tokens(sequences: Sequences) -> int:
    return max(len(ids) for ids, _ in sequences)


def choose_tokens_per_pass(
    settings: Settings,
    sizes: Sizes,
    workload: Workload,
    sequences: Sequences,
    runner: PassRunner | None = None,
    groups: Groups | None = None,
) -> int:
    """--tokens_per_pass, or a default that fits the free memory: measured with `runner`, otherwise estimated.

    On a CPU two measured passes take seconds. Where the estimate leaves memory for twice the run's largest pass, they
    would change nothing and are skipped.
    """
    if settings.tokens_per_pass:
        return settings.tokens_per_pass
    allowed = estimated_tokens_per_pass(sizes, workload, loaded=runner is not None)
    limit = MAX_DEFAULT_TOKENS_PER_PASS
    if workload.device == "cpu":
        # A larger pass is no faster than the micro-batch of an ordinary trainer: `batch_size` of the longest rows.
        rows = max(MIN_ROWS_PER_CPU_PASS, settings.batch_size)
        limit = max(MIN_DEFAULT_TOKENS_PER_PASS, rows * max_row_tokens(sequences))
    estimated = min(allowed, limit)
    if runner is None:
        return estimated
    probe_tokens = (max(512, estimated // 4), max(1024, estimated // 2))
    if workload.device == "cpu":
        if allowed >= 2 * with_rows(workload, settings, sequences, estimated, groups=groups).tokens:
            return estimated
        probe_tokens = CPU_PROBE_TOKENS
    from finetune.training.probe import measure_pass

    measured = measure_pass(runner, probe_tokens)
    if measured is None:
        return estimated
    optim = with_known_optimizer(workload).optim
    optimizer = optimizer_bytes(optim, sizes.adapted(workload.target_modules), workload.rank)
    room = BUDGET_SHARE[workload.device] * free_memory() - optimizer - measured.fixed
    tokens = min(max(int(room / measured.per_token), MIN_DEFAULT_TOKENS_PER_PASS), MAX_DEFAULT_TOKENS_PER_PASS, limit)
    log.info("measured: a pass takes %.2f GB plus %.0f kB per token; tokens per pass: %s",
             measured.fixed / 1e9, measured.per_token / 1e3, f"{tokens:,}")  # fmt: skip
    return tokens


def estimated_tokens_per_pass(sizes: Sizes, workload: Workload, *, loaded: bool) -> int:
    """Tokens of the largest pass that fits BUDGET_SHARE of the free memory by the estimate.

    loaded: whether the weights are in memory already. An out-of-memory error during the run halves the budget.
    """
    workload = with_known_optimizer(workload)
    room = BUDGET_SHARE[workload.device] * free_memory()
    if loaded:
        parts = MemoryPlan(sizes, workload).parts
        room += sum(parts[name] for name in LOADED_PARTS)

    def fits(tokens: int) -> bool:
        one_pass = workload.replace(tokens=tokens, longest=1, check_tokens=1, trained=None)
        return MemoryPlan(sizes, one_pass).peak <= room

    return max(MIN_DEFAULT_TOKENS_PER_PASS, largest_fitting(fits, MAX_DEFAULT_TOKENS_PER_PASS))


def free_memory() -> int:
    """Bytes this process may still allocate: free CUDA memory on a GPU, available main memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def total_memory() -> int:
    """Bytes of the GPU, without one of main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().total
