"""Flags of train_lora.py from the command line, a config and a stopped run."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.encoding.options import EncodingOptions
from finetune.errors import UserError
from finetune.settings import FLAGS, Settings, build_parser, markdown, parse, read_config, resumed

ROOT = Path(__file__).resolve().parent.parent


def test_defaults_are_the_published_setup():
    settings = parse([])
    assert settings.model == "kakaocorp/kanana-1.5-2.1b-instruct-2505"
    assert (settings.rank, settings.alpha, settings.lr, settings.epochs) == (16, 32, 2e-4, 3)
    assert (settings.batch_size, settings.grad_accum, settings.max_seq_length) == (4, 4, 9000)
    assert len(settings.dataset) == 3


def test_alpha_follows_rank_unless_given():
    assert parse(["--rank", "8"]).alpha == 16
    assert parse(["--rank", "8", "--alpha", "64"]).alpha == 64


def test_datasets_add_up_and_replace_the_default():
    given = parse(["--dataset", "a.jsonl", "b.jsonl", "--dataset", "c.jsonl"])
    assert given.dataset == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(parse([]).dataset) == 3


def test_both_spellings_of_a_flag():
    settings = parse(["--batch-size", "2", "--grad_accum=8", "--no-share-prefix", "--no-load_in_4bit"])
    assert (settings.batch_size, settings.grad_accum) == (2, 8)
    assert settings.share_prefix is False
    assert settings.load_in_4bit is False


def test_command_line_overrides_config(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 8\nlr: 3e-5\nepochs: 5\ndataset: rows.jsonl\ntarget_modules: [q_proj, v_proj]\n")
    settings = parse(["--config", str(recipe), "--rank", "64"])
    assert (settings.rank, settings.alpha, settings.lr, settings.epochs) == (64, 128, 3e-5, 5)
    assert settings.dataset == ["rows.jsonl"]
    assert settings.target_modules == ["q_proj", "v_proj"]


def test_experiment_config_is_a_config(tmp_path):
    stored = parse(["--rank", "4", "--dataset", "x.jsonl", "--max_steps", "7"]).run_flags()
    path = tmp_path / "experiment_config.json"
    path.write_text(json.dumps({"flags": stored, "status": "finished"}))
    assert parse(["--config", str(path)]).run_flags() == stored
    path.write_text(json.dumps({"flags": stored | {"name": "mine"}}))
    assert parse(["--config", str(path)]).name is None, "a run with this name exists"
    assert parse(["--config", str(path), "--name", "again"]).name == "again"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("rnak: 8\n", "did you mean rank"), ("rank: many\n", "rank must be"), ("rank: 0\n", "rank must be"),
     ("scheduler: cosinus\n", "one of cosine"), ("share_prefix: maybe\n", "true or false"), ("- 1\n", "mapping"),
     ("rank: {a: 1}\n", "rank cannot be"), ("rank: [1\n", "not valid YAML"), ("resume: x\n", "unknown flag"),
     ("rank: 8\nlr: 1\nrank: 16\n", "duplicate key 'rank'"), ("dataset: []\n", "dataset is an empty list"),
     ("dataset: [a.jsonl, null]\n", "dataset cannot be None"), ("model: ''\n", "model must not be empty"),
     ("name: ../up\n", "name must be a folder name"), ("seed: 4294967296\n", "seed must be")],
)  # fmt: skip
def test_bad_config_is_refused_with_file_and_key(tmp_path, text, wanted):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=wanted) as error:
        read_config(path)
    assert "bad.yaml" in str(error.value)


def test_config_encodings(tmp_path):
    for name, text in (("bom.json", '{"rank": 4}'), ("bom.yaml", "rank: 4\r\n"), ("merged.yaml", "&a\nrank: 4\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_config(tmp_path / name) == {"rank": 4}
    (tmp_path / "recipe.yaml").write_bytes(b"rank: 4  # \xff\n")
    with pytest.raises(UserError, match=r"recipe\.yaml is not UTF-8 text \(byte 11\)"):
        read_config(tmp_path / "recipe.yaml")
    (tmp_path / "twice.json").write_text('{"rank": 8, "rank": 16}')
    with pytest.raises(UserError, match="duplicate key 'rank'"):
        read_config(tmp_path / "twice.json")


def test_missing_config_is_refused():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rank 0", "argument --rank: must be an integer >= 1"),
        ("--batch_size x", "argument --batch_size: must be an integer >= 1"),
        ("--lr -1", "argument --lr: must be a number > 0, not '-1'"),
        ("--lr nan", "argument --lr: must be a number > 0, not 'nan'"),
        ("--eval_fraction 1", "argument --eval_fraction: must be a number >= 0 and < 1, not '1'"),
        ("--seed 4294967296", "argument --seed: must be an integer >= 0 and < 2**32"),
        ("--loraplus_lr_ratio inf", "argument --loraplus_lr_ratio: must be a number >= 1"),
        ("--name a/b", "argument --name: must be a folder name"),
        ("--name ..", "must be a folder name"),
        ("--name .hidden", "must be a folder name"),
        ("--name a\\b", "must be a folder name"),
        (f"--name {'x' * 201}", "must be a folder name"),
        ("--model= ", "argument --model: must not be empty"),
        ("--config=", "argument --config: must not be empty"),
        ("--dataset \udcff", "argument --dataset: must be UTF-8 text"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_value_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments.split(" ", 1))
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1 and errors.startswith("error: ")


@pytest.mark.parametrize("name", ["a b", "모델 ☃", "lr=1e-4,rank=8", "x" * 200])
def test_run_name_may_have_any_printable_character(name):
    assert parse(["--name", name]).name == name


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("--load_best", "eval_dataset"), ("--early_stopping_patience 3", "eval_dataset"),
     ("--eval_fraction 0.1 --eval_dataset x", "exclude"),
     ("--eval_fraction .1 --load_best --save_steps 0", "checkpoints"),
     ("--eval_fraction .1 --early_stopping_patience 2 --save_steps 0", "--no-load_best")],
)  # fmt: skip
def test_contradicting_flags_are_refused(line, wanted):
    with pytest.raises(UserError, match=wanted):
        parse(line.split())


def test_early_stopping_keeps_the_best_adapter():
    stops = ["--eval_fraction", ".1", "--early_stopping_patience", "2"]
    assert parse(stops).load_best is True
    assert parse([*stops, "--no-load_best", "--save_steps", "0"]).load_best is False
    assert parse(["--eval_fraction", ".1"]).load_best is False
    stored = parse([*stops, "--no-load_best"]).run_flags()
    assert resumed(parse(["--resume", "run"]), stored, "run").load_best is False


@pytest.mark.parametrize("longer", [["--epochs", "5"], ["--max_steps", "900"]])
def test_growing_a_run_names_the_way_that_works(longer):
    stored = parse(["--rank", "4"]).run_flags()
    with pytest.raises(UserError, match=r"--init_adapter run trains on from its adapter .*--force"):
        resumed(parse(["--resume", "run", *longer]), stored, "run")


def test_resumed_run_keeps_its_flags():
    stored = parse(["--rank", "4", "--dataset", "x.jsonl"]).run_flags()
    again = resumed(parse(["--resume", "run", "--rank", "4", "--tokens_per_pass", "512"]), stored, "run")
    assert again.rank == 4
    assert again.dataset == ["x.jsonl"]
    assert again.tokens_per_pass == 512
    with pytest.raises(UserError, match="--rank 8 differs"):
        resumed(parse(["--resume", "run", "--rank", "8"]), stored, "run")


def test_resume_lists_all_differences(caplog):
    stored = parse(["--rank", "4", "--dataset", "x.jsonl"]).run_flags()
    changed = ["--resume", "run", "--rank", "8", "--seed", "9"]
    with pytest.raises(UserError, match=r"--rank 8 .*4; --seed 9 .*; torch is 3, not the run's 2; .*--force"):
        resumed(parse(changed), stored, "run", ["torch is 3, not the run's 2"])
    again = resumed(parse([*changed, "--force"]), stored, "run", ["torch is 3, not the run's 2"])
    assert (again.rank, again.seed, again.dataset) == (8, 9, ["x.jsonl"])
    assert "--seed 9 differs" in caplog.text and "torch is 3" in caplog.text


def test_datasets_of_a_resumed_run_may_have_moved():
    stored = parse(["--dataset", "x.jsonl", "--eval_dataset", "y.jsonl"]).run_flags()
    moved = ["--resume", "run", "--dataset", "/data/x.jsonl", "--eval_dataset", "/data/y.jsonl"]
    again = resumed(parse(moved), stored, "run")
    assert (again.dataset, again.eval_dataset) == (["/data/x.jsonl"], ["/data/y.jsonl"])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"seed": 1.5}, "seed must be an integer >= 0"),
        ({"rank": "many"}, "rank must be an integer >= 1"),
        ({"scheduler": "magic"}, "scheduler must be one of cosine"),
        ({"of_another_version": 1}, "unknown flag 'of_another_version'"),
    ],
)
def test_bad_stored_flag_is_refused(flags, wanted):
    with pytest.raises(UserError, match=f"--resume run: its config: {wanted}"):
        resumed(parse(["--resume", "run"]), parse([]).run_flags() | flags, "run")


def test_stored_flags_are_converted():
    again = resumed(parse(["--resume", "run"]), parse([]).run_flags() | {"rank": "4", "dataset": "x.jsonl"}, "run")
    assert (again.rank, again.dataset) == (4, ["x.jsonl"])


def test_resume_takes_an_optional_folder():
    assert parse(["--resume"]).resume == "" and parse(["--resume", "run"]).resume == "run" and parse([]).resume is None


def test_every_flag_is_used():
    sources = [ROOT / "train_lora.py", *(ROOT / "finetune").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    encoding = {field.name for field in fields(EncodingOptions)}  # taken by name
    for flag in FLAGS:
        assert flag.name in encoding or re.search(rf'settings\.{flag.name}\b|\["{flag.name}"\]', code), (
            f"--{flag.name} is never used"
        )


def test_settings_are_typed():
    """The annotations are those that the flags are converted to."""
    settings = parse([])
    for flag in FLAGS:
        value, kind = getattr(settings, flag.name), flag.kind
        if flag.choices:
            assert value in (flag.choices if flag.default else (None, *flag.choices))
        elif value is not None:
            assert isinstance(value, list if flag.many else (int, float) if kind is float else kind), flag.name
    assert Settings(rank=4).alpha == 8


def test_help_has_every_flag_with_its_default():
    text = build_parser().format_help()
    for flag in FLAGS:
        assert f"--{flag.name}" in text
    assert "examples:" in text
    assert "(default: 9000)" in text


def test_flags_page_is_up_to_date():
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m finetune.settings > docs/flags.md"


def write_config(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return str(path)


def test_config_with_sections(tmp_path):
    """The names of Transformers and PEFT, in sections; what is for answers does not concern the run."""
    data = {
        "device": "cuda", "model": {"model_name": "a/b", "max_seq_length": 2048},
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "lora": {"r": 8, "lora_alpha": 16, "bias": "none", "task_type": "CAUSAL_LM"},
        "training": {"per_device_train_batch_size": 1, "learning_rate": "2e-4", "output_dir": "./out/mine",
                     "bf16": True},
        "optimization": {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"},
        "inference": {"adapter_path": "x", "generation": {"top_p": 0.9}, "questions": ["?"]},
    }  # fmt: skip
    assert read_config(write_config(tmp_path, data)) == {
        "model": "a/b", "max_seq_length": 2048, "load_in_4bit": True, "rank": 8, "alpha": 16.0, "batch_size": 1,
        "lr": 2e-4, "experiments_dir": "out", "name": "mine", "dtype": "bfloat16", "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit",
    }  # fmt: skip
    assert parse(["--config", write_config(tmp_path, data), "--rank", "4"]).rank == 4


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"lora": {"r": 8, "frobnicate": 1}}, "unknown entry lora.frobnicate; remove it"),
        ({"training": {"learning_rat": 1}}, "unknown entry training.learning_rat; did you mean learning_rate"),
        ({"inference": {"topp": 1}}, "unknown entry inference.topp; known: adapter_path"),
        ({"lora": {"r": 8}, "rank": 4}, "rank and lora.r both set rank"),
        ({"lora": {"bias": "all"}}, "lora.bias can only be none"),
        ({"lora": {"r": 0}}, "config.json, lora.r: rank must be an integer"),
        ({"training": {"evaluation_strategy": "epoch"}}, "training.evaluation_strategy can only be steps"),
        ({"lora": {"r": {"x": 1}}}, "lora.r: rank cannot be"),
        ({"lora": {}, "training": 5}, "unknown entry training"),
    ],
)
def test_bad_sections_are_refused_by_name(tmp_path, data, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)):
        read_config(write_config(tmp_path, data))


def test_evaluation_rows_of_the_command_line_replace_those_of_the_config(tmp_path):
    config = write_config(tmp_path, {"eval_fraction": 0.1, "dataset": "a.jsonl"})
    chosen = parse(["--config", config, "--eval_dataset", "b.jsonl"])
    assert (chosen.eval_dataset, chosen.eval_fraction) == (["b.jsonl"], 0.0)
    with pytest.raises(UserError, match="exclude each other"):
        parse(["--config", config, "--eval_dataset", "b.jsonl", "--eval_fraction", "0.2"])
