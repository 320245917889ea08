"""What vLLM (0.32, 0.33) refuses when it starts, checked before an export is written."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from formats import Format

# Tokens without which the constructor of a tool-call parser raises.
PARSER_TOKENS = {
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
}
# Keys of adapter_config.json that PEFT applies and vLLM refuses, as its PEFTHelper does.
UNSUPPORTED = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
    "trainable_token_indices",
)  # fmt: skip
# Initializations after which the adapter's weights still belong to the unchanged base.
PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# The last two are copies of frozen embeddings, which vLLM skips.
KNOWN_WEIGHTS = (
    ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B",
    ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight",
)  # fmt: skip
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # valid values of --max-lora-rank


def loads_parser(parser: str, fmt: Format, vocabulary: Container[str]) -> bool:
    """Whether vLLM's parser starts with this vocabulary and reads the answers of `fmt`.

    Reasoning that the prompt has opened would be text of the answer. Where the vocabulary has [ARGS], `mistral`
    expects calls with it, takes an id before it for a part of the name, and reads no forced calls (a list).
    """
    if not all(token in vocabulary for token in PARSER_TOKENS.get(parser, ())) or fmt.opened_reasoning[0]:
        return False
    if parser != "mistral":
        return True
    version = fmt.template_kwargs.get("version")
    writes_args = version in ("v11", "v13") if version else "[ARGS]" in fmt.template
    return not writes_args and "[ARGS]" not in vocabulary


def max_lora_rank(rank: int) -> int:
    """The smallest valid --max-lora-rank for an adapter of this rank."""
    if rank > VLLM_RANKS[-1]:
        raise UserError(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, this one has {rank}; use --mode merged")
    return next(value for value in VLLM_RANKS if value >= rank)


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """UserError for an adapter that vLLM cannot serve beside its base; merged weights always can be."""
    reasons = [f"it uses {name}" for name in UNSUPPORTED if config.get(name)]
    if saved := sorted(set(config.get("modules_to_save") or ()) - {"classifier", "score"}):
        reasons.append(f"it has trained {', '.join(saved)} completely")
    if config.get("bias", "none") != "none":
        reasons.append(f"it has trained biases ({config['bias']})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITIALIZATIONS:
        reasons.append(f"its initialization {init} changes the base")
    if not reasons and (others := sorted(_other_weights(folder))):
        reasons.append(f"it holds {others[0]}{' and others' if len(others) > 1 else ''}, not weights of a LoRA layer")
    if reasons:
        raise UserError(f"vLLM does not serve the adapter {folder}: {'; '.join(reasons)}; use --mode merged")


def _other_weights(folder: Path) -> set[str]:
    """Names in adapter_model.safetensors that vLLM refuses, such as those of resized embeddings."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return set()
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name for name in file.keys() if not name.endswith(KNOWN_WEIGHTS)}  # noqa: SIM118
