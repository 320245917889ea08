"""What a path names, and what is said of one that names nothing good; no model is loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import UserError
from finetune.models.adapter import attach_adapter
from finetune.models.faults import hub_errors
from finetune.models.loading import load_base, load_tokenizer
from finetune.runs.find import find_run
from tests import parts

CONFIG = {"flags": {"format": "chatml"}, "base_model": "base", "format": {"name": "chatml"}}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"notes.txt": ""}, "neither a run folder, an adapter nor a model"),
        ({"experiment_config.json": CONFIG}, "neither final_model/ nor a checkpoint"),
        ({"experiment_config.json": '{"flags": {'}, "cannot read"),
        ({"experiment_config.json": [CONFIG]}, "has no flags, base_model, format"),
        ({"experiment_config.json": {"flags": {}}, "final_model/adapter_config.json": {}}, "has no base_model, format"),
    ],
)
def test_wrong_folders(files, said, tmp_path):
    for name, value in files.items():
        write(tmp_path / "x" / name, value)
    with pytest.raises(UserError, match=said) as found:
        find_run(tmp_path / "x")
    assert str(tmp_path / "x") in str(found.value)


def test_a_file_and_a_name_that_cannot_be(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"README\.md is a file"):
        find_run("README.md")
    with pytest.raises(UserError, match="model no/such/folder is neither a folder nor a name that the Hub allows"):
        load_tokenizer("no/such/folder")


def test_a_model_without_its_tokenizer(tmp_path):
    from tests.tiny import tiny_llama

    tiny_llama(parts.tokenizer("smollm2")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded: Couldn't instantiate the backend tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("config", ['{"base', "[]", "{}", '{"base_model_name_or_path": null}'])
def test_a_stranger_s_adapter_that_names_no_base(config, tmp_path):
    write(tmp_path / "adapter_config.json", config)
    with pytest.raises(UserError, match="does not name the adapter's base model"):
        find_run(tmp_path).load_base()


def test_broken_weights_of_a_model_are_one_line(tmp_path):
    from safetensors.torch import load_file

    write(tmp_path / "model.safetensors", "half")
    with pytest.raises(UserError, match="model m cannot be loaded: "), hub_errors("m"):
        load_file(tmp_path / "model.safetensors")


def test_adapters_that_cannot_be_put_on_their_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_llama

    tokenizer = parts.tokenizer("smollm2")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(tokenizer), lora).save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text("utf-8"))
    write(tmp_path / "whole" / "adapter_config.json", config | {"base_model_name_or_path": str(tmp_path / "base")})
    tokenizer.save_pretrained(tmp_path / "base")
    assert find_run(tmp_path / "whole").load_tokenizer()[1].name == "chatml"  # the adapter has none of its own
    assert attach_adapter(tiny_llama(tokenizer), tmp_path / "whole").peft_config["default"].r == 4
    with pytest.raises(UserError, match=r"cannot be put on its base model: .*size mismatch"):
        attach_adapter(tiny_llama(tokenizer, hidden_size=32), tmp_path / "whole")
    weights = tmp_path / "whole" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be put on its base model: "):
        attach_adapter(tiny_llama(tokenizer), tmp_path / "whole")
    weights.rename(weights.with_suffix(".bin"))  # a pickle from strangers is not opened, whatever it is
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        attach_adapter(tiny_llama(tokenizer), tmp_path / "whole")


def test_a_merged_export_has_the_format_of_its_run(tmp_path):
    """Also one that no template tells: a format of the user's own."""
    own = tmp_path / "mine.yaml"
    own.write_text('start: "<call>"\nseparator: "|"\nend: "</call>"\ntools: system\n', encoding="utf-8")
    run, tokenizer = tmp_path / "run", parts.tokenizer("smollm2")
    write(run / "exports" / "merged" / "config.json", {})
    assert find_run(run / "exports" / "merged").format_for(tokenizer).name == "chatml"  # chosen by the tokenizer
    for name, flag in (("llama3-function", "llama3-function"), ("mine", str(own))):
        write(run / "experiment_config.json", {"flags": {"format": flag}, "base_model": "b", "format": {"name": name}})
        found = find_run(run / "exports" / "merged")
        assert found.adapter is None
        fmt = found.format_for(tokenizer)
        text = "<call>f|{}</call>" if name == "mine" else "<function=f>{}</function>"
        assert fmt.parse(text).tool_calls == [{"name": "f", "arguments": {}}]


def test_a_base_that_is_not_quantised_as_asked_is_said(monkeypatch, caplog):
    """Unsloth loads 16 bits where bitsandbytes' library has no kernels for the card, and only prints."""
    whole = SimpleNamespace(
        config=SimpleNamespace(), get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(1)),
    )  # fmt: skip
    loader = SimpleNamespace(from_pretrained=lambda **flags: (whole, None))
    monkeypatch.setattr("finetune.models.loading.import_unsloth", lambda: SimpleNamespace(FastLanguageModel=loader))
    loaded = load_base("smollm2-135m", dtype="bfloat16", load_in_4bit=True)
    assert not loaded.load_in_4bit
    assert "4-bit weights were asked for, but Unsloth has loaded bfloat16" in caplog.text
    caplog.clear()
    load_base("smollm2-135m", dtype="bfloat16", load_in_4bit=False)
    assert "4-bit" not in caplog.text
