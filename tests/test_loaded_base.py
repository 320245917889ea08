"""The base model as we load it computes what plain Transformers computes, before any adapter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import parts, plain_states
from tests.helpers import lazy
from tests.scripts import ROOT
from tests.tiny import tiny_llama

torch, transformers = lazy("torch"), lazy("transformers")

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMAS = {
    "llama": {},
    "no padding token, more embeddings than tokens": {"pad_token_id": None, "vocab_size": 49_280},
    "own head": {"tie_word_embeddings": False},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3 rope": {
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            **ORIGINAL},
    },
    "yarn rope": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}},
    "few positions": {"max_position_embeddings": 64},
    "float32 file in bfloat16": {},
}  # fmt: skip
OTHERS = {
    "mistral, sliding window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 8}),
    "granite": ("Granite", {"attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 2.0}),
}
DTYPES = {"float32 file in bfloat16": "bfloat16"}
# float32: another order of sums. bfloat16: rounding after each layer of another attention kernel.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: folder of its model with plain Transformers' outputs}."""
    tokenizer = parts.tokenizer("smollm2")
    made = {}
    for number, (case, changes) in enumerate(LLAMAS.items()):
        made[case] = tmp_path_factory.mktemp(f"llama{number}")
        tiny_llama(tokenizer, **changes).save_pretrained(made[case])
    for number, (case, (kind, changes)) in enumerate(OTHERS.items()):
        made[case] = tmp_path_factory.mktemp(f"other{number}")
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**SMALL, vocab_size=len(tokenizer), **changes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[case])
    for folder in made.values():
        tokenizer.save_pretrained(folder)
    arguments = [word for case, folder in made.items() for word in (str(folder), DTYPES.get(case, "float32"))]
    command = [sys.executable, "-m", "tests.plain_states", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return made


@pytest.mark.parametrize("case", [*LLAMAS, *OTHERS])
def test_loaded_base_is_the_plain_model(case, folders):
    from finetune.models.loading import load_base

    dtype = DTYPES.get(case, "float32")
    expected = torch.load(folders[case] / f"plain-{dtype}.pt", weights_only=True)
    for max_seq_length in (9000, None, 40) if case == "llama" else (9000,):
        loaded = load_base(str(folders[case]), dtype=dtype, load_in_4bit=False, max_seq_length=max_seq_length)
        found = plain_states.states(loaded.model.eval(), expected["ids"])
        for mine, plain in zip(
            (*found["states"], found["logits"]), (*expected["states"], expected["logits"]), strict=True
        ):
            difference = float((mine - plain).abs().max() / plain.abs().max())
            assert difference <= TOLERANCE[dtype], (max_seq_length, difference)


def test_stretched_positions_would_be_seen(folders):
    """The comparison notices what it is for: linear scaling of 1.1, as Unsloth would add for a longer limit."""
    expected = torch.load(folders["llama"] / "plain-float32.pt", weights_only=True)
    rope = {"rope_type": "linear", "factor": 1.1, "rope_theta": 1e4}
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"], rope_parameters=rope)
    found = plain_states.states(model.eval(), expected["ids"])
    assert float((found["states"][-1] - expected["states"][-1]).abs().max()) > 100 * TOLERANCE["float32"]
