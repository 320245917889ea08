"""Files of a run that were edited, or that others wrote: a line says which entry is wrong, and nothing else happens."""

from __future__ import annotations

import copy
import json

import pytest

from finetune.errors import UserError
from finetune.evaluation.folder import archive_incomparable_scores
from finetune.evaluation.run import ResultsFile
from finetune.export.hub import read_scores
from finetune.runs.experiment import CONFIG, Experiment, folder_status
from finetune.runs.find import Run, find_run
from finetune.runs.model_card import model_card
from tests.fuzz_runs import ADAPTER
from tests.fuzz_runs import config as known_config
from tests.scored import item

METRICS = {"items": 2, "tool_name_accuracy": 0.5, "intervals_95": {"tool_name_accuracy": [0.1, 0.9]}, "settings": {}}


def write_run(folder, **changes):
    """A run folder with an adapter; `changes` are entries of the config, {"flags": {"rank": 8}} changes one flag."""
    config = copy.deepcopy(known_config())
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(config[name], dict)
        config[name] = config[name] | value if both else value
    (folder / "final_model").mkdir(parents=True)
    (folder / "final_model" / "adapter_config.json").write_text(json.dumps(ADAPTER), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": "none"}, "flags: 'none' is not of type 'object'"),
        ({"flags": {"max_seq_length": -5}}, "flags: max_seq_length must be"),
        ({"flags": {"max_seq_length": {"a": 1}}}, "max_seq_length cannot be"),
        ({"flags": {"rank": "many"}}, "flags: rank"),
        ({"base_model": {"name": "x"}}, "base_model"),
        ({"base_model": ""}, "base_model"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
        ({"format": {"name": 7}}, "format, name: 7 is not of type 'string'"),
        ({"result": {"final_loss": "low"}}, "result, final_loss"),
        ({"data": {"sequences": []}}, "data, sequences"),
        ({"data": {"trained_tokens": None}}, "data, trained_tokens"),
        ({"resumed": 3}, "resumed"),
    ],
)
def test_config_names_the_wrong_entry(changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        find_run(write_run(tmp_path / "run", **changes))
    assert message in str(error.value) and CONFIG in str(error.value) and "\n" not in str(error.value)


def test_deeply_nested_config(tmp_path):
    run = write_run(tmp_path / "run")
    (run / CONFIG).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="cannot read"):
        Experiment.open(run)
    assert folder_status(run) is None


def test_flags_of_an_earlier_version(tmp_path):
    """Flags that are absent have their defaults, numbers written as text are numbers, unknown flags stay."""
    run = write_run(tmp_path / "run", flags={"max_seq_length": "512", "an_old_flag": 1})
    config = json.loads((run / CONFIG).read_text("utf-8"))
    del config["flags"]["rank"]
    (run / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    opened = find_run(run).experiment.config["flags"]
    assert (opened["max_seq_length"], opened["rank"], opened["an_old_flag"], opened["alpha"]) == (512, 16, 1, 32)
    assert "alpha 32," in model_card(find_run(run).experiment)


@pytest.mark.parametrize(("entry", "name"), [("steps", "steps"), ("dtype", "dtype"), ("data", "sequences")])
def test_card_needs_its_entries(entry, name, tmp_path):
    run = write_run(tmp_path / "run", data={}, load_in_4bit=False)
    config = json.loads((run / CONFIG).read_text("utf-8"))
    config[entry] = {} if entry == "data" else config.pop(entry) and None
    config = {key: value for key, value in config.items() if value is not None}
    (run / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=f"has no entry '{name}'"):
        model_card(Experiment.open(run))


def scored_run(tmp_path, metrics):
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "finetuned_model_metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return Run(run, Experiment.open(run), run / "final_model")


def test_scores_are_read(tmp_path):
    scores, comparison = read_scores(scored_run(tmp_path, METRICS))
    assert scores == {"tuned": METRICS} and comparison.name == "comparison.md"


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        ({"settings": "x"}, "settings"),
        ({"tool_name_accuracy": "high"}, "tool_name_accuracy"),
        ({"bfcl_simple_accuracy": [1]}, "bfcl_simple_accuracy"),
        ({"intervals_95": {"tool_name_accuracy": 1}}, "intervals_95, tool_name_accuracy"),
        ({"intervals_95": {"tool_name_accuracy": [1]}}, "intervals_95, tool_name_accuracy"),
        ({"items": None}, "items"),
    ],
)
def test_scores_name_the_wrong_entry(changes, entry, tmp_path):
    with pytest.raises(UserError, match=rf"_metrics\.json, {entry}: .*score the run again"):
        read_scores(scored_run(tmp_path, METRICS | changes))


@pytest.mark.parametrize("metrics", [{"settings": ":", "data": {"items_sha256": "0"}}, [], {"settings": {}}])
def test_unreadable_scores_are_archived(metrics, tmp_path):
    path = tmp_path / "finetuned_model_metrics.json"
    path.write_text(json.dumps(metrics), encoding="utf-8")
    said = []
    archive_incomparable_scores(tmp_path, {"base": {"settings": {}, "data": {"items_sha256": "0"}}}, said.append)
    assert not path.exists() and "is now" in said[0]


@pytest.mark.parametrize(
    "changes", [{"text": None}, {"text": ["Done"]}, {"latency_s": "fast"}, {"latency_s": float("nan")}, {"item": ["a"]}]
)
def test_edited_answer_is_answered_again(changes, tmp_path):
    one = item()
    good = {"item": one.fingerprint(), "settings": "s", "text": "Done", "latency_s": 0.5}
    path = tmp_path / "base_model_results.jsonl"
    path.write_text(json.dumps(good | changes) + "\n", encoding="utf-8")
    results = ResultsFile(path, "s", [one])
    results.close()
    assert results.lines == {} and results.archived.is_file()
    path.write_text(json.dumps(good) + "\n", encoding="utf-8")
    results = ResultsFile(path, "s", [one])
    results.close()
    assert results.lines == {one.fingerprint(): good} and results.archived is None


@pytest.mark.parametrize("generation", [[{"tokens_per_second": [5.0]}], {"tokens_per_second": "fast"}, None])
def test_edited_speed_is_ignored(generation, tmp_path):
    from evaluate_lora import keep_speed

    path, cost = tmp_path / "base_model_metrics.json", {"generated_rows": 0, "tokens_per_second": None}
    path.write_text(json.dumps({"settings": {}, "generation": generation}), encoding="utf-8")
    assert keep_speed(cost, path, {}) == {"generation": cost}
    path.write_text(json.dumps({"settings": {}, "generation": {"tokens_per_second": 5.0}}), encoding="utf-8")
    assert keep_speed(cost, path, {})["tokens_per_second"] == 5.0
