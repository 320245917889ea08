"""Unsloth's CUDA code on a machine without a GPU: Triton's interpreter runs its kernels on CPU tensors.

Unsloth takes its CUDA branches without a device under UNSLOTH_ALLOW_CPU, Triton interprets kernels under
TRITON_INTERPRET, and `patch_and_import` adds what is missing between the two. Not covered: compiled kernels (here
FlexAttention is a dense kernel), the memory allocator, streams, speed, several GPUs.

Each use needs a process of its own, because the patches of Unsloth and torch stay:

  python -m tests.interpreted_cuda train_lora.py FLAGS …    any of the scripts
  python -m tests.interpreted_cuda gradients MODEL          shared, packed and padded passes compared with single rows
  python -m tests.interpreted_cuda waits MODEL …            where the host waits for the GPU in a step of each model
  python -m tests.interpreted_cuda memory MODEL …           memory of a step compared with the estimate
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import types
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from formats import IGNORE_INDEX
from tests.host_waits import HostWaits

ROOT = Path(__file__).resolve().parents[1]
ROTARY_TABLES = ("multi_gpu_cos_cached", "multi_gpu_sin_cached")
TRITON = ROOT / ".venv" / "triton"  # from `make test-slow`: next to a CPU torch it would break TRL's import


def on_cpu(value: Any) -> Any:
    """The CPU for a CUDA device or its name; any other value as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class CudaToCpu(TorchFunctionMode):
    """Replaces CUDA devices by the CPU in the arguments of every call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device and args and (args[0] is None or isinstance(args[0], int)):
            return torch.device("cpu")
        if "device" in kwargs:
            kwargs["device"] = "cpu" if isinstance(kwargs["device"], int) else on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        return func(*map(on_cpu, args), **kwargs)


class NoOp:
    """A stream, an event or a device context that does nothing."""

    idx = cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: NoOp()


class MemoryMeter(TorchDispatchMode):
    """Bytes of the live tensor storages that were added or created inside the context, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known and self.known[key]() is not None:
            return

        def on_freed(_):
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, on_freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


METER = MemoryMeter()


class DenseFlexAttention(torch.autograd.Function):
    """FlexAttention by a dense mask; saves what the compiled kernel saves: q, k, v, out, log-sum-exp."""

    @staticmethod
    def dense(q, k, v, mask, scale):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1], scale=scale
        )

    @staticmethod
    def forward(ctx, q, k, v, block_mask, scale):
        with _disable_current_modes():
            at = torch.arange(q.shape[2])
            ctx.mask, ctx.scale = block_mask.mask_mod(0, 0, at[:, None], at[None, :]), scale
            dense = DenseFlexAttention.dense(q, k, v, ctx.mask, scale)
        out = torch.empty_like(q)  # in the query's layout, like the kernel's
        out.copy_(dense)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[:3]
        with _disable_current_modes(), torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            dense = torch.autograd.grad(DenseFlexAttention.dense(*leaves, ctx.mask, ctx.scale), leaves, grad)
        return *(torch.empty_like(x).copy_(g) for x, g in zip(inputs, dense, strict=True)), None, None


class CudaLibrary:
    """bitsandbytes' native library, with placeholders for functions that Unsloth looks up but does not call."""

    def __init__(self, on_cpu: Any):
        self.on_cpu = on_cpu

    def __getattr__(self, name):
        function = getattr(self.on_cpu, name)
        return function if hasattr(function, "restype") else types.SimpleNamespace(restype=None)


class PerDeviceList(list):
    """A list with one entry per GPU, where None, the index of the CPU, selects the first."""

    def __getitem__(self, index):
        return super().__getitem__(index or 0)

    def __setitem__(self, index, value):
        super().__setitem__(index or 0, value)


def patch_and_import() -> None:
    """Patch torch, Triton and bitsandbytes, then import Unsloth."""
    os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1", "UNSLOTH_COMPILE_DISABLE": "1"}
    # Torch modes are per thread, so weights must be loaded in this one.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    sys.path.insert(0, str(TRITON))
    import bitsandbytes  # before torch reports a GPU: it would load its CUDA library

    bitsandbytes.functional.lib = CudaLibrary(bitsandbytes.functional.lib)
    from triton.backends.nvidia import driver

    driver.libcuda_dirs = list  # Unsloth would link the driver's library again
    fake_cuda()
    CudaToCpu().__enter__()
    from finetune.models import loading
    from finetune.passes import runner

    loading.import_unsloth()
    from unsloth.utils import prefix_grouper_kernel

    prefix_grouper_kernel._flex_attention_compiled = lambda q, k, v, *, block_mask, enable_gqa, scale, kernel_options: (
        DenseFlexAttention.apply(q, k, v, block_mask, scale)
    )
    interpret_bfloat16()

    candidates, load_base = runner.attention_candidates, loading.load_base
    runner.attention_candidates = lambda device_type: candidates("cuda")

    def load_with_tables(*args, **kwargs):
        result = load_base(*args, **kwargs)
        for module in result.model.modules():
            for name in ROTARY_TABLES:
                if hasattr(module, name):
                    setattr(module, name, PerDeviceList(getattr(module, name)))
        return result

    loading.load_base = load_with_tables


def fake_cuda() -> None:
    """Let torch.cuda report one Hopper GPU, with the memory use that METER measures."""
    cuda = torch.cuda
    torch.version.cuda = "13.0"
    cuda.Stream = cuda.Event = cuda.device = NoOp
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: NoOp())
    torch.Tensor.record_stream = lambda self, stream: None
    torch._C._cuda_getCurrentRawStream = lambda *args: 0
    properties = types.SimpleNamespace(
        name="interpreted", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32,
        gcnArchName="", shared_memory_per_block_optin=232_448, max_threads_per_multi_processor=2048,
    )  # fmt: skip

    def reset(*args):
        METER.peak = METER.live

    results = {
        "is_available": True, "current_device": 0, "device_count": 1,
        "get_device_capability": (9, 0), "get_device_properties": properties, "get_device_name": properties.name,
        "mem_get_info": (70 << 30, 80 << 30), "synchronize": None, "empty_cache": None, "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "manual_seed": None, "manual_seed_all": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, result in results.items():
        for module in (cuda, cuda.random):
            if hasattr(module, name):
                setattr(module, name, lambda *args, result=result, **kwargs: result)
    # Unsloth replaces a function that lacks this argument.
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.memory_allocated = cuda.memory_reserved = lambda *args: METER.live
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *args: METER.peak
    cuda.reset_peak_memory_stats = reset

    amp, autocast = torch.amp, torch.amp.autocast_mode.autocast
    custom_fwd, custom_bwd, init = amp.custom_fwd, amp.custom_bwd, autocast.__init__
    amp.custom_fwd = lambda *args, device_type, **kwargs: custom_fwd(*args, device_type=on_cpu(device_type), **kwargs)
    amp.custom_bwd = lambda *args, device_type: custom_bwd(*args, device_type=on_cpu(device_type))
    autocast.__init__ = lambda self, device_type, *args, **kwargs: init(self, on_cpu(device_type), *args, **kwargs)
    for name in ("get_autocast_dtype", "is_autocast_enabled", "set_autocast_enabled", "set_autocast_dtype"):
        original = getattr(torch, name)
        setattr(torch, name, lambda kind="cuda", *args, original=original: original(on_cpu(kind), *args))


def interpret_bfloat16() -> None:
    """Give kernels float32 instead of bfloat16, which the interpreter stores as uint16, multiplying bit patterns."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def run_in_float32(self, *args, **kwargs):
        storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def to_float32(value):
            if not (isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                flat = torch.empty(0, dtype=value.dtype).set_(storage, 0, (storage.nbytes() // 2,), (1,))
                storages[storage.data_ptr()] = flat, flat.float()
            return storages[storage.data_ptr()][1].as_strided(value.shape, value.stride(), value.storage_offset())

        with mock.patch.object(HostWaits, "is_counting", False), _disable_current_modes(), torch.no_grad():
            out = run(self, *map(to_float32, args), **{name: to_float32(value) for name, value in kwargs.items()})
            for flat, in_float32 in storages.values():
                flat.copy_(in_float32)
        return out

    GridExecutor.__call__ = run_in_float32


# --- what the tests run -----------------------------------------------------------------------------------------------


def lora_model(path: str, *, dtype: str, load_in_4bit: bool = False, gradient_checkpointing: bool = False):
    """The model of a folder with LoRA of rank 8 on all linear layers and non-zero B."""
    from finetune.models import loading
    from finetune.models.adapter import add_lora
    from tests.gradient_check import randomize_lora_b

    loaded = loading.load_base(path, dtype=dtype, load_in_4bit=load_in_4bit, max_seq_length=2048)
    adapted = add_lora(
        loaded.model, rank=8, alpha=16, dropout=0.0, target_modules=["all-linear"], use_rslora=False,
        gradient_checkpointing=gradient_checkpointing, seed=0,
    )  # fmt: skip
    return randomize_lora_b(adapted).train()


def make_runner(model, dtype: str):
    from finetune.passes.runner import PassRunner

    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    if dtype == "bfloat16":
        runner.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    return runner


def make_rows(groups: int) -> list[Any]:
    """Two rows per group, which share 40 tokens in the first group and 73 in the others."""
    import numpy as np

    from finetune.passes.plan import make_row

    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(3, 900, count).tolist()

    rows = []
    for group in range(groups):
        tools, turn = ids(40), ids(33)
        for number in range(2):
            row = [*tools, *(turn if group or number else []), *ids(9 + 5 * number + 3 * group)]
            rows.append(make_row(row, [*[IGNORE_INDEX] * (len(row) - 6), *row[-6:]]))
    return rows


def waits(*paths: str) -> dict[str, Any]:
    """Where the host waits for the GPU in a step of each model, by shared and by packed passes."""
    from finetune.passes import runner as passes_runner
    from finetune.passes.attention_cuda import UnslothPacked, UnslothTree

    result: dict[str, Any] = {"tree": [], "packed": []}
    for path in paths:
        model = lora_model(path, dtype="float32")
        for mode, attention in (("tree", UnslothTree()), ("packed", UnslothPacked())):
            passes_runner.choose_mode = lambda *_, found=(mode, "", attention): found
            runner = make_runner(model, "float32")
            with HostWaits() as counted:
                runner.run_once(make_rows(1), 1.0, torch.Tensor.backward)
            result[mode].append(counted.counts)
    return result


def gradients(path: str) -> dict[str, Any]:
    """Relative distances between the gradients of shared, packed and padded passes and of single rows, in float32."""
    from finetune.passes.attention import PackedAttention
    from finetune.passes.attention_cuda import UnslothPacked
    from tests.gradient_check import relative_distance, row_by_row_gradients, shared_gradients

    rows, result = make_rows(2), {}
    for checkpointing in (False, True):
        runner = make_runner(lora_model(path, dtype="float32", gradient_checkpointing=checkpointing), "float32")
        exact = row_by_row_gradients(runner, rows)
        distances = {"mode": runner.mode, "reason": runner.reason}
        distances["tree"] = relative_distance(shared_gradients(runner, rows), exact)
        for runner.mode, runner.attention in (("packed", UnslothPacked()), ("padded", PackedAttention())):
            distances[runner.mode] = relative_distance(shared_gradients(runner, rows), exact)
        result["recomputed" if checkpointing else "kept"] = distances
    return result


def memory(path: str, tokens: int, trained: int, load_in_4bit: bool, gradient_checkpointing: bool) -> dict[str, Any]:
    """Bytes that a step of one row takes in addition to weights, adapter and gradients, measured and estimated."""
    import numpy as np

    from finetune.memory.estimate import Workload, estimate
    from finetune.memory.sizes import sizes_of_model
    from finetune.passes import loss
    from finetune.passes.plan import make_row

    # The loss as on a GPU: a chunk at once, by a kernel that reads 16 bits and writes 32 without a copy in between.
    loss.CPU_SOFTMAX_POSITIONS = loss.CHUNK_POSITIONS
    log_softmax = torch.log_softmax

    def fused(logits, dim, dtype):
        with _disable_current_modes():
            out = log_softmax(logits, dim=dim, dtype=dtype)
        return torch.empty(out.shape, dtype=dtype).copy_(out)

    torch.log_softmax = fused
    model = lora_model(path, dtype="bfloat16", load_in_4bit=load_in_4bit, gradient_checkpointing=gradient_checkpointing)
    runner = make_runner(model, "bfloat16")
    rng = np.random.default_rng(0)

    def step(length):
        ids = rng.integers(3, 900, length + 1).tolist()
        row = make_row(ids, [*[IGNORE_INDEX] * (length + 1 - trained), *ids[-trained:]])
        runner.run([row], 1.0, lambda loss: loss.backward())

    step(trained + 8)  # creates rotary tables, buffers and gradients
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for module in model.modules():
        known += [table for name in ROTARY_TABLES for table in getattr(module, name, []) if table is not None]
    with METER:
        for tensor in known:
            METER.add(tensor)
        start = METER.peak = METER.live
        step(tokens)
    plan = Workload(
        tokens=tokens, trained=trained, rank=8, load_in_4bit=load_in_4bit,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    parts = estimate(sizes_of_model(model), plan)
    step_parts = {name: parts[name] for name in ("activations", "backward", "loss", "unpacked_weights")}
    return {"mode": runner.mode, "measured": METER.peak - start, "estimate": sum(step_parts.values()), **step_parts}


def main(arguments: list[str]) -> int:
    what, *more = arguments
    if what.endswith(".py"):
        patch_and_import()
        return importlib.import_module(what.removesuffix(".py")).main(more)
    with contextlib.redirect_stdout(sys.stderr):
        patch_and_import()
        if what in ("gradients", "waits"):
            result = globals()[what](*more)
        else:
            path, tokens, trained, *switches = more
            result = memory(path, int(tokens), int(trained), "4bit" in switches, "checkpointing" in switches)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
