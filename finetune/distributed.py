"""Several processes training one run (torchrun, accelerate launch): data parallel, each on its share of every step.

Gradients are summed here, once a step, instead of by DistributedDataParallel's hooks: a step is several forward passes
whose number differs between ranks, and a rank may have no row of a short last step. Numbers that all ranks must agree
on go over gloo on the CPU even where gradients go over NCCL: gloo notices a dead peer at once, NCCL only after its
timeout, so no rank enters NCCL's sum after a peer has died.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import acquire_lock, release_lock, require_run_folder

if TYPE_CHECKING:
    import torch

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP", "UNSLOTH_FSDP2": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip
_PEER_ERROR = re.compile(r"gloo|nccl|(closed|reset) by peer|broken pipe|connection (was )?(closed|refused)", re.I)
LOCK = ".lock"
LOCK_TIMEOUT_SECONDS = 10
_group: Any = None  # the gloo process group; None in a run of one process


class RankLost(UserError):
    """Another process of this run is gone."""


def size() -> int:
    return max(1, _env_int("WORLD_SIZE", 1))


def rank() -> int:
    return _env_int("RANK", 0)


def _env_int(variable: str, default: int) -> int:
    """A number that the launcher has set; UserError where something else has set the variable."""
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} is not a number from torchrun; unset it, or start with torchrun")
    return int(value)


def refuse_sharding() -> None:
    """UserError where a launcher asks for sharded weights; called before any slow import."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "false"):
            raise UserError(
                f"{name} shards the base weights, which this trainer's own forward passes cannot gather; launch with "
                "torchrun --nproc_per_node N, with --load_in_4bit if one GPU cannot hold the model (docs/clusters.md)"
            )


def start() -> None:
    """Join the other processes, if there are any, and select this process's GPU."""
    global _group  # noqa: PLW0603
    if size() == 1 or _group is not None:
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        device, count = _env_int("LOCAL_RANK", 0), torch.cuda.device_count()
        if device >= count:
            raise UserError(
                f"process {device + 1} of this machine has no GPU: {count} visible; --nproc_per_node must be <= {count}"
            )
        torch.cuda.set_device(device)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or accelerate ignores the other processes
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except ValueError as error:  # a variable of the launcher is missing or not a number
            raise UserError(
                f"WORLD_SIZE={size()}, but the other processes cannot be found: {error}; start with torchrun, or unset "
                "WORLD_SIZE"
            ) from error
    _group = dist.new_group(backend="gloo")


def end() -> None:
    """Wait for the other processes and leave the group; a peer that is already gone is not an error here."""
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


def wait_for_lock(folder: Path) -> bool:
    """Lock the run's folder until this process ends, once no other process holds it; False if locks do not work there.

    For runs of several processes: rank 0 has the lock before its first step, so a rank that gets it after a process
    was lost knows, without a timeout, that rank 0 is dead or has already saved. torchrun kills the survivors 30 seconds
    after the first death.
    """
    return _group is None or _hold(acquire_lock(folder / LOCK, "", timeout=-1))


def lock_run(folder: Path) -> None:
    """Lock the run's folder until this process ends; UserError when another process is training there.

    A process that was told to stop gets LOCK_TIMEOUT_SECONDS to end. In a run of several processes rank 0 locks.
    """
    if rank() > 0:
        return
    busy = f"{folder}: another process is training this run; wait for it, or stop it first"
    require_run_folder(folder)  # the lock would create it again
    _hold(acquire_lock(folder / LOCK, busy, timeout=LOCK_TIMEOUT_SECONDS))


def _hold(lock: Any) -> bool:
    if lock is not None:
        atexit.register(release_lock, lock)
    return lock is not None


def is_lost(error: BaseException) -> bool:
    """Whether an error means that a peer is gone; always False in a run of one process."""
    return isinstance(error, RankLost) or (
        _group is not None and isinstance(error, RuntimeError) and bool(_PEER_ERROR.search(str(error)))
    )


def totals(values: Sequence[float]) -> list[float]:
    """Sums over all ranks in float64. Raises RankLost."""
    if _group is None:
        return [float(value) for value in values]
    import torch
    import torch.distributed as dist

    numbers = torch.tensor(values, dtype=torch.float64)
    _communicate(dist.all_reduce, numbers, group=_group)
    return numbers.tolist()


def from_first(make: Callable[[], str]) -> str:
    """The text that `make()` returns on rank 0, on every rank; other ranks do not call it. Raises RankLost."""
    if _group is None:
        return make()
    import torch.distributed as dist

    box = [make() if rank() == 0 else None]
    _communicate(dist.broadcast_object_list, box, src=0, group=_group)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order. Raises RankLost."""
    if _group is None:
        return [value]
    import torch.distributed as dist

    values = [None] * size()
    _communicate(dist.all_gather_object, values, value, group=_group)
    return values


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks; one that no rank has stays None. Raises RankLost."""
    if _group is None:
        return
    import torch
    import torch.distributed as dist
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    counts = totals([parameter.grad is not None for parameter in parameters])
    buckets: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for parameter in (parameter for parameter, count in zip(parameters, counts, strict=True) if count):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        buckets.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in buckets.values():
        flat = parameters_to_vector(gradients)
        _communicate(dist.all_reduce, flat)
        vector_to_parameters(flat, gradients)


def _communicate(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a collective operation; RankLost where it fails because a peer is gone."""
    try:
        operation(*args, **kwargs)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLost(f"another process of this run has ended; process {rank()} of {size()} stops too") from error
