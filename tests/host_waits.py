"""What makes the host wait for a GPU, counted on a machine without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.equal}
MASKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # a boolean index is `nonzero`
# Without an operation of their own where the tensor is on the CPU already.
CALLS = {getattr(torch.Tensor, name): name for name in ("tolist", "cpu", "numpy")}


class HostWaits(TorchDispatchMode):
    """Counts values that are read from tensors, sizes that depend on values, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._calls = _Calls(self)

    def __enter__(self) -> HostWaits:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation, inputs = func.overloadpacket, tensors((args, kwargs))
        if operation in READS or (operation in MASKS and any(x.dtype == torch.bool for x in tensors(args[1]))):
            self.counts[operation.__name__] += 1
        elif func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None:
            self.counts["repeat_interleave"] += 1
        if operation is aten._local_scalar_dense and inputs[0].is_meta:
            return 0.0
        out = func(*args, **(kwargs or {}))
        if len({x.device for x in [*inputs, *tensors(out)]}) > 1:
            self.counts["copy"] += 1
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CALLS or (func is torch.Tensor.to and "cpu" in args[1:]):
            self.waits.counts[CALLS.get(func, "to cpu")] += 1
        return func(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
