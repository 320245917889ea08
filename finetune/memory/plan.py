"""MemoryPlan: what a run takes, whether it fits, and which flags make it fit; suggested flags for GPUs."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune.errors import UserError
from finetune.memory.estimate import Workload, estimate, measurable_bytes
from finetune.memory.sizes import Sizes

GPU_SIZES_GB = (6, 8, 10, 12, 16, 24, 48, 80)
# Share of a GPU's nominal size (GiB, as sold) that one process gets: error correction and the driver take 6% of a T4 or
# L4; a desktop that uses the GPU takes more.
USABLE_SHARE = 0.94
MAX_ROW_TOKENS = 1 << 20
MAX_ROWS_PER_PASS = 4096
# Suggested (rank, tokens of the longest row, rows per pass), from small to large. The described system for 12 GB uses
# the third and recommends the second for 10 GB and the fifth for 16 GB.
LADDER = ((4, 512, 1), (4, 1024, 1), (8, 2048, 1), (16, 4096, 1), (16, 4096, 2), (16, 8192, 2), (32, 8192, 4),
          (64, 8192, 8), (64, 16_384, 8))  # fmt: skip
# Quantization costs quality and time, so a GPU that fits this step with 16-bit weights gets 16-bit weights.
FIRST_16_BIT_STEP = 3
MIN_USEFUL_SAVING = 0.01  # of the missing bytes; a change that saves less is skipped


def usable_bytes(gpu_gb: float) -> float:
    """Bytes that one training process gets on a GPU sold as `gpu_gb`."""
    return USABLE_SHARE * gpu_gb * 2**30


def largest_fitting(fits: Callable[[int], bool], maximum: int) -> int:
    """The largest n in 1 … maximum for which `fits` holds, 0 if none; `fits` holds up to some n and not beyond."""
    return bisect.bisect_left(range(1, maximum + 1), True, key=lambda n: not fits(n))


@dataclass(frozen=True)
class Change:
    """One change of a plan: its flags of train_lora.py, the plan after it, and what else it affects."""

    what: str
    flags: dict[str, Any]
    plan: MemoryPlan
    effect: str


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run. Its properties raise UserError for an optimizer whose memory is unknown.

    capacity: bytes available to the run (None: unknown)
    tokens_per_pass: the run's budget per pass (None outside a run); `workload.tokens` is its largest actual pass
    """

    sizes: Sizes
    workload: Workload
    capacity: float | None = None
    tokens_per_pass: int | None = None

    @cached_property
    def parts(self) -> dict[str, float]:
        """Bytes of each part at the peak."""
        return estimate(self.sizes, self.workload)

    @cached_property
    def peak(self) -> float:
        """Bytes at the peak of a training step."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.peak <= self.capacity

    @property
    def smallest_gpu_gb(self) -> int | None:
        """The smallest of GPU_SIZES_GB that the plan fits, None if there is none."""
        return next((gpu_gb for gpu_gb in GPU_SIZES_GB if self.peak <= usable_bytes(gpu_gb)), None)

    def with_workload(self, workload: Workload) -> MemoryPlan:
        return dataclasses.replace(self, workload=workload)

    def max_row_tokens(self, rows: int = 1) -> int:
        """Tokens of the longest row that fits `capacity` with `rows` rows per pass, 0 if none fits."""
        limit = min(self.sizes.max_positions or MAX_ROW_TOKENS, MAX_ROW_TOKENS)
        return largest_fitting(lambda n: self._fits_with_tokens(n * rows, longest=n), limit)

    def max_rows_per_pass(self) -> int:
        """How many rows of the longest length fit `capacity` in one pass, 0 if none fits."""
        longest = self.workload.longest_row
        return largest_fitting(lambda n: self._fits_with_tokens(n * longest), MAX_ROWS_PER_PASS)

    def _fits_with_tokens(self, tokens: int, **changes: Any) -> bool:
        return bool(self.with_workload(self.workload.with_tokens(tokens, **changes)).fits)

    def reductions(self) -> list[Change]:
        """Changes that lower the peak, those that do not affect the result first."""
        now, row, change = self.workload, self.workload.longest_row, self._change
        half_pass, half_row, layers = max(now.tokens // 2, row), row // 2, now.last_layers or self.sizes.layers
        shorter_rows = now.with_tokens(max(half_row, now.tokens // 2), longest=half_row)
        candidates = [
            now.tokens > row
            and change("smaller passes", "same numbers, a little slower", now.with_tokens(half_pass),
                       tokens_per_pass=half_pass),
            not now.gradient_checkpointing
            and change("recompute activations", "same numbers, about 30% slower", gradient_checkpointing=True),
            now.device == "cuda" and not now.optim.startswith("paged_")
            and change("8-bit optimizer in paged memory", "8-bit states", optim="paged_adamw_8bit"),
            not now.load_in_4bit
            and change("4-bit base weights", "coarser weights, slower steps", load_in_4bit=True),
            now.rank > 4
            and change("half the rank", "a smaller adapter", rank=now.rank // 2),
            row > 256
            and change("rows half as long", "long rows lose their oldest turns", shorter_rows,
                       max_seq_length=half_row, overlong="trim_turns"),
            layers > 4
            and change("adapt half of the layers", "a smaller adapter", last_layers=layers // 2),
        ]  # fmt: skip
        return [one for one in candidates if one and one.plan.peak < self.peak]

    def increases(self) -> list[Change]:
        """Changes that use more memory."""
        now, row, change = self.workload, self.workload.longest_row, self._change
        larger_pass = 2 * max(1, now.tokens // row) * row
        longer_rows = now.with_tokens(2 * now.tokens, longest=2 * row)
        candidates = [
            change("twice the rank", "a larger adapter", rank=2 * now.rank),
            now.load_in_4bit
            and change("16-bit base weights", "exact weights, faster steps", load_in_4bit=False),
            (not self.sizes.max_positions or 2 * row <= self.sizes.max_positions)
            and change("rows twice as long", "longer rows are kept complete", longer_rows, max_seq_length=2 * row),
            change("twice the rows in a pass", "same numbers, faster", now.with_tokens(larger_pass),
                   tokens_per_pass=larger_pass),
            now.gradient_checkpointing
            and change("keep activations", "same numbers, faster", gradient_checkpointing=False),
        ]  # fmt: skip
        return [one for one in candidates if one and one.plan.peak > self.peak]

    def _change(self, what: str, effect: str, workload: Workload | None = None, **flags: Any) -> Change:
        """`workload` after the change; None: the flags are fields of the workload."""
        return Change(what, flags, self.with_workload(workload or self.workload.replace(**flags)), effect)

    def fitted(self) -> tuple[MemoryPlan, list[Change]]:
        """The plan with reductions applied until it fits `capacity`, each as long as it helps, and these changes."""
        assert self.capacity is not None
        plan, changes = self, []
        while not plan.fits:
            missing = plan.peak - self.capacity
            useful = (one for one in plan.reductions() if plan.peak - one.plan.peak > MIN_USEFUL_SAVING * missing)
            if (change := next(useful, None)) is None:
                break
            plan = change.plan
            changes.append(change)
        return plan, changes

    def as_config(self) -> dict[str, Any]:
        """The `memory` entry of experiment_config.json; sizes in GB (10^9 bytes).

        predicted_gb is what the run can measure itself: resident memory on a CPU; on a GPU what PyTorch's allocator
        reserves, which excludes the CUDA context. measured_gb is filled in at the end of the run.
        """
        entry: dict[str, Any] = {"predicted_gb": None, "measured_gb": None, "parts": {}}
        try:
            parts = self.parts
        except UserError as error:  # an unknown optimizer must not stop a run
            return {**entry, "reason": str(error)}
        entry["predicted_gb"] = round(measurable_bytes(parts, self.workload.device) / 1e9, 3)
        entry["parts"] = {name: round(size / 1e9, 4) for name, size in parts.items()}
        return {**entry, "plan": dataclasses.asdict(self.workload)}


def suggest(
    sizes: Sizes, gpu_gb: float, *, step_rows: int = 16, like: Workload | None = None
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The largest settings of LADDER that fit a GPU, with 16-bit weights where these fit, and their flags.

    step_rows: rows per optimizer step, which the flags keep. like: optimizer, dtype and target modules to keep. Where
    nothing fits, the plan is the smallest and there are no flags.
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
                return plan, {
                    "load_in_4bit": in_4bit, "rank": rank, "max_seq_length": length, "batch_size": rows,
                    "grad_accum": step_rows // rows, "tokens_per_pass": rows * length,
                }  # fmt: skip
    return plan, {}


def merged_flags(changes: Iterable[Change]) -> dict[str, Any]:
    """The flags of all changes; later changes override earlier ones."""
    return {name: value for change in changes for name, value in change.flags.items()}


def command_line(flags: dict[str, Any]) -> str:
    """Flags in the syntax of train_lora.py."""
    arguments = []
    for name, value in flags.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name} {value}")
    return " ".join(arguments)
