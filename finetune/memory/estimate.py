"""What a training step holds in memory, part by part. Formulas and their sources: docs/memory.md."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from finetune.errors import UserError
from finetune.memory.sizes import Matrix, Sizes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# NF4 as bitsandbytes 0.50 stores it: 4 bits a weight; a scale per block of 64, itself in 8 bits with a float32 scale
# per 256 blocks; per matrix the two code books (256 + 16 float32) and one float32 offset. The state is kept per matrix.
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
NF4_TABLES = 4 * (256 + 16 + 1)

# Blocks of bitsandbytes' 8-bit optimizers: 256 numbers share one float32 scale; tensors below 4,096 stay in 32 bits.
OPTIM_BLOCK, OPTIM_SMALLEST = 256, 4096

# finetune/passes/loss.py handles this many positions at a time.
LOSS_CHUNK = 512
# ... and the float32 probabilities of so many of them on a CPU, of all of them on a GPU.
LOSS_ROWS_ON_CPU = 32
# float32 tensors of a chunk's logits where a model's own forward is compared: the logits, and their logarithms.
CHECK_COPIES = 2

# Fixed costs in bytes. PROCESS: Python, torch, Unsloth and TRL before the first weight, resident on a CPU (measured,
# benchmarks/memory.py). CONTEXT: the CUDA context with cuBLAS's workspace (not measured by us: nvidia-smi shows 0.4 to
# 0.6 GB on cards from Ampere on). UNSLOTH_OFFLOAD_FROM: smaller tensors stay on the card (unsloth_zoo 2026.10.9).
PROCESS = 0.7e9
CONTEXT = 0.55e9
UNSLOTH_OFFLOAD_FROM = 2 * 1024 * 1024
# Share that the allocator holds on top of what is in use: fragments of blocks of changing sizes. CUDA: of everything
# that comes and goes, an assumption until one is measured. CPU: of the activations, fitted to the recorded measurements
# (docs/memory.md); with LoRA layers that are not fused by the type: in 4 bit to two of them each, with dropout to one
# short run each.
# Logits lie in blocks of their own there, which the system gets back whole.
SLACK = {"cpu": 0.72, "cuda": 0.08}
SLACK_4BIT = {"float32": 1.1, "bfloat16": 0.36, "float16": 0.36}
SLACK_DROPOUT = {"float32": 0.58, "bfloat16": 0.43, "float16": 0.43}

# Bytes of optimizer state per trained number, for tensors that are large enough to be kept in 8 bits.
_EIGHT_BIT = 2 + 2 * 4 / OPTIM_BLOCK
OPTIMIZERS = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": _EIGHT_BIT, "adamw_8bit": _EIGHT_BIT,
    "ademamix_8bit": 1.5 * _EIGHT_BIT, "ademamix": 12.0, "lion_32bit": 4.0, "lion_8bit": 1 + 4 / OPTIM_BLOCK,
    "rmsprop": 4.0, "rmsprop_bnb": 4.0, "rmsprop_bnb_8bit": 1 + 4 / OPTIM_BLOCK, "adagrad": 4.0, "sgd": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What of a run decides its memory. tokens: in the largest forward pass; longest: tokens of the longest row;
    trained: positions of that pass which reach the lm_head (None: all of them); check_tokens: longest row of those
    that are compared with the model's own forward before the first step (None: `longest`)."""

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

    def but(self, **changes) -> Plan:
        """The same plan with some of its settings changed."""
        return dataclasses.replace(self, **changes)

    def with_tokens(self, tokens: int, **changes) -> Plan:
        """The plan with a pass of so many tokens, the same share of them trained."""
        trained = None if self.trained is None else max(1, round(self.trained * tokens / self.tokens))
        return self.but(tokens=tokens, trained=trained, **changes)


def nf4_bytes(matrix: Matrix) -> tuple[float, float]:
    """(packed weights, quantisation constants) in bytes of all copies of a matrix under NF4 with double quantisation.

    QLoRA, arXiv:2305.14314, section 3; the layout is that of bitsandbytes.functional.QuantState.
    """
    numbers = matrix.inputs * matrix.outputs * matrix.experts
    blocks = math.ceil(numbers / NF4_BLOCK)
    outer = math.ceil(blocks / NF4_OUTER_BLOCK)
    return math.ceil(numbers / 2) * matrix.copies, (blocks + 4 * outer + NF4_TABLES) * matrix.copies


def _optimizer(optim: str) -> tuple[str, bool]:
    """(name in OPTIMIZERS or "adafactor", paged) of one of Transformers' optimizer names."""
    name = optim.removeprefix("paged_")
    name = {"adamw": "adamw_torch", "adamw_32bit": "adamw_torch", "lion": "lion_32bit"}.get(name, name)
    return name, optim.startswith("paged_")


def knows(optim: str) -> bool:
    """Whether the states of this optimizer can be counted."""
    name, _ = _optimizer(optim)
    return name in OPTIMIZERS or name == "adafactor"


def optimizer_bytes(optim: str, adapted: list[Matrix], rank: int) -> float:
    """Bytes of optimizer state for the adapter's tensors A and B.

    0 for a paged optimizer: its states lie in memory that the driver moves between host and card on demand.
    Raises UserError for an optimizer that is not known.
    """
    name, paged = _optimizer(optim)
    if not knows(optim):
        raise UserError(f"--optim {optim}: its memory is not known; known: {', '.join(sorted(OPTIMIZERS))}, adafactor")
    if paged:
        return 0.0
    if name == "adafactor":  # row and column means of the squared gradient
        return sum(4 * m.copies * m.experts * (2 * rank + m.inputs + m.outputs) for m in adapted)
    each = OPTIMIZERS[name]
    in_32_bits = 4 * round(each) if "8bit" in name else each
    total = 0.0
    for m in adapted:
        for numbers in (rank * m.inputs * m.experts, rank * m.outputs * m.experts):
            total += m.copies * numbers * (in_32_bits if numbers < OPTIM_SMALLEST else each)
    return total


def _fused(plan: Plan) -> bool:
    """Whether LoRA layers are those of finetune/models/lora_linear.py on a CPU, of Unsloth's kernels on a GPU, which
    take a 4-bit base, too; else they are PEFT's."""
    return not plan.dropout and not (plan.device == "cpu" and plan.load_in_4bit)


def _rebuilds(sizes: Sizes, plan: Plan) -> bool:
    """Whether an MLP's product is made again in the backward pass: by Unsloth's kernels on a GPU; on a CPU by
    finetune/models/lora_linear.py, where a fused LoRA layer takes the product of a silu-gated MLP."""
    if not _fused(plan):
        return False
    fused_down = sizes.silu_gated and any(m.name == "down_proj" for m in sizes.adapted(plan.target_modules))
    return plan.device != "cpu" or fused_down


def layer_bytes(sizes: Sizes, plan: Plan) -> float:
    """Bytes one token leaves in one decoder layer for its backward pass.

    In the compute type: the state behind each norm, query, key, value and attention output, and inside the MLP gate and
    up; where these are not made again (`_rebuilds`) also the activated gate and the product. On a GPU also the state
    before each norm; on a CPU a norm keeps that in float32. In float32 everywhere: the log-sum-exp of every head and
    the scale of every norm. With dropout each adapted layer keeps an input of its own, in place of what it would share
    with others, and which numbers of it were dropped. The tests count the tensors that autograd really saves.
    """
    width, h, q, kv = BYTES[plan.dtype], sizes.hidden, sizes.query, sizes.key_value
    on_cpu = plan.device == "cpu"
    adapted = sizes.adapted(plan.target_modules)
    lora = sum(m.copies * m.experts for m in adapted) / sizes.layers * plan.rank
    before_norms = sizes.norms * h + ((q + kv) if sizes.qk_norm else 0)
    mlp = (2 if _rebuilds(sizes, plan) else 4) * sizes.intermediate
    if sizes.routed:  # each visited expert gets a copy of the state and hands one back; A's output is made per visit
        mlp += 2 * sizes.routed * h
        lora = 7 * plan.rank * sizes.routed
    kept = 2 * h + 2 * q + 2 * kv + mlp
    scales = 4 * (sizes.heads + sizes.norms + (sizes.heads + kv // max(q // sizes.heads, 1) if sizes.qk_norm else 0))
    dropped = 0.0
    if plan.dropout:
        inputs = sum(m.inputs * m.copies * (sizes.routed if m.experts > 1 else 1) for m in adapted) / sizes.layers
        # The states behind the norms and the MLP's product are let go: a frozen layer does not need its input.
        kept += inputs - 2 * h - (0 if sizes.routed else sizes.intermediate)
        # A CPU keeps the float32 factors that were multiplied, a GPU a byte for each number.
        dropped = inputs * (4 if on_cpu else 1)
    elif on_cpu and width < 4 and not _fused(plan):
        # Every adapted layer of PEFT gets a copy of its input; the states behind the norms are kept in that form only.
        kept += 3 * h + q
    if not on_cpu:
        return width * (before_norms + kept + (lora if plan.dropout else 0)) + dropped + scales
    return 4 * before_norms + width * (kept + lora) + dropped + scales


def estimate(sizes: Sizes, plan: Plan) -> dict[str, float]:
    """Bytes of each part at the peak of a training step; their sum is the peak.

    On a CPU this is resident memory, on a GPU what `nvidia-smi` shows for the process.
    """
    width = BYTES[plan.dtype]
    tokens, depth = plan.tokens, sizes.layers
    trained = tokens if plan.trained is None else min(plan.trained, tokens)
    checked = plan.check_tokens or plan.longest or tokens
    share = min(plan.last_layers or depth, depth) / depth
    adapted = sizes.adapted(plan.target_modules)
    adapter = share * sum(m.lora(plan.rank) for m in adapted)

    if plan.load_in_4bit:
        packed = [nf4_bytes(m) for m in sizes.matrices]
        weights, constants = sum(p[0] for p in packed), sum(p[1] for p in packed)
    else:
        weights, constants = width * sum(m.size for m in sizes.matrices), 0

    per_layer = tokens * layer_bytes(sizes, plan)
    state = tokens * sizes.hidden * width
    in_mlp = 3 if plan.device == "cpu" and _rebuilds(sizes, plan) else 2
    backward = tokens * width * max(in_mlp * sizes.intermediate, 2 * sizes.query + 2 * sizes.key_value) + 2 * state
    trained_depth = depth * share
    if plan.gradient_checkpointing:
        offloaded = plan.device == "cuda" and state > UNSLOTH_OFFLOAD_FROM
        # Offloaded: the last layer's state stays, two buffers bring the others back.
        kept = min(3.0, trained_depth) if offloaded else trained_depth
        activations = kept * state + per_layer
    else:
        activations = trained_depth * per_layer
    chunk = min(LOSS_CHUNK, trained)
    in_float32 = min(chunk, LOSS_ROWS_ON_CPU) * 2 if plan.device == "cpu" else chunk
    loss = sizes.vocab * (chunk * width + 4 * in_float32) + 2 * trained * sizes.hidden * width + 2 * state
    if plan.gradient_checkpointing and plan.device == "cuda":
        # The loss is through before the first layer is made again.
        loss = max(0.0, loss - per_layer)
    # 4 bit: the matrix at hand is unpacked, into a buffer that stays and once more beside it.
    unpacked = 2 * width * sizes.largest_matrix if plan.load_in_4bit else 0
    step = activations + max(backward, loss) + unpacked
    # Before the first step two short rows go through the model's own forward, with the logits of every position.
    check = checked * sizes.vocab * width + chunk * sizes.vocab * 4 * CHECK_COPIES + unpacked
    parts = {
        "weights": weights,
        "quantization_constants": constants,
        "embeddings": width * (sizes.embedding + sizes.head),
        "norms": width * sizes.rest,
        "adapter": 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer": share * optimizer_bytes(plan.optim, adapted, plan.rank),
        "activations": activations,
        "backward": max(0.0, backward - loss),
        "loss": loss,
        "unpacked_weights": unpacked,
        "first_check": max(0.0, check - step),
        "context": PROCESS if plan.device == "cpu" else CONTEXT,
    }
    if plan.device == "cpu":
        # Recomputed layer by layer, the activations leave the same holes as if all of them had been kept.
        holes = SLACK["cpu"] if _fused(plan) else (SLACK_4BIT if plan.load_in_4bit else SLACK_DROPOUT)[plan.dtype]
        parts["slack"] = holes * (trained_depth * per_layer + backward)
    else:
        parts["slack"] = SLACK["cuda"] * max(step, check)
    return parts


def total(parts: dict[str, float]) -> float:
    """Peak in bytes."""
    return sum(parts.values())


def measured_part(parts: dict[str, float], device: str) -> float:
    """The bytes of `parts` that a run can see itself: a CUDA process does not see its context."""
    return total(parts) - (parts["context"] if device == "cuda" else 0)
