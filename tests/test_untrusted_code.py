"""Files of others do not run code: trust_remote_code counts on the command line alone, and no export carries code."""

import contextlib
import json
import logging
import os
from argparse import Namespace

import pytest

import evaluate_lora
import export_lora
import train_lora
from finetune.errors import UserError
from finetune.export.adapter_files import copy_adapter
from finetune.models.remote_code import forget_code, has_own_code, strip_code
from finetune.runs.find import find_run
from finetune.settings import parse, read_config, resumed
from finetune.sweep.grid import fixed_flags, read_file
from tests import parts
from tests.exported import make_run

MARKER = "SANDWICH_TEST_MARKER"
CODE = f"""
import os
open(os.environ["{MARKER}"], "w").close()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class OwnConfig(PretrainedConfig):
    model_type = "own-code"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that exists once planted code has run."""
    monkeypatch.setenv(MARKER, str(tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.fixture
def planted(tmp_path, marker):
    """A run folder whose base model has its own code, and whose config trusts it."""
    run = make_run(tmp_path, data=False)
    base = tmp_path / "base"
    (base / "own.py").write_text(CODE)
    for name, entry in (
        ("config.json", {"model_type": "own-code", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    ):
        edit(base / name, **entry)
    config = json.loads((run / "experiment_config.json").read_text())
    config["flags"]["trust_remote_code"] = True
    (run / "experiment_config.json").write_text(json.dumps(config))
    return run


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_run_folder_does_not_run_its_code(planted, marker, caplog):
    with caplog.at_level(logging.WARNING, logger="sandwich"):
        run = find_run(planted)
    assert not run.trust_remote_code and "--trust_remote_code" in caplog.text
    with pytest.raises(UserError, match="--trust_remote_code"):
        run.load_tokenizer()
    assert not marker.exists()


def test_flag_runs_the_code_of_a_run(planted, marker):
    """The planted code is real: with the flag it runs, and no later save refers to it."""
    tokenizer, _ = find_run(planted, trust_remote_code=True).load_tokenizer()
    assert marker.exists()
    tokenizer.save_pretrained(planted / "saved")
    assert "auto_map" not in (planted / "saved" / "tokenizer_config.json").read_text()
    assert not list((planted / "saved").glob("*.py"))


def test_vllm_export_does_not_trust_the_config(tmp_path, planted, marker, capsys):
    assert export_lora.main([str(planted), "--to", "vllm"]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err and not marker.exists()


def test_recipe_cannot_turn_code_on(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text("trust_remote_code: true\nrank: 4\n")
    with caplog.at_level(logging.WARNING, logger="sandwich"):
        settings = parse(["--config", str(path)])
    assert not settings.trust_remote_code and settings.rank == 4
    assert "add --trust_remote_code" in caplog.text
    caplog.clear()
    assert parse(["--config", str(path), "--trust_remote_code"]).trust_remote_code
    assert not caplog.text


def test_experiment_config_cannot_turn_code_on(tmp_path):
    path = tmp_path / "experiment_config.json"
    path.write_text(json.dumps({"flags": {"trust_remote_code": True, "rank": 4}}))
    assert read_config(path) == {"rank": 4}


def test_resume_needs_the_flag_again(caplog):
    stored = parse(["--trust_remote_code"]).run_flags()
    assert stored["trust_remote_code"]
    with caplog.at_level(logging.WARNING, logger="sandwich"):
        assert not resumed(parse(["--resume", "run"]), stored, "run").trust_remote_code
    assert "--trust_remote_code" in caplog.text
    assert resumed(parse(["--resume", "run", "--trust_remote_code"]), stored, "run").trust_remote_code


@pytest.mark.parametrize(
    "section", ["train: {trust_remote_code: true}", "grid: {trust_remote_code: [true, false]}",
                "runs: [{trust_remote_code: true}]",
                "random: {count: 1, flags: {trust_remote_code: [true]}}"],
)  # fmt: skip
def test_sweep_file_cannot_turn_code_on(tmp_path, section):
    path = tmp_path / "sweep.yaml"
    path.write_text(section)
    with pytest.raises(UserError, match="counts only on the command line"):
        read_file(path)


def test_sweep_recipe_cannot_turn_code_on(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("trust_remote_code: true\nrank: 4\n")
    assert fixed_flags(["--config", str(path)]) == ({"rank": 4}, {})
    assert fixed_flags(["--config", str(path), "--trust_remote_code"])[1] == {"trust_remote_code": True}


def test_strip_code_cleans_a_model_folder(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"a": 1, "auto_map": {"AutoTokenizer": "x.Y"}}))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"auto_map": {"AutoConfig": "x.Y"}, "n": 2}}))
    (tmp_path / "x.py").write_text("1/0")
    strip_code(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"a": 1}
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": {"n": 2}}
    assert not (tmp_path / "x.py").exists()


def test_forget_code_before_a_save(tmp_path):
    tokenizer = parts.tokenizer("smollm2")
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["x.Y", None]}
    forget_code(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()


def test_adapter_copy_is_an_allow_list(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", ".env", "notes.txt", "x.py"):
        (adapter / name).write_text("{}")
    copy_adapter(adapter, tmp_path / "copy")
    copied = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert copied == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert "notes.txt, x.py" in capsys.readouterr().err


def test_adapter_copy_follows_no_link_outside(tmp_path):
    (tmp_path / "secret").write_text("s")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link to"):
        copy_adapter(adapter, tmp_path / "copy")
    (adapter / "vocab.json").unlink()
    (adapter / "merges.txt").write_text("inside")
    (adapter / "vocab.json").symlink_to("merges.txt")
    copy_adapter(adapter, tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.json").read_text() == "inside"


def test_hub_export_follows_no_link_outside(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "HF_TOKEN", "")
    run = make_run(tmp_path, data=False)
    (tmp_path / "secret").write_text('{"tool_name_accuracy": 1.0}')
    (run / "evaluation").mkdir()
    (run / "evaluation" / "finetuned_model_metrics.json").write_text("{}")
    (run / "evaluation" / "comparison.md").symlink_to(tmp_path / "secret")
    assert export_lora.main([str(run), "--to", "hub", "--output", str(tmp_path / "out")]) == 2
    assert "is a link to" in capsys.readouterr().err


def test_served_name_is_not_a_flag(tmp_path, capsys):
    run = make_run(tmp_path, data=False)
    assert export_lora.main([str(run), "--to", "vllm", "--name=--trust-remote-code"]) == 2
    assert "read as a flag" in capsys.readouterr().err


def test_served_name_is_quoted(tmp_path):
    run = make_run(tmp_path, data=False)
    name = "a; touch planted $(id)"
    assert export_lora.main([str(run), "--to", "vllm", "--name", name, "--output", str(tmp_path / "out")]) == 0
    assert f"'{name}=./adapter'" in (tmp_path / "out" / "serve.sh").read_text()


def test_model_with_own_code_is_known():
    """Transformers imports a repository's files as parts of the package transformers_modules."""
    config = type("Config", (), {"__module__": "transformers_modules.own.modeling"})()
    model = type("Model", (), {"config": config})()
    assert has_own_code(model)
    assert not has_own_code(type("Model", (), {"config": object()})())


@pytest.mark.parametrize(
    "name", ["final_model/README.md", "training.log", "evaluation/base_model_results.jsonl", "checkpoint-1", "exports"]
)
def test_run_folder_with_a_link_out_is_refused(tmp_path, name):
    """Files are written through links: an evaluation would have appended the model's answers to ~/.bashrc."""
    run = make_run(tmp_path, data=False)
    private = tmp_path / "bashrc"
    private.write_text("alias ll='ls -l'")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(os.path.relpath(private, (run / name).parent))
    with pytest.raises(UserError, match="is a link to"):
        find_run(run)
    assert evaluate_lora.main([str(run), "--dataset", str(private)]) == 2
    assert train_lora.main(["--resume", str(run)]) == 2
    assert private.read_text() == "alias ll='ls -l'"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with a name")
@pytest.mark.parametrize("name", ["training_log.csv", "final_model/chat_template.jinja"])
def test_run_folder_with_a_pipe_is_refused(tmp_path, name):
    run = make_run(tmp_path, data=False)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(UserError, match="is not a regular file"):
        find_run(run)


@pytest.mark.parametrize(
    "changes", [{"flags": "x"}, {"format": "chatml"}, {"format": {"name": ["a"]}}, {"flags": {"max_seq_length": "x"}},
                {"flags": {"max_seq_length": -1}}, {"flags": {"format": ["a"]}}, {"flags": {"rope_scaling": "{}"}},
                {"flags": None}],
)  # fmt: skip
def test_config_of_another_kind_is_refused(tmp_path, changes):
    config = {"flags": {"max_seq_length": 9, "format": "chatml"}, "base_model": "m", "format": {"name": "chatml"}}
    (tmp_path / "experiment_config.json").write_text(json.dumps(config | changes))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=r"experiment_config\.json"):
        find_run(tmp_path)


def test_links_inside_a_run_folder_and_to_it_are_fine(tmp_path):
    run = make_run(tmp_path, data=False)
    (run / "latest").symlink_to("final_model")
    (tmp_path / "link").symlink_to(run)
    assert find_run(tmp_path / "link").experiment is not None


def test_scores_are_not_written_through_a_link(tmp_path):
    """Of an adapter without a run, such as a download in the Hub's cache, whose files are links."""
    adapter, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    adapter.mkdir()
    elsewhere.mkdir()
    (elsewhere / "config").write_text("{}")
    (adapter / "adapter_config.json").symlink_to(elsewhere / "config")
    (adapter / "evaluation").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link to"):
        evaluate_lora.output_folder(Namespace(model=str(adapter), output=None, decisions=False))
    assert evaluate_lora.output_folder(Namespace(model=str(adapter), output=elsewhere, decisions=False)) == elsewhere


def test_scratch_folder_of_another_is_refused(tmp_path):
    from finetune.sweep.file_sync import private_folder

    own = private_folder(tmp_path)
    assert own.stat().st_mode & 0o777 == 0o700 and private_folder(tmp_path) == own
    own.chmod(0o777)
    with pytest.raises(UserError, match="others can write"):
        private_folder(tmp_path)
    own.rmdir()
    own.symlink_to(tmp_path / "planted")
    (tmp_path / "planted").mkdir()
    with pytest.raises(UserError, match="is a link"):
        private_folder(tmp_path)


@pytest.mark.parametrize(
    "expression",
    ["cycler.__init__.__globals__.os.open(path, 65)", "lipsum.__globals__['os'].open(path, 65)",
     "strftime_now.__globals__['__builtins__']['open'](path, 'w')", "''.__class__.__mro__[1].__subclasses__()",
     "raise_exception.__code__", "messages.append(1)", "messages[0].update(role='x')", "tools.clear()",
     "'{0.__class__.__init__.__globals__}'.format(strftime_now)", "messages[0]['get'].__self__.__class__"],
)  # fmt: skip
def test_template_runs_no_python(tmp_path, expression):
    """Both environments that render: ours, and the one that Transformers has."""
    from formats.rendering import render_template, sandboxed_environment

    path, messages, tools = tmp_path / "ran", [{"role": "user", "content": "a"}], [{"name": "b"}]
    known = {"messages": messages, "tools": tools, "path": str(path)}
    template = "{{ (" + expression + ") }}"
    for render in (
        lambda: sandboxed_environment().from_string(template).render(known),
        lambda: render_template(parts.tokenizer("smollm2"), template, messages, tools, False, path=str(path)),
    ):
        text = ""
        with contextlib.suppress(Exception):
            text = render()
        assert text == "" or not set(text) & set("<{'"), text
    assert not path.exists() and (messages, tools) == ([{"role": "user", "content": "a"}], [{"name": "b"}])


class Planted:
    """Creates the marker when it is unpickled."""

    def __reduce__(self):
        return open, (os.environ[MARKER], "w")


def test_adapter_that_is_a_pickle_is_refused(tmp_path, marker):
    import pickle

    from finetune.models.adapter import attach_adapter

    adapter = make_run(tmp_path, data=False) / "final_model"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        attach_adapter(None, adapter)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_planted_pickle_of_a_checkpoint_does_not_run(tmp_path, marker, name):
    """Its manifest may be valid: the hashes tell of damage, not of who wrote the file."""
    import torch

    from finetune.training.checkpoints import CheckpointMixin

    parameter = torch.nn.Parameter(torch.zeros(2))
    trainer = CheckpointMixin()
    trainer.optimizer = torch.optim.AdamW([parameter])
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    trainer.args = Namespace(process_index=0, world_size=1)
    states = {"python": 0, "numpy": 0, "cpu": 0}
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    torch.save(states, tmp_path / "rng_state.pth")
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    torch.save({"state": {}, "planted": Planted()}, tmp_path / name)
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert not marker.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert marker.exists()  # the pickle is real
