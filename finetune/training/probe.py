"""How much memory a pass takes, tried on the model itself before the first step."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.memory.estimate import Plan, knows, optimizer_bytes
from finetune.memory.sizes import Sizes
from finetune.passes.plan import make_row
from finetune.passes.runner import PassRunner, is_out_of_memory
from finetune.training import memory_plan

log = logging.getLogger("sandwich")
# Tokens of the two passes that are tried on a CPU, where each of them costs seconds; a chunk of the loss is 512.
CPU_TRIES = (512, 1024)


def tokens_of_a_pass(
    runner: PassRunner, settings: Any, sizes: Sizes, plan: Plan, sequences: Any, groups: Any = None
) -> int:
    """--tokens_per_pass, or its default: by what two passes of this model on this device took of the free memory.

    The formula's answer (`memory_plan.tokens_of_a_pass`) stands where nothing can be tried, and on a CPU where by it
    memory for twice the run's largest pass is free: there a try would cost seconds and change nothing. groups: as in
    `steps_of_epoch`.
    """
    guess = memory_plan.tokens_of_a_pass(settings, sizes, plan, sequences, loaded=True)
    if settings.tokens_per_pass:
        return guess
    if plan.device == "cpu":
        largest = memory_plan.with_rows(plan, settings, sequences, guess, groups=groups).tokens
        if memory_plan.default_tokens_per_pass(sizes, plan, loaded=True) >= 2 * largest:
            return guess
    found = probe(runner, CPU_TRIES if plan.device == "cpu" else (max(512, guess // 4), max(1024, guess // 2)))
    if found is None:
        return guess
    optimizer = optimizer_bytes(plan.optim if knows(plan.optim) else "adamw_torch", sizes.adapted(plan.target_modules),
                                plan.rank)  # fmt: skip
    tokens = found.tokens(memory_plan.BUDGET[plan.device] * memory_plan.free_memory() - optimizer)
    useful = memory_plan.useful_tokens(settings, plan, sequences) or memory_plan.MOST_TOKENS
    tokens = min(max(tokens, memory_plan.LEAST_TOKENS), memory_plan.MOST_TOKENS, useful)
    log.info("a pass takes %.2f GB and %.0f kB a token (tried); passes of at most %s tokens",
             found.fixed / 1e9, found.per_token / 1e3, f"{tokens:,}")  # fmt: skip
    return tokens


@dataclass(frozen=True)
class Probe:
    """Bytes of a forward and backward pass: `fixed`, and `per_token` for each of its computed tokens."""

    fixed: float
    per_token: float

    def tokens(self, room: float) -> int:
        """The largest pass that takes no more than `room` bytes."""
        return max(0, int((room - self.fixed) / self.per_token))


def probe(runner: PassRunner, sizes: tuple[int, int]) -> Probe | None:
    """Run rows of these many random tokens forward and backward, every token trained, and look at the memory they take.

    Leaves no gradient behind and draws from no random number generator that the run uses. None where memory cannot be
    watched (a CPU outside Linux), where not even these passes fit, or where the two tell nothing.
    """
    on_gpu = runner.device.type == "cuda"
    watch = _cuda_peaks if on_gpu else _resident_peaks
    training = runner.model.training
    runner.model.train()

    try:
        with torch.random.fork_rng(devices=[runner.device] if on_gpu else []):
            peaks = watch([work(runner, tokens) for tokens in sizes])
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peaks = None
    finally:
        runner.model.zero_grad()
        runner.model.train(training)
        if on_gpu:
            torch.cuda.empty_cache()
    if peaks is None or peaks[1] <= peaks[0]:
        return None
    per_token = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return Probe(max(0.0, peaks[0] - sizes[0] * per_token), per_token)


def work(runner: PassRunner, tokens: int) -> Callable[[], None]:
    """A forward and backward pass of one row, which is never cut; its last id is only a target."""
    ids = np.random.default_rng(0).integers(0, runner.head.weight.shape[0], tokens + 1)
    row = make_row(ids, ids)

    def run() -> None:
        runner.run_once([row], 1 / tokens, lambda loss: loss.backward())
        runner.model.zero_grad()

    return run


def _cuda_peaks(work: list[Callable[[], None]]) -> list[float]:
    """Bytes that tensors took at most while each piece of work ran, beyond what they took before."""
    work[0]()  # compiles kernels and makes buffers that stay
    peaks = []
    for run in work:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks


def _resident_peaks(work: list[Callable[[], None]]) -> list[float] | None:
    """Bytes by which resident memory rose at most above its present size while each piece of work ran.

    Linux forgets a process's high-water mark when told to. Memory that the allocator holds in reserve is handed back
    first, or the work would be done in it and seem to take nothing; musl has no such call and holds little.
    """
    marks = Path("/proc/self/clear_refs")
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
    peaks = []
    for run in work:
        gc.collect()
        trim(0)
        before = _status("VmRSS")
        try:
            marks.write_text("5", encoding="ascii")  # proc(5): sets VmHWM to the present VmRSS
        except OSError:
            return None
        run()
        peaks.append(_status("VmHWM") - before)
    return peaks


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")
