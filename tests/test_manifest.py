"""Manifests of checkpoints: damage that leaves sizes and headers as they were."""

import json
import math

import pytest

from finetune.runs.experiment import COUNTERS, find_resumable
from finetune.runs.manifest import MANIFEST, manifest_mismatch, write_manifest
from finetune.runs.run_log import COLUMNS, RunLog, counters_fault
from tests.test_experiment import make_run


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 2 and 4, each with a manifest."""
    experiment = make_run(tmp_path, "interrupted", [2, 4])
    for checkpoint in experiment.checkpoints():
        (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes() + bytes(range(256)) * 64)
        write_manifest(checkpoint)
    return experiment


def zero_4_kb(path):
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(min(4096, len(data)))
    path.write_bytes(data)


def flip_256_bytes(path):
    data = bytearray(path.read_bytes())
    for place in range(100, 356):
        data[place] ^= 0xFF
    path.write_bytes(data)


def add_key(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"planted": 1}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [("optimizer.pt", zero_4_kb), ("optimizer.pt", flip_256_bytes), ("adapter_config.json", add_key),
     ("trainer_state.json", add_key), (COUNTERS, add_key)],
)  # fmt: skip
def test_damaged_bytes_fall_back_to_the_older(run, name, damage, caplog):
    newest = run.folder / "checkpoint-4"
    damage(newest / name)
    assert find_resumable(str(run.folder), run.folder.parent)[1].name == "checkpoint-2"
    (line,) = [message for message in caplog.messages if "skipping" in message]
    assert f"checkpoint-4: its {name}" in line
    assert newest.is_dir()  # it is removed only once checkpoint-2 has loaded


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": {"size": "x"}}}'])
def test_damaged_manifest_is_damage(run, content):
    (run.folder / "checkpoint-4" / MANIFEST).write_text(content)
    assert find_resumable(str(run.folder), run.folder.parent)[1].name == "checkpoint-2"


def test_manifest_lists_every_file(run):
    newest = run.folder / "checkpoint-4"
    files = json.loads((newest / MANIFEST).read_text())["files"]
    assert set(files) == {path.name for path in newest.iterdir()} - {MANIFEST}
    assert manifest_mismatch(newest) is None
    (newest / "scheduler.pt").unlink()
    assert manifest_mismatch(newest) == "it has no scheduler.pt"


def test_checkpoint_without_manifest_is_skipped(run, caplog):
    (run.folder / "checkpoint-4" / MANIFEST).unlink()
    assert find_resumable(str(run.folder), run.folder.parent)[1].name == "checkpoint-2"
    assert f"checkpoint-4: it has no {MANIFEST}" in caplog.text


@pytest.mark.parametrize(
    ("state", "wanted"),
    [({"planted": 1}, "unknown key 'planted'"), ({"seconds": "x"}, "not a number"), ({"seconds": None}, "not a number"),
     ({"seconds": math.inf}, "not a number"), ({"tokens_seen": math.nan}, "not a number"),
     ({"step_losses": 10**400}, "not a number"), ({"pending_evaluation": 3}, "not a row"),
     ({"pending_evaluation": {"a": 1}}, "not a row")],
)  # fmt: skip
def test_planted_counters_are_damage(tmp_path, state, wanted):
    path = tmp_path / COUNTERS
    path.write_text(json.dumps(state))
    assert wanted in counters_fault(path)
    for other in ([], [{}], "x", 3, None):
        path.write_text(json.dumps(other))
        assert "not an object" in counters_fault(path)
    path.write_text(json.dumps(RunLog(None).state() | {"step_losses": math.nan}))  # of a run with --load_best
    assert counters_fault(path) is None


def test_stopped_evaluation_keeps_its_row(tmp_path):
    """The row of the step is written by the resumed run, with its eval_loss, and only once."""
    path = tmp_path / "training_log.csv"
    log = RunLog(path)
    log.start()
    log.add_step(loss_sum=2.0, tokens=4, trained_tokens=2, computed_tokens=4)
    log.log_row(step=1, epoch=0.5, learning_rate=0.1, grad_norm=1.0)
    log.evaluation_pending = True
    state = json.loads(json.dumps(log.state()))
    assert set(state["pending_evaluation"]) == set(COLUMNS)
    log.flush()  # as at the end of the interrupted run

    again = RunLog(path)
    again.restore(state)
    assert again.evaluation_pending
    again.start(resumed_at_step=1)
    again.log_eval(step=1, epoch=0.5, eval_loss=0.25)
    again.flush()
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert [row[:4] for row in rows] == [["1", "0.5", "1.0", "0.25"]]
