"""Model sizes: the matrices and widths of a decoder-only model, from its config.json or a number of parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

# Published shapes (config.json of SmolLM2, Qwen2.5, Mistral v0.3, Llama 3.1) that --model-size starts from: hidden,
# intermediate, layers, heads, key/value heads, head width, vocabulary, tied. The comment is the size in billions.
KNOWN_SHAPES = (
    (576, 1536, 30, 9, 3, 64, 49_152, True),  # 0.135
    (896, 4864, 24, 14, 2, 64, 151_936, True),  # 0.49
    (1536, 8960, 28, 12, 2, 128, 151_936, True),  # 1.5
    (2048, 11_008, 36, 16, 2, 128, 151_936, True),  # 3.1
    (4096, 14_336, 32, 32, 8, 128, 32_768, False),  # 7.2
    (4096, 14_336, 32, 32, 8, 128, 128_256, False),  # 8.0
    (5120, 13_824, 48, 40, 8, 128, 152_064, False),  # 14.8
    (5120, 27_648, 64, 40, 8, 128, 152_064, False),  # 32.8
    (8192, 28_672, 80, 64, 8, 128, 128_256, False),  # 70.6
)
# The linear layers that Unsloth adapts for all-linear, by the last part of their name.
ALL_LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
                        "qkv_proj"})  # fmt: skip
MAX_LAYERS = 1000  # published models have up to about 130; building 100,000 layers takes minutes


@dataclass(frozen=True)
class Matrix:
    """`copies` frozen matrices [outputs, inputs] with one name. experts > 1: each copy stacks that many matrices."""

    name: str
    inputs: int
    outputs: int
    copies: int
    experts: int = 1

    @property
    def size(self) -> int:
        """Number of weights in all copies."""
        return self.inputs * self.outputs * self.copies * self.experts

    def lora(self, rank: int) -> int:
        """Number of weights in LoRA's A [rank, inputs] and B [outputs, rank]; PEFT adapts each expert separately."""
        return rank * (self.inputs + self.outputs) * self.copies * self.experts


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder-only model.

    hidden, query, key_value, intermediate: widths of the residual stream, of the outputs of q_proj and k_proj, and of
        the MLP's inner activations for one token (summed over its experts)
    matrices: the linear layers inside the decoder layers
    embedding, head, rest: parameters of the input embedding, of the lm_head (0 when tied to the embedding), and of
        everything that is never quantized: norms, biases, routers
    norms: RMSNorms per layer on the residual stream; qk_norm: whether query and key are normalized too
    routed: experts per token (0 for a dense model)
    silu_gated: whether the MLP is down(silu(gate) * up), for which a CPU run keeps fewer activations
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int
    key_value: int
    vocab: int
    matrices: tuple[Matrix, ...]
    embedding: int
    head: int
    rest: int
    norms: int = 2
    qk_norm: bool = False
    routed: int = 0
    max_positions: int | None = None
    silu_gated: bool = False

    @property
    def parameters(self) -> int:
        return sum(m.size for m in self.matrices) + self.embedding + self.head + self.rest

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest matrix that is dequantized at a time (one expert of a stack)."""
        return max((m.inputs * m.outputs for m in self.matrices), default=0)

    def adapted(self, target_modules: Iterable[str] = ("all-linear",)) -> list[Matrix]:
        """The matrices that get a LoRA adapter."""
        names = set(target_modules)
        if names == {"all-linear"}:
            found = [m for m in self.matrices if m.name in ALL_LINEAR]
            return found or list(self.matrices)
        fused = {"gate_up_proj"} if names & {"gate_proj", "up_proj"} else set()
        return [m for m in self.matrices if m.name in names | fused]


def sizes_of_name(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Sizes:
    """Sizes of a model folder or Hub id; reads only its config.json. Raises UserError if missing or not supported."""
    from finetune.models.loading import load_config

    return sizes_of_config(load_config(name, revision, trust_remote_code))


def sizes_of_config(config: Any) -> Sizes:
    """Sizes of the model of a Transformers config. Raises UserError unless it is a causal language model."""
    check_trainable(config)
    model = model_without_weights(config)
    try:
        return sizes_of_model(model)
    except Exception as error:  # third-party configs fail with any exception
        raise _cannot_be_measured(config, error) from error


def check_trainable(config: Any) -> None:
    """Raises UserError for an encoder and for an implausible number of layers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if bidirectional or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type {config.model_type!r} is an encoder, which cannot generate text; choose a causal language "
            "model (Llama, Qwen, Mistral, Gemma …)"
        )
    layers = getattr(getattr(config, "text_config", None) or config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise UserError(f"config.json: num_hidden_layers {layers} must be <= {MAX_LAYERS}; download the model again")


def model_without_weights(config: Any) -> Any:
    """The model on torch's meta device: modules and shapes, no weights. Raises UserError when it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config.get_text_config())
    except Exception as error:
        raise _cannot_be_measured(config, error) from error


def _cannot_be_measured(config: Any, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
    return UserError(f"model type {config.model_type!r} cannot be measured: {reason}; give --model-size")


def sizes_of_model(model: Any) -> Sizes:
    """Sizes of a loaded model, with or without an adapter, in 16 bit or 4 bit."""
    from torch.nn import Embedding

    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = model.config.get_text_config()
    head_module, input_embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head_module is not None and head_module.weight is input_embedding.weight
    tied = tied or bool(getattr(config, "tie_word_embeddings", False))  # meta tensors are not tied yet
    head = 0 if tied or head_module is None else math.prod(head_module.weight.shape)
    matrices: Counter[tuple[str, int, int, int]] = Counter()
    embedding = rest = norms = 0
    qk_norm = False
    for path, module in model.named_modules():
        if ".lora_" in path:
            continue
        name = path.removesuffix(".base_layer").rsplit(".", 1)[-1]
        qk_norm |= name == "q_norm"
        for key, parameter in module.named_parameters(recurse=False):
            shape = _unpacked_shape(parameter)
            if module is head_module and key == "weight":
                continue
            if isinstance(module, Embedding):
                embedding += math.prod(shape)
            elif key == "weight" and len(shape) == 2 and hasattr(module, "in_features"):
                matrices[name, module.in_features, module.out_features, 1] += 1
            elif key == "weight" and len(shape) == 2 and hasattr(module, "nf"):  # GPT-2's Conv1D: [inputs, outputs]
                matrices[name, *shape, 1] += 1
            elif len(shape) == 3:  # the experts of a layer in one tensor
                experts, outputs, inputs = shape
                matrices[key, inputs, outputs, experts] += 1
            elif not key.startswith("lora_"):
                rest += math.prod(shape)
                norms += "norm" in name and key == "weight" and shape == (config.hidden_size,)
    heads = getattr(config, "num_attention_heads", None) or 1
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    routed = next((n for key in ("num_experts_per_tok", "moe_top_k", "top_k_experts")
                   if (n := getattr(config, key, None))), 0)  # fmt: skip
    return Sizes(
        hidden=config.hidden_size,
        intermediate=_mlp_width(config, routed),
        layers=config.num_hidden_layers,
        heads=heads,
        query=heads * head_width,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        vocab=config.vocab_size,
        matrices=tuple(Matrix(*key[:3], copies, key[3]) for key, copies in matrices.items()),
        embedding=embedding,
        head=head,
        rest=rest,
        norms=max(2, norms // config.num_hidden_layers),
        qk_norm=qk_norm,
        routed=routed,
        max_positions=getattr(config, "max_position_embeddings", None),
        silu_gated={"gate_proj", "up_proj", "down_proj"} <= {key[0] for key in matrices}
        and getattr(config, "hidden_act", None) in ("silu", "swish"),
    )


def _unpacked_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before bitsandbytes packed it."""
    state = getattr(parameter, "quant_state", None)
    return tuple(state.shape if state is not None else parameter.shape)


def _mlp_width(config: Any, routed: int) -> int:
    """Width of the MLP's inner activations for one token: summed over its experts in a mixture of experts."""
    dense = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    if isinstance(dense, list):
        dense = max(dense)
    if not routed:
        return dense
    expert = getattr(config, "moe_intermediate_size", None) or dense
    if isinstance(expert, list):
        expert = max(expert)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared is None:
        shared = (getattr(config, "n_shared_experts", None) or 0) * expert
    return routed * expert + shared


def sizes_of_billions(billions: float) -> Sizes:
    """A Llama-like model of that many parameters (10^9): the nearest published shape, scaled to that number."""
    if not 0.002 <= billions <= 2000:
        raise UserError(f"--model-size {billions:g}: must be the number of parameters in billions, such as 7.0")
    parameters = billions * 1e9
    shapes = [dense_sizes(*shape) for shape in KNOWN_SHAPES]
    near, shape = min(zip(shapes, KNOWN_SHAPES, strict=True), key=lambda s: abs(math.log(s[0].parameters / parameters)))
    hidden, intermediate, layers, heads, kv_heads, width, vocab, tied = shape
    outside = near.embedding + near.head
    if parameters < 1.5 * outside:  # a tiny model has a small vocabulary
        vocab = max(1000, int(parameters / 3 / hidden))
        outside = vocab * hidden * (1 if tied else 2)
    ratio = (parameters - outside) / (near.parameters - near.embedding - near.head)
    if not 0.6 < ratio < 1.7:
        layers = max(1, round(layers * ratio))
    in_layer = (parameters - outside) / layers - 2 * hidden * (heads + kv_heads) * width - 2 * hidden
    intermediate = max(hidden // 8, round(in_layer / (3 * hidden)))
    return dense_sizes(hidden, intermediate, layers, heads, kv_heads, width, vocab, tied)


def dense_sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, width: int, vocab: int, tied: bool
) -> Sizes:
    """A Llama-like model: grouped-query attention, gated MLP, no biases, two RMSNorms per layer and a final one."""
    query, key_value = heads * width, kv_heads * width
    shapes = {
        "q_proj": (hidden, query), "k_proj": (hidden, key_value), "v_proj": (hidden, key_value),
        "o_proj": (query, hidden), "gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }  # fmt: skip
    return Sizes(
        hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, query=query, key_value=key_value,
        vocab=vocab, matrices=tuple(Matrix(name, *shape, layers) for name, shape in shapes.items()),
        embedding=vocab * hidden, head=0 if tied else vocab * hidden, rest=(2 * layers + 1) * hidden,
        silu_gated=True,
    )  # fmt: skip
