"""Measures the memory of a pass on the loaded model, before the first step."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.errors import is_out_of_memory
from finetune.passes.plan import make_row
from finetune.passes.runner import PassRunner


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass: `fixed`, plus `per_token` for each computed token."""

    fixed: float
    per_token: float


def measure_pass(runner: PassRunner, sizes: tuple[int, int]) -> PassMemory | None:
    """The memory of a pass, from two passes of these sizes: random tokens, all trained.

    Leaves no gradients and does not advance the run's random number generators. None where memory cannot be measured (a
    CPU outside Linux), where these passes do not fit, and where the larger one does not take more.
    """
    on_gpu = runner.device.type == "cuda"
    measure = cuda_peaks if on_gpu else resident_peaks
    training = runner.model.training
    runner.model.train()
    try:
        with torch.random.fork_rng(devices=[runner.device] if on_gpu else []):
            peaks = measure([random_pass(runner, tokens) for tokens in sizes])
    except (RuntimeError, MemoryError) as error:
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
    return PassMemory(max(0.0, peaks[0] - sizes[0] * per_token), per_token)


def random_pass(runner: PassRunner, tokens: int) -> Callable[[], None]:
    """A function that runs one row of random tokens forward and backward; a single row is never split."""
    ids = np.random.default_rng(0).integers(0, runner.head.weight.shape[0], tokens + 1).tolist()
    row = make_row(ids, ids)

    def run() -> None:
        runner.run_once([row], 1 / tokens, lambda loss: loss.backward())
        runner.model.zero_grad()

    return run


def cuda_peaks(passes: Sequence[Callable[[], None]]) -> list[int]:
    """Peak bytes of tensors during each pass, beyond those allocated before it."""
    passes[0]()  # compiles kernels and allocates buffers that stay
    peaks = []
    for run in passes:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks


def resident_peaks(passes: Sequence[Callable[[], None]]) -> list[int] | None:
    """Peak resident memory in bytes during each pass, beyond that before it; None where Linux's /proc is missing.

    Free memory that the allocator holds is released first; otherwise the pass would use it and seem to take nothing.
    """
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # musl has none
    peaks = []
    for run in passes:
        gc.collect()
        trim(0)
        before = _status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM to VmRSS
        except OSError:
            return None
        run()
        peaks.append(_status_bytes("VmHWM") - before)
    return peaks


def _status_bytes(name: str) -> int:
    """A memory field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
