"""Memory of a training step, part by part. Formulas and their sources: docs/memory.md."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.memory.sizes import Matrix, Sizes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# NF4 in bitsandbytes 0.50: 4 bits per weight; an 8-bit scale per block of 64 weights; a float32 scale per 256 blocks;
# per matrix two code books (256 + 16 float32) and one float32 offset.
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
NF4_TABLE_BYTES = 4 * (256 + 16 + 1)

# bitsandbytes' 8-bit optimizers: one float32 scale per block of 256; tensors below 4,096 elements stay in 32 bits.
OPTIM_BLOCK, OPTIM_MIN_8BIT = 256, 4096

LOSS_CHUNK = 512  # positions that finetune/passes/loss.py handles at a time
LOSS_ROWS_ON_CPU = 32  # of a chunk: positions whose float32 probabilities exist at a time (GPU: the whole chunk)
CHECK_COPIES = 2  # float32 copies of a chunk's logits in the model's own forward: logits and log-probabilities

# Fixed costs. CPU: Python, torch, Unsloth and TRL before the first weight (measured, benchmarks/memory.py). GPU: CUDA
# context with cuBLAS's workspace (assumed; nvidia-smi shows 0.4 to 0.6 GB from Ampere on).
CPU_PROCESS_BYTES = 0.7e9
CUDA_CONTEXT_BYTES = 0.55e9
UNSLOTH_MIN_OFFLOAD_BYTES = 2 * 1024 * 1024  # smaller tensors stay on the GPU (unsloth_zoo 2026.10.9)

# Allocator overhead as a share: on a GPU of all temporary tensors (assumed), on a CPU of the activations (fitted to
# recorded runs, see docs/memory.md). LoRA layers that are not fused have their own shares, by dtype: fitted to two
# runs each for 4 bit, to one short run each for dropout. Logits on a CPU are blocks that go back to the system.
SLACK = {"cpu": 0.72, "cuda": 0.08}
SLACK_4BIT = {"float32": 1.1, "bfloat16": 0.36, "float16": 0.36}
SLACK_DROPOUT = {"float32": 0.58, "bfloat16": 0.43, "float16": 0.43}

# Bytes of optimizer state per trained parameter, for tensors large enough to be kept in 8 bits.
_EIGHT_BIT = 2 + 2 * 4 / OPTIM_BLOCK
OPTIMIZERS = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": _EIGHT_BIT, "adamw_8bit": _EIGHT_BIT,
    "ademamix_8bit": 1.5 * _EIGHT_BIT, "ademamix": 12.0, "lion_32bit": 4.0, "lion_8bit": 1 + 4 / OPTIM_BLOCK,
    "rmsprop": 4.0, "rmsprop_bnb": 4.0, "rmsprop_bnb_8bit": 1 + 4 / OPTIM_BLOCK, "adagrad": 4.0, "sgd": 0.0,
}  # fmt: skip
OPTIMIZER_ALIASES = {"adamw": "adamw_torch", "adamw_32bit": "adamw_torch", "lion": "lion_32bit"}


@dataclass(frozen=True)
class Workload:
    """What decides a run's memory.

    tokens: tokens of the largest forward pass; longest: tokens of the longest row (None: `tokens`)
    trained: positions of the largest pass that reach the lm_head (None: all)
    check_tokens: the longest row that is compared with the model's own forward before the first step (None: `longest`)
    device: "cuda" or "cpu"
    """

    tokens: int
    longest: int | None = None
    trained: int | None = None
    check_tokens: int | None = None
    rank: int = 16
    target_modules: tuple[str, ...] = ("all-linear",)
    last_layers: int | None = None
    dropout: float = 0.0
    dtype: str = "bfloat16"
    load_in_4bit: bool = True
    gradient_checkpointing: bool = True
    optim: str = "adamw_8bit"
    device: str = "cuda"

    @property
    def longest_row(self) -> int:
        return self.longest or self.tokens

    def replace(self, **changes: Any) -> Workload:
        return dataclasses.replace(self, **changes)

    def with_tokens(self, tokens: int, **changes: Any) -> Workload:
        """The workload with `tokens` tokens per pass, the same share of them trained."""
        trained = None if self.trained is None else max(1, round(self.trained * tokens / self.tokens))
        return self.replace(tokens=tokens, trained=trained, **changes)


def nf4_bytes(matrix: Matrix) -> tuple[int, int]:
    """Bytes of (packed weights, quantization constants) of all copies of a matrix in NF4 with double quantization.

    QLoRA, arXiv:2305.14314, section 3; the layout is that of bitsandbytes.functional.QuantState.
    """
    weights = matrix.inputs * matrix.outputs * matrix.experts
    blocks = math.ceil(weights / NF4_BLOCK)
    outer = math.ceil(blocks / NF4_OUTER_BLOCK)
    return math.ceil(weights / 2) * matrix.copies, (blocks + 4 * outer + NF4_TABLE_BYTES) * matrix.copies


def _base_optimizer(optim: str) -> str:
    """Name in OPTIMIZERS, or "adafactor", of one of Transformers' optimizer names."""
    name = optim.removeprefix("paged_")
    return OPTIMIZER_ALIASES.get(name, name)


def is_known_optimizer(optim: str) -> bool:
    """Whether `optimizer_bytes` knows this optimizer."""
    name = _base_optimizer(optim)
    return name in OPTIMIZERS or name == "adafactor"


def optimizer_bytes(optim: str, adapted: list[Matrix], rank: int) -> float:
    """Bytes of optimizer state for the adapter's tensors A and B; raises UserError for an unknown optimizer.

    0 for a paged optimizer: the driver moves its states between host and GPU on demand.
    """
    if not is_known_optimizer(optim):
        raise UserError(f"--optim {optim}: memory use unknown; known: {', '.join(sorted(OPTIMIZERS))}, adafactor")
    if optim.startswith("paged_"):
        return 0.0
    name = _base_optimizer(optim)
    if name == "adafactor":  # row and column means of the squared gradient
        return sum(4 * m.copies * m.experts * (2 * rank + m.inputs + m.outputs) for m in adapted)
    per_parameter = OPTIMIZERS[name]
    in_32_bits = 4 * round(per_parameter) if "8bit" in name else per_parameter
    total = 0.0
    for m in adapted:
        for size in (rank * m.inputs * m.experts, rank * m.outputs * m.experts):
            total += m.copies * size * (in_32_bits if size < OPTIM_MIN_8BIT else per_parameter)
    return total


def _has_fused_lora(workload: Workload) -> bool:
    """Whether LoRA layers are fused: by finetune/models/lora_linear.py on a CPU, by Unsloth's kernels on a GPU.

    Otherwise they are PEFT's layers.
    """
    return not workload.dropout and not (workload.device == "cpu" and workload.load_in_4bit)


def _recomputes_mlp(sizes: Sizes, workload: Workload) -> bool:
    """Whether the backward pass recomputes the MLP's product: on a CPU only for a silu-gated MLP with fused LoRA."""
    if not _has_fused_lora(workload):
        return False
    fused_down = sizes.silu_gated and any(m.name == "down_proj" for m in sizes.adapted(workload.target_modules))
    return workload.device != "cpu" or fused_down


def layer_bytes(sizes: Sizes, workload: Workload) -> float:
    """Bytes per token that one decoder layer saves for its backward pass; the tests compare them with autograd's.

    In the compute dtype: the output of each norm, query, key, value, attention output, and the MLP's gate and up;
    without `_recomputes_mlp` also the activated gate and the product. The input of each norm: in the compute dtype on a
    GPU, in float32 on a CPU. In float32: the log-sum-exp of every head and the scale of every norm. With dropout each
    adapted layer saves its own input and the dropout mask.
    """
    width, h, q, kv = BYTES[workload.dtype], sizes.hidden, sizes.query, sizes.key_value
    on_cpu = workload.device == "cpu"
    adapted = sizes.adapted(workload.target_modules)
    lora: float = sum(m.copies * m.experts for m in adapted) / sizes.layers * workload.rank
    before_norms = sizes.norms * h + ((q + kv) if sizes.qk_norm else 0)
    mlp = (2 if _recomputes_mlp(sizes, workload) else 4) * sizes.intermediate
    if sizes.routed:  # each expert of a token has its own input, output and output of LoRA's A
        mlp += 2 * sizes.routed * h
        lora = 7 * workload.rank * sizes.routed
    kept = 2 * h + 2 * q + 2 * kv + mlp
    scales = 4 * (sizes.heads + sizes.norms + (sizes.heads + kv // max(q // sizes.heads, 1) if sizes.qk_norm else 0))
    dropped = 0.0
    if workload.dropout:
        inputs = sum(m.inputs * m.copies * (sizes.routed if m.experts > 1 else 1) for m in adapted) / sizes.layers
        # The outputs of the norms and the MLP's product are not saved: a frozen layer does not need its input.
        kept += inputs - 2 * h - (0 if sizes.routed else sizes.intermediate)
        # The mask: float32 factors on a CPU, one byte per element on a GPU.
        dropped = inputs * (4 if on_cpu else 1)
    elif on_cpu and width < 4 and not _has_fused_lora(workload):
        # Each of PEFT's layers saves a cast copy of its input; of the norms' outputs only these copies are saved.
        kept += 3 * h + q
    if not on_cpu:
        return width * (before_norms + kept + (lora if workload.dropout else 0)) + dropped + scales
    return 4 * before_norms + width * (kept + lora) + dropped + scales


def estimate(sizes: Sizes, workload: Workload) -> dict[str, float]:
    """Bytes of each part at the peak of a training step; their sum is the peak.

    CPU: resident memory. GPU: what `nvidia-smi` shows for the process. Raises UserError for an unknown optimizer.
    """
    width = BYTES[workload.dtype]
    tokens, depth = workload.tokens, sizes.layers
    trained = tokens if workload.trained is None else min(workload.trained, tokens)
    checked = workload.check_tokens or workload.longest_row
    share = min(workload.last_layers or depth, depth) / depth
    adapted = sizes.adapted(workload.target_modules)
    adapter = share * sum(m.lora(workload.rank) for m in adapted)

    if workload.load_in_4bit:
        packed = [nf4_bytes(m) for m in sizes.matrices]
        weights, constants = sum(p[0] for p in packed), sum(p[1] for p in packed)
    else:
        weights, constants = width * sum(m.size for m in sizes.matrices), 0

    per_layer = tokens * layer_bytes(sizes, workload)
    state = tokens * sizes.hidden * width
    in_mlp = 3 if workload.device == "cpu" and _recomputes_mlp(sizes, workload) else 2
    backward = tokens * width * max(in_mlp * sizes.intermediate, 2 * sizes.query + 2 * sizes.key_value) + 2 * state
    trained_depth = depth * share
    if workload.gradient_checkpointing:
        offloaded = workload.device == "cuda" and state > UNSLOTH_MIN_OFFLOAD_BYTES
        # Offloaded: the last layer's hidden states stay on the GPU, two buffers bring the others back.
        kept = min(3.0, trained_depth) if offloaded else trained_depth
        activations = kept * state + per_layer
    else:
        activations = trained_depth * per_layer
    chunk = min(LOSS_CHUNK, trained)
    in_float32 = min(chunk, LOSS_ROWS_ON_CPU) * 2 if workload.device == "cpu" else chunk
    loss = sizes.vocab * (chunk * width + 4 * in_float32) + 2 * trained * sizes.hidden * width + 2 * state
    if workload.gradient_checkpointing and workload.device == "cuda":
        # The loss is done before the first layer is recomputed.
        loss = max(0.0, loss - per_layer)
    # 4 bit: the current matrix is dequantized into a persistent buffer and copied once.
    unpacked = 2 * width * sizes.largest_matrix if workload.load_in_4bit else 0
    step = activations + max(backward, loss) + unpacked
    # The check before the first step: two short rows in the model's own forward, with logits at every position.
    check = checked * sizes.vocab * width + chunk * sizes.vocab * 4 * CHECK_COPIES + unpacked
    parts = {
        "weights": weights,
        "quantization_constants": constants,
        "embeddings": width * (sizes.embedding + sizes.head),
        "norms": width * sizes.rest,
        "adapter": 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer": share * optimizer_bytes(workload.optim, adapted, workload.rank),
        "activations": activations,
        "backward": max(0.0, backward - loss),
        "loss": loss,
        "unpacked_weights": unpacked,
        "first_check": max(0.0, check - step),
        "context": CPU_PROCESS_BYTES if workload.device == "cpu" else CUDA_CONTEXT_BYTES,
    }
    if workload.device == "cpu":
        # Freed blocks fragment the heap as much with gradient checkpointing as without.
        by_dtype = SLACK_4BIT if workload.load_in_4bit else SLACK_DROPOUT
        slack = SLACK["cpu"] if _has_fused_lora(workload) else by_dtype[workload.dtype]
        parts["slack"] = slack * (trained_depth * per_layer + backward)
    else:
        parts["slack"] = SLACK["cuda"] * max(step, check)
    return parts


def measurable_bytes(parts: dict[str, float], device: str) -> float:
    """Bytes of `parts` that a run can measure itself: a CUDA process does not see its context."""
    return sum(parts.values()) - (parts["context"] if device == "cuda" else 0)
