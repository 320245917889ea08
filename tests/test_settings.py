"""Flags: one declaration, one value, from the line, a recipe or an earlier run."""

import json
import re
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.settings import FLAGS, build_parser, markdown, parse, read_config, resumed

ROOT = Path(__file__).resolve().parent.parent


def test_defaults_are_those_of_the_described_system():
    settings = parse([])
    assert settings.model == "kakaocorp/kanana-1.5-2.1b-instruct-2505"
    assert (settings.rank, settings.alpha, settings.lr, settings.epochs) == (16, 32, 2e-4, 3)
    assert (settings.batch_size, settings.grad_accum, settings.max_seq_length) == (4, 4, 9000)
    assert len(settings.dataset) == 3


def test_alpha_follows_rank_unless_given():
    assert parse(["--rank", "8"]).alpha == 16
    assert parse(["--rank", "8", "--alpha", "64"]).alpha == 64


def test_datasets_on_the_line_replace_the_default_and_add_up():
    assert parse(["--dataset", "a.jsonl", "b.jsonl", "--dataset", "c.jsonl"]).dataset == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]


def test_both_spellings_of_a_flag():
    settings = parse(["--batch-size", "2", "--grad_accum=8", "--no-share-prefix", "--no-load_in_4bit"])
    assert (settings.batch_size, settings.grad_accum) == (2, 8)
    assert settings.share_prefix is False
    assert settings.load_in_4bit is False


def test_line_wins_over_config_and_config_over_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 8\nlr: 3e-5\nepochs: 5\ndataset: rows.jsonl\ntarget_modules: [q_proj, v_proj]\n")
    settings = parse(["--config", str(recipe), "--rank", "64"])
    assert (settings.rank, settings.alpha, settings.lr, settings.epochs) == (64, 128, 3e-5, 5)
    assert settings.dataset == ["rows.jsonl"]
    assert settings.target_modules == ["q_proj", "v_proj"]


def test_an_experiment_config_is_a_config(tmp_path):
    stored = parse(["--rank", "4", "--dataset", "x.jsonl", "--max_steps", "7"]).run_flags()
    path = tmp_path / "experiment_config.json"
    path.write_text(json.dumps({"flags": stored, "status": "finished"}))
    assert parse(["--config", str(path)]).run_flags() == stored
    path.write_text(json.dumps({"flags": stored | {"name": "mine"}}))
    assert parse(["--config", str(path)]).name is None, "the run of that name is there already"
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
def test_bad_configs_name_file_and_key(tmp_path, text, wanted):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=wanted) as error:
        read_config(path)
    assert "bad.yaml" in str(error.value)


def test_configs_as_editors_save_them(tmp_path):
    for name, text in (("bom.json", '{"rank": 4}'), ("bom.yaml", "rank: 4\r\n"), ("merged.yaml", "&a\nrank: 4\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_config(tmp_path / name) == {"rank": 4}
    (tmp_path / "recipe.yaml").write_bytes(b"rank: 4  # \xff\n")
    with pytest.raises(UserError, match=r"recipe\.yaml is not UTF-8 text \(byte 11\)"):
        read_config(tmp_path / "recipe.yaml")
    (tmp_path / "twice.json").write_text('{"rank": 8, "rank": 16}')
    with pytest.raises(UserError, match="duplicate key 'rank'"):
        read_config(tmp_path / "twice.json")


def test_missing_config_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_config("nowhere.yaml")


@pytest.mark.parametrize(
    "line", ["--rank 0", "--lr -1", "--epochs 0", "--eval_fraction 1", "--batch_size x", "--frobnicate", "--lr nan",
             "--seed 4294967296", "--name a/b", "--name ..", "--name .hidden", "--name a\\b", f"--name {'x' * 201}",
             "--model= ", "--config=", "--dataset="],
)  # fmt: skip
def test_impossible_values_end_with_exit_code_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(line.split(" ", 1))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.split("[ =]", line)[0].strip("-") in said
    assert len(said.splitlines()) == 2, "what is wrong must not be lost below a list of fifty flags"


@pytest.mark.parametrize("name", ["a b", "모델 ☃", "lr=1e-4,rank=8", "x" * 200])
def test_names_of_runs(name):
    assert parse(["--name", name]).name == name


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("--load_best", "eval_dataset"), ("--early_stopping_patience 3", "eval_dataset"),
     ("--eval_fraction 0.1 --eval_dataset x", "exclude"),
     ("--eval_fraction .1 --load_best --save_steps 0", "checkpoints")],
)  # fmt: skip
def test_flags_that_contradict_each_other(line, wanted):
    with pytest.raises(UserError, match=wanted):
        parse(line.split())


def test_a_resumed_run_keeps_its_flags():
    stored = parse(["--rank", "4", "--dataset", "x.jsonl"]).run_flags()
    again = resumed(parse(["--resume", "run", "--rank", "4", "--tokens_per_pass", "512"]), stored, "run")
    assert again.rank == 4
    assert again.dataset == ["x.jsonl"]
    assert again.tokens_per_pass == 512
    with pytest.raises(UserError, match="--rank 8 differs"):
        resumed(parse(["--resume", "run", "--rank", "8"]), stored, "run")


def test_rows_of_a_resumed_run_may_lie_elsewhere_by_now():
    stored = parse(["--dataset", "x.jsonl", "--eval_dataset", "y.jsonl"]).run_flags()
    moved = ["--resume", "run", "--dataset", "/data/x.jsonl", "--eval_dataset", "/data/y.jsonl"]
    again = resumed(parse(moved), stored, "run")
    assert (again.dataset, again.eval_dataset) == (["/data/x.jsonl"], ["/data/y.jsonl"])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"rank": "many"}, "rank must be a positive int"),
        ({"scheduler": "magic"}, "scheduler must be one of cosine"),
        ({"of_another_version": 1}, "unknown flag 'of_another_version'"),
    ],
)
def test_what_a_stored_run_cannot_have_meant_is_named(flags, wanted):
    with pytest.raises(UserError, match=f"--resume run: its config: {wanted}"):
        resumed(parse(["--resume", "run"]), parse([]).run_flags() | flags, "run")
    text = resumed(parse(["--resume", "run"]), parse([]).run_flags() | {"rank": "4", "dataset": "x.jsonl"}, "run")
    assert (text.rank, text.dataset) == (4, ["x.jsonl"])


def test_resume_without_a_folder_means_the_newest_run():
    assert parse(["--resume"]).resume == "" and parse(["--resume", "run"]).resume == "run" and parse([]).resume is None


def test_every_declared_flag_is_read_somewhere():
    sources = [ROOT / "train_lora.py", *(ROOT / "finetune").rglob("*.py")]
    text = "\n".join(p.read_text(encoding="utf-8") for p in sources if p.name != "settings.py")
    own = (ROOT / "finetune" / "settings.py").read_text(encoding="utf-8")
    for flag in FLAGS:
        used = re.search(rf"settings\.{flag.name}\b", text) or re.search(rf'\["{flag.name}"\]', text)
        # --config is consumed where flags are parsed.
        assert used or (flag.name == "config" and 'given["config"]' in own), f"--{flag.name} is declared but never read"


def test_help_names_every_flag_with_its_default_and_has_examples():
    text = build_parser().format_help()
    for flag in FLAGS:
        assert f"--{flag.name}" in text
    assert "examples:" in text
    assert "(default: 9000)" in text


def test_the_flags_page_is_the_parser():
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m finetune.settings > docs/flags.md"
