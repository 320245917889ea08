"""What a path names, and the error messages for paths and models that cannot be used; no real model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from finetune.models.adapter import attach_adapter
from finetune.models.faults import hub_errors
from finetune.models.loading import load_base, load_tokenizer
from finetune.runs.find import find_run
from tests import parts
from tests.tiny import tiny_llama

CONFIG = {"flags": {"format": "chatml"}, "base_model": "base", "format": {"name": "chatml"}}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_adapter(folder):
    """An adapter of `tiny_llama`; returns the tokenizer."""
    from peft import LoraConfig, get_peft_model

    tokenizer = parts.tokenizer("smollm2")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(tokenizer), lora).save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": ""}, "neither a run folder, an adapter nor a model"),
        ({"experiment_config.json": CONFIG}, "neither final_model/ nor a checkpoint"),
        ({"experiment_config.json": '{"flags": {'}, "cannot read"),
        ({"experiment_config.json": [CONFIG]}, "has no flags, base_model, format"),
        ({"experiment_config.json": {"flags": {}}, "final_model/adapter_config.json": {}}, "has no base_model, format"),
    ],
)
def test_unusable_folder_is_refused(files, message, tmp_path):
    for name, value in files.items():
        write(tmp_path / "x" / name, value)
    with pytest.raises(UserError, match=message) as error:
        find_run(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


def test_file_and_invalid_hub_id_are_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"README\.md is a file"):
        find_run("README.md")
    with pytest.raises(UserError, match="no/such/folder: there is no such folder"):
        load_tokenizer("no/such/folder")


def test_model_without_tokenizer_is_refused(tmp_path):
    tiny_llama(parts.tokenizer("smollm2")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded: Couldn't instantiate the backend tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("config", ['{"base', "[]", "{}", '{"base_model_name_or_path": null}'])
def test_adapter_without_base_model_is_refused(config, tmp_path):
    write(tmp_path / "adapter_config.json", config)
    with pytest.raises(UserError, match="does not name the adapter's base model"):
        find_run(tmp_path).load_base()


def test_broken_weights_are_one_line(tmp_path):
    from safetensors.torch import load_file

    write(tmp_path / "model.safetensors", "half")
    with pytest.raises(UserError, match="model m cannot be loaded: "), hub_errors("m"):
        load_file(tmp_path / "model.safetensors")


def test_adapter_that_does_not_fit_is_refused(tmp_path):
    tokenizer = write_adapter(tmp_path / "complete")
    config = json.loads((tmp_path / "complete" / "adapter_config.json").read_text("utf-8"))
    write(tmp_path / "complete" / "adapter_config.json", config | {"base_model_name_or_path": str(tmp_path / "base")})
    tokenizer.save_pretrained(tmp_path / "base")
    assert find_run(tmp_path / "complete").load_tokenizer()[1].name == "chatml"  # the adapter has none of its own
    assert attach_adapter(tiny_llama(tokenizer), tmp_path / "complete").peft_config["default"].r == 4
    with pytest.raises(UserError, match=r"cannot be put on its base model: .*size mismatch"):
        attach_adapter(tiny_llama(tokenizer, hidden_size=32), tmp_path / "complete")
    weights = tmp_path / "complete" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be put on its base model: "):
        attach_adapter(tiny_llama(tokenizer), tmp_path / "complete")
    weights.rename(weights.with_suffix(".bin"))  # a pickle is never opened
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        attach_adapter(tiny_llama(tokenizer), tmp_path / "complete")


SLOW = r"([a-z_.\d]|[a-z])*[!?]"  # days for the name of a module


@pytest.mark.parametrize(
    "change",
    [{"r": 10**9}, {"r": "x"}, {"r": None}, {"r": 2}, {"r": -1}, {"lora_alpha": "x"}, {"target_modules": "((("},
     {"target_modules": 5}, {"target_modules": ["absent"]}, {"target_modules": ["q_proj", "k_proj"]},
     {"target_modules": SLOW}, {"exclude_modules": SLOW}, {"rank_pattern": {SLOW: 2}},
     {"rank_pattern": {"q_proj": 10**9}}, {"rank_pattern": [3]}, {"peft_type": "NONE"}, {"peft_type": ["LORA"]},
     {"peft_type": "PREFIX_TUNING"}, {"task_type": 5},
     {"modules_to_save": ["lm_head"]},
     {"layers_to_transform": [0]}, {"layers_to_transform": [99]}, {"megatron_config": {"a": 1}, "megatron_core": "os"},
     {"use_dora": True}, {"layer_replication": [[0, 2], [0, 2]]}, {"init_lora_weights": "nonsense"}, [], "x", None],
    ids=str,
)  # fmt: skip
def test_edited_adapter_config_is_refused(change, tmp_path, monkeypatch):
    """No traceback, no memory for a rank that the weights do not have, no adapter with random or unused weights."""
    monkeypatch.setattr("finetune.models.adapter.MAX_PATTERN_SECONDS", 0.05)
    tokenizer = write_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    write(path, json.loads(path.read_text("utf-8")) | change if isinstance(change, dict) else json.dumps(change))
    with pytest.raises(UserError, match="cannot be put on its base model: ") as caught:
        attach_adapter(tiny_llama(tokenizer), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_adapter_of_a_model_with_other_layers_is_refused(layers, tmp_path):
    """PEFT would drop the weights without a place, and leave modules without weights as they are."""
    tokenizer = write_adapter(tmp_path)
    with pytest.raises(UserError, match="its weights are of another model"):
        attach_adapter(tiny_llama(tokenizer, num_hidden_layers=layers), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"[" * 100_000], ids=["empty", "long", "bare", "text"]
)
def test_adapter_that_is_not_safetensors_is_refused(content, tmp_path):
    tokenizer = write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be put on its base model: "):
        attach_adapter(tiny_llama(tokenizer), tmp_path)


def test_merged_export_has_the_format_of_its_run(tmp_path):
    """Also a custom format, which no template identifies."""
    custom = tmp_path / "mine.yaml"
    custom.write_text('start: "<call>"\nseparator: "|"\nend: "</call>"\ntools: system\n', encoding="utf-8")
    run, tokenizer = tmp_path / "run", parts.tokenizer("smollm2")
    write(run / "exports" / "merged" / "config.json", {})
    assert find_run(run / "exports" / "merged").format_for(tokenizer).name == "chatml"  # chosen by the tokenizer
    for name, flag in (("llama3-function", "llama3-function"), ("mine", str(custom))):
        write(run / "experiment_config.json", {"flags": {"format": flag}, "base_model": "b", "format": {"name": name}})
        found = find_run(run / "exports" / "merged")
        assert found.adapter is None
        fmt = found.format_for(tokenizer)
        text = "<call>f|{}</call>" if name == "mine" else "<function=f>{}</function>"
        assert fmt.parse(text).tool_calls == [{"name": "f", "arguments": {}}]


def test_missing_quantization_is_reported(monkeypatch, caplog):
    """Where bitsandbytes has no kernels for the GPU, Unsloth loads 16-bit weights and only prints that."""
    import torch

    embeddings = SimpleNamespace(weight=torch.zeros(50_000, 1))
    model = SimpleNamespace(config=SimpleNamespace(), get_input_embeddings=lambda: embeddings, modules=lambda: [])
    loader = SimpleNamespace(from_pretrained=lambda **flags: (model, None))
    monkeypatch.setattr("finetune.models.loading.import_unsloth", lambda: SimpleNamespace(FastLanguageModel=loader))
    loaded = load_base("smollm2-135m", dtype="bfloat16", load_in_4bit=True)
    assert not loaded.load_in_4bit
    assert "4-bit weights were requested, but Unsloth loaded bfloat16" in caplog.text
    caplog.clear()
    load_base("smollm2-135m", dtype="bfloat16", load_in_4bit=False)
    assert "4-bit" not in caplog.text
