"""The positions and the vocabulary that a model was made for limit rows, evaluation, chat and exports."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from finetune.encoding.encode import encode_conversations
from finetune.encoding.options import EncodingOptions
from finetune.errors import UserError
from finetune.models import limits
from finetune.models.limits import LengthLimit, check_vocabulary, context_limit, model_positions
from finetune.runs.find import find_run
from finetune.training.data import check_report
from formats import get_format
from tests import parts
from tests.exported import make_run
from tests.helpers import lazy
from tests.tiny import tiny_llama

transformers = lazy("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("positions", "rope", "expected"),
    [
        (4096, None, 4096),
        (4096, LLAMA3, 4096),  # the larger number already includes the scaling
        (2048, YARN, 8192),  # the number before scaling
        (8192, YARN, 8192),  # the number after it
        (4096, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 4096),
    ],
)
def test_positions_of_a_config(positions, rope, expected):
    more = {"rope_parameters": rope} if rope else {}
    config = transformers.LlamaConfig(max_position_embeddings=positions, **more)
    assert model_positions(config) == expected


def test_models_without_positions_have_no_limit():
    assert model_positions(transformers.BloomConfig()) is None
    assert model_positions(transformers.GPT2Config(n_positions=1024)) == 1024
    assert model_positions(transformers.Gemma3Config(text_config={"max_position_embeddings": 640})) == 640


def test_limit_is_the_smaller_number():
    assert LengthLimit(9000, 4096).tokens == 4096 and LengthLimit(9000, 4096).is_lowered
    for positions in (9000, 32_768, None):
        assert LengthLimit(9000, positions).tokens == 9000 and not LengthLimit(9000, positions).is_lowered
    assert LengthLimit(9000, 4096).as_config() == {"max_seq_length": 4096, "model_positions": 4096}
    message = LengthLimit(9000, 4096).message("org/m")
    assert "limited to 4,096 tokens" in message and "org/m" in message and "9,000" in message


def row(words: int) -> dict:
    messages = [{"role": "user", "content": "word " * words}, {"role": "assistant", "content": "Yes."}]
    return {"messages": messages, "tools": []}


@pytest.mark.parametrize("overlong", ["drop", "trim_turns", "error"])
def test_rows_beyond_the_positions_are_counted(overlong):
    tokenizer = parts.tokenizer("smollm2")
    options = EncodingOptions(max_seq_length=9000, max_positions=128, overlong=overlong)
    if overlong == "error":
        with pytest.raises(UserError, match=r"row 2.*longer than the model's positions.*; use --overlong"):
            encode_conversations(
                [row(10), row(500)], tokenizer, get_format("chatml", tokenizer), options, progress=False
            )
        return
    encoded = encode_conversations(
        [row(10), row(500)], tokenizer, get_format("chatml", tokenizer), options, progress=False
    )
    assert encoded.report["reasons"] == {"longer than the model's positions": 1}
    assert encoded.report["max_seq_length"] == 128 and encoded.report["kept"] == 1
    assert [number for number, _ in encoded.left_out] == [1] and "> 128 tokens" in encoded.left_out[0][1]


def test_flag_below_the_positions_is_the_reason():
    tokenizer = parts.tokenizer("smollm2")
    encoded = encode_conversations(
        [row(500)],
        tokenizer,
        get_format("chatml", tokenizer),
        EncodingOptions(max_seq_length=100, max_positions=128),
        progress=False,
    )
    assert encoded.report["reasons"] == {"longer than max_seq_length": 1}


def test_lost_rows_name_a_remedy_that_helps():
    report = {"rows": 4, "kept": 1, "trained_tokens": 9, "reasons": {"longer than the model's positions": 3}}
    with pytest.raises(UserError, match="choose a model with more positions"):
        check_report(report, can_raise_limit=False)
    with pytest.raises(UserError, match="raise --max_seq_length"):
        check_report(report)


def test_context_of_a_loaded_model():
    config = transformers.LlamaConfig(max_position_embeddings=2048)
    assert context_limit(SimpleNamespace(config=config)) == 2048
    assert context_limit(SimpleNamespace(config=config, max_seq_length=512)) == 512
    assert context_limit(SimpleNamespace(config=transformers.BloomConfig())) is None


@pytest.mark.parametrize(("flag", "expected"), [(1024, 1024), (9000, 2048)])
def test_export_serves_at_most_the_positions(flag, expected, tmp_path):
    run = make_run(tmp_path, data=False)  # of a base with 2,048 positions
    config = json.loads((run / "experiment_config.json").read_text("utf-8"))
    config["flags"]["max_seq_length"] = flag
    (run / "experiment_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_run(run).max_length() == expected
    assert find_run(tmp_path / "base").max_length() is None  # no run, no limit but the model's own


def test_unsloth_gets_no_more_than_the_positions(tmp_path, monkeypatch):
    from finetune.models import loading

    tokenizer = parts.tokenizer("smollm2")
    model = tiny_llama(tokenizer, max_position_embeddings=2048, rope_parameters=YARN)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = []

    def from_pretrained(**flags):
        asked.append(flags["max_seq_length"])
        return model, None

    unsloth = SimpleNamespace(FastLanguageModel=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr(loading, "import_unsloth", lambda: unsloth)
    limits_of_model = []
    for limit in (1000, 9000, None):
        loaded = loading.load_base(str(tmp_path), dtype="float32", load_in_4bit=False, max_seq_length=limit)
        limits_of_model.append(context_limit(loaded.model))
    assert asked == [1000, 2048, 2048]  # never above max_position_embeddings, which it would stretch
    assert limits_of_model == [1000, 8192, 8192]  # the model's own YaRN allows more
    assert limits.MAX_DEFAULT_CONTEXT >= 8192


def test_larger_tokenizer_is_refused(tmp_path):
    from transformers import AutoTokenizer

    from finetune.settings import Settings
    from train_lora import load_format

    tokenizer = AutoTokenizer.from_pretrained(parts.FOLDERS["smollm2"]())
    rows = len(tokenizer)
    tiny_llama(tokenizer).save_pretrained(tmp_path)
    check_vocabulary(tokenizer, rows, "m")
    check_vocabulary(tokenizer, None, "m")
    tokenizer.add_tokens(["<|call|>", "<|result|>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"embeddings for {rows:,} \(none for <\|call\|>, <\|result\|>\)") as error:
        load_format(Settings(model=str(tmp_path), format="chatml"))
    assert "\n" not in str(error.value)


def test_placeholder_without_embedding_is_allowed():
    """Gemma 3's 1B model has the tokenizer of the multimodal ones, with one token more than embeddings."""
    vocabulary = {"a": 0, "<image>": 1}

    class Tokenizer:
        init_kwargs = {"image_token": "<image>"}  # noqa: RUF012

        def __len__(self):
            return len(vocabulary)

        def get_vocab(self):
            return vocabulary

    check_vocabulary(Tokenizer(), 1, "m")
    vocabulary["<other>"] = 2
    with pytest.raises(UserError, match="none for <other>"):
        check_vocabulary(Tokenizer(), 1, "m")


def test_encode_and_audit_know_the_positions(tmp_path, capsys, caplog):
    """A folder with a model's config beside its tokenizer; a tokenizer alone has no limit."""
    import prepare_data

    tokenizer = parts.tokenizer("smollm2")
    with_config, alone = tmp_path / "model", tmp_path / "tokenizer"
    for folder in (with_config, alone):
        tokenizer.save_pretrained(folder)
    transformers.LlamaConfig(max_position_embeddings=128, vocab_size=len(tokenizer)).save_pretrained(with_config)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(words)) + "\n" for words in (10, 500)), encoding="utf-8")
    flags = ["--format", "chatml"]
    for folder, warnings in ((with_config, ["sequence 1: longer than the model's 128 positions"]), (alone, None)):
        out = tmp_path / f"{folder.name}.jsonl"
        assert prepare_data.main(["encode", "--tokenizer", str(folder), *flags, str(rows), str(out)]) == 0
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [line.get("warnings") for line in lines] == [None, warnings]
        assert prepare_data.main(["audit", "--tokenizer", str(folder), *flags, str(rows)]) == 0
        assert ("warning: longer than the model's 128 positions" in capsys.readouterr().out) == bool(warnings)
    assert "1 row: longer than the model's 128 positions (first: row 2)" in caplog.text


@pytest.mark.parametrize("kind", ["vllm", "merged"])
def test_export_refuses_a_larger_tokenizer(kind, tmp_path, capsys):
    """Found before any weights are read: the run's own files are older than the base's tokenizer."""
    import export_lora

    run = make_run(tmp_path, data=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert export_lora.main([str(run), "--to", kind]) == 2
    error = capsys.readouterr().err
    assert "none for <|call|>" in error and "Traceback" not in error and not (run / "exports" / kind).exists()
