"""Flags for GPUs of common sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.memory.estimate import Workload
from finetune.memory.plan import MemoryPlan, usable_bytes
from finetune.memory.sizes import Sizes

# (rank, tokens of the longest row, rows per pass), from small to large. The described system for 12 GB uses the third
# and recommends the second for 10 GB and the fifth for 16 GB.
LADDER = ((4, 512, 1), (4, 1024, 1), (8, 2048, 1), (16, 4096, 1), (16, 4096, 2), (16, 8192, 2), (32, 8192, 4),
          (64, 8192, 8), (64, 16_384, 8))  # fmt: skip
# Quantization costs quality and time, so a GPU that fits this step with 16-bit weights gets 16-bit weights.
FIRST_16_BIT_STEP = 3


@dataclass(frozen=True)
class Suggestion:
    """Settings for one GPU size; where even the smallest do not fit, `plan.fits` is False and `flags` is empty."""

    gpu_gb: float
    plan: MemoryPlan
    flags: dict[str, Any]


def suggest(sizes: Sizes, gpu_gb: float, *, step_rows: int = 16, like: Workload | None = None) -> Suggestion:
    """The largest settings of LADDER that fit a GPU, with 16-bit weights where these fit.

    step_rows: rows per optimizer step, which the suggestion keeps. like: optimizer, dtype and target modules to keep.
    """
    base = like or Workload(tokens=0)
    for in_4bit, ladder in ((False, LADDER[FIRST_16_BIT_STEP:]), (True, LADDER)):
        for rank, length, rows in reversed(ladder):
            if (sizes.max_positions and length > sizes.max_positions and length > LADDER[0][1]) or step_rows % rows:
                continue
            workload = base.replace(
                device="cuda", rank=rank, tokens=rows * length, longest=length, trained=None, load_in_4bit=in_4bit,
                gradient_checkpointing=True,
            )  # fmt: skip
            plan = MemoryPlan(sizes, workload, usable_bytes(gpu_gb))
            if plan.fits:
                flags = {
                    "load_in_4bit": in_4bit, "rank": rank, "max_seq_length": length, "batch_size": rows,
                    "grad_accum": step_rows // rows, "tokens_per_pass": rows * length,
                }  # fmt: skip
                return Suggestion(gpu_gb, plan, flags)
    return Suggestion(gpu_gb, plan, {})
