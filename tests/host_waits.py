"""What makes the host wait for a GPU, counted on a machine without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.equal}
MASKS = {aten.index, aten.index_put, aten.index_put_}  # a boolean index is `nonzero`
# Methods without an operation of their own where the tensor is on the CPU already.
METHODS = ("tolist", "cpu", "numpy", "to")


class HostWaits(TorchDispatchMode):
    """Counts values that are read from tensors, sizes that depend on values, and copies between devices."""

    is_counting = True  # not while Triton's interpreter reads the arguments of a kernel

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> HostWaits:
        # Not a TorchFunctionMode: it is off inside `Tensor.backward`.
        for name in METHODS:
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name in METHODS:
            delattr(torch.Tensor, name)

    def _counting(self, name: str, method: Any) -> Any:
        def counted(tensor, *args, **kwargs):
            if self.is_counting and (name != "to" or "cpu" in args):
                self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

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


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
