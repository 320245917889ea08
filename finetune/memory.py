"""How much memory a run needs, from the model's config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Numbers a decoder layer keeps per token for its backward pass, as multiples of its widths. Fitted to resident memory
# of Llama-shaped LoRA steps on a CPU: 8.0 GB for 2,664 packed tokens of SmolLM2-135M in float32.
ACTIVATIONS_PER_HIDDEN = 12
ACTIVATIONS_PER_INTERMEDIATE = 9
# What Python, torch and the libraries hold before the first weight, measured on a CPU.
PROCESS_GB = 0.9
LOGIT_CHUNK = 512


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder-only model. Grouped heads make key and value narrower than the hidden size."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the seven linear layers of a gated decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]


def activation_bytes_per_token(shape: Shape, dtype: str, gradient_checkpointing: bool) -> int:
    """Bytes one packed token holds until its backward pass."""
    layer = ACTIVATIONS_PER_HIDDEN * shape.hidden + ACTIVATIONS_PER_INTERMEDIATE * shape.intermediate
    numbers = shape.layers * shape.hidden + layer if gradient_checkpointing else shape.layers * layer
    return numbers * BYTES[dtype]


def estimate(
    shape: Shape, *, rank: int, dtype: str, load_in_4bit: bool, gradient_checkpointing: bool, tokens_per_pass: int
) -> dict[str, float]:
    """Parts of the peak in GB (10^9 bytes) and their total."""
    linear = shape.layers * sum(a * b for a, b in shape.linears())
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    adapter = shape.layers * sum(rank * (a + b) for a, b in shape.linears())
    # NF4 with double quantisation: 4 bits, and 8 bits + 1/256 of 32 bits of scale per 64 weights (QLoRA, section 3).
    linear_bytes = linear * (0.5 + 0.127 / 8) if load_in_4bit else linear * BYTES[dtype]
    parts = {
        "weights": linear_bytes + embeddings * BYTES[dtype],
        "adapter, gradients, AdamW": adapter * 4 * 4,
        "activations": tokens_per_pass * activation_bytes_per_token(shape, dtype, gradient_checkpointing),
        "logits": 2 * LOGIT_CHUNK * shape.vocab * 4,
    }
    parts = {name: size / 1e9 for name, size in parts.items()} | {"process": PROCESS_GB}
    return parts | {"total": sum(parts.values())}


def free_memory_gb() -> float:
    """Memory this process may still take: free CUDA memory on a GPU, available main memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    import psutil

    return psutil.virtual_memory().available / 1e9


def default_tokens_per_pass(
    shape: Shape, *, rank: int, dtype: str, load_in_4bit: bool, gradient_checkpointing: bool
) -> int:
    """The largest pass that leaves 40% of the free memory alone; an out-of-memory error halves it later if need be."""
    fixed = estimate(
        shape, rank=rank, dtype=dtype, load_in_4bit=load_in_4bit, gradient_checkpointing=gradient_checkpointing,
        tokens_per_pass=0,
    )["total"]  # fmt: skip
    room = 0.6 * free_memory_gb() - fixed
    tokens = int(room * 1e9 / activation_bytes_per_token(shape, dtype, gradient_checkpointing))
    return max(1024, min(tokens, 65_536))
