"""A random Llama of two small layers for a real tokenizer, where the text it generates does not matter."""

from __future__ import annotations

from typing import Any


def tiny_llama(tokenizer: Any, **changes: Any) -> Any:
    """A LlamaForCausalLM, the same weights at every call; `changes` are entries of its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config | changes))
