"""Several processes training one run (torchrun, accelerate launch): data parallel, each on its share of every step.

The gradients are summed here, once a step, instead of by DistributedDataParallel's hooks: a step is several forward
passes whose number differs between ranks, and a rank may have no row of a short last step. Numbers that all ranks have
to agree on travel over gloo on the CPU even where gradients travel over NCCL: gloo notices a dead peer at once, NCCL
only after its timeout, so no rank enters NCCL's sum with a peer that is gone already.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import acquire_lock, release_lock

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP", "UNSLOTH_FSDP2": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip
_LOST = re.compile(r"gloo|nccl|(closed|reset) by peer|broken pipe|connection (was )?(closed|refused)", re.IGNORECASE)
LOCK = ".lock"
SECONDS_TO_END = 10
_group: Any = None


class RankLost(UserError):
    """Another process of this run is gone."""


def size() -> int:
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    return _number("RANK", 0)


def _number(variable: str, default: int) -> int:
    """What the launcher has said; UserError where something else has set the variable."""
    word = os.environ.get(variable) or str(default)
    if not word.isdecimal():
        raise UserError(f"{variable}={word}: it is for torchrun to set to a number; unset it, or start with torchrun")
    return int(word)


def refuse_sharding() -> None:
    """UserError where a launcher asks for split weights; called before anything slow is imported."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "false"):
            raise UserError(
                f"{name} splits the base weights, which this trainer's own forward passes cannot gather; launch with "
                "torchrun --nproc_per_node N, with --load_in_4bit if one card cannot hold the model (docs/sweeps.md)"
            )


def start() -> None:
    """Join the other processes, if there are any, and take this process's GPU."""
    global _group  # noqa: PLW0603
    if size() == 1 or _group is not None:
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        card, cards = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if card >= cards:
            raise UserError(
                f"process {card + 1} of this machine has no GPU: {cards} can be seen; give torchrun at most "
                f"--nproc_per_node {cards}"
            )
        torch.cuda.set_device(card)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or accelerate takes each process for a run of its own
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except ValueError as error:  # a variable of the launcher's is missing or no number
            raise UserError(
                f"WORLD_SIZE={size()}, but the other processes cannot be found: {error}; start with torchrun, or unset "
                "WORLD_SIZE"
            ) from error
    _group = dist.new_group(backend="gloo")


def end() -> None:
    """Wait for the others and part from them; a peer that has gone already is no error any more."""
    global _group  # noqa: PLW0603
    if _group is None:
        return
    import torch.distributed as dist

    try:
        dist.barrier(group=_group)
        dist.destroy_process_group()
    except RuntimeError as error:
        if not is_lost(error):
            raise
    _group = None


def lock(folder: Path) -> bool:
    """Hold the run's folder until this process ends, once nobody else does; False on a file system without locks.

    Rank 0 holds it from before the first step. So whoever gets it after a process was lost knows that rank 0 is gone or
    has written what is left, without asking anybody and without a timeout: torchrun kills the survivors of a broken run
    30 seconds after the death that it saw.
    """
    if _group is None:
        return True
    held = acquire_lock(folder / LOCK, "", timeout=-1)
    if held is not None:
        atexit.register(release_lock, held)
    return held is not None


def hold(folder: Path) -> None:
    """Keep the folder of a run of one process to this process until it ends; UserError when another is at work in it.

    One that was told to stop gets a moment to end. Of several processes the first one only looks: it takes the folder
    in `lock`, when it knows the others.
    """
    if rank() > 0:
        return
    busy = f"{folder}: another process is training this run; wait for it, or stop it first"
    held = acquire_lock(folder / LOCK, busy, timeout=SECONDS_TO_END)
    if held is None:
        return
    if size() > 1:
        held.release()
    else:
        atexit.register(release_lock, held)


def is_lost(error: BaseException) -> bool:
    """Whether an error means that a peer is gone; a process of its own never has such an error."""
    return isinstance(error, RankLost) or (
        _group is not None and isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
    )


def totals(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, float64; the values themselves in a process of its own. Raises RankLost."""
    if _group is None:
        return [float(value) for value in values]
    import torch
    import torch.distributed as dist

    numbers = torch.tensor(values, dtype=torch.float64)
    _checked(lambda: dist.all_reduce(numbers, group=_group))
    return numbers.tolist()


def from_first(make: Any) -> Any:
    """What `make()` returns on rank 0 (text), on every rank; the others do not call it. Raises RankLost."""
    if _group is None:
        return make()
    import torch.distributed as dist

    box = [make() if rank() == 0 else None]
    _checked(lambda: dist.broadcast_object_list(box, src=0, group=_group))
    return box[0]


def sum_gradients(parameters: Sequence[Any]) -> None:
    """Replace every gradient by its sum over all ranks; one that no rank has stays None. Raises RankLost."""
    if _group is None:
        return
    import torch
    import torch.distributed as dist

    have = totals([parameter.grad is not None for parameter in parameters])
    some = [parameter for parameter, count in zip(parameters, have, strict=True) if count]
    kinds: dict[Any, list[Any]] = {}
    for parameter in some:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in kinds.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        _checked(lambda flat=flat: dist.all_reduce(flat))
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()


def _checked(communicate: Any) -> None:
    try:
        communicate()
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLost(f"another process of this run has ended; process {rank()} of {size()} stops too") from error
