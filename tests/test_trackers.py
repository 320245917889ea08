"""A resumed run continues its tracker run: no second one, no step twice. Each with the real package, if installed."""

import json
import shutil
import sqlite3
import struct
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from tests.helpers import lazy
from tests.training_runs import conversation, run, write_rows, write_tiny_model

trackers = lazy("finetune.training.tracker_run")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    write_rows(folder / "rows.jsonl", [conversation(number) for number in range(8)])
    return write_tiny_model(folder / "model"), folder / "rows.jsonl"


def tracked_twice(tracker, inputs, folder, **variables):
    """A run of 4 steps, resumed at step 2 as if it had been killed after step 4; returns its folder."""
    model, rows = inputs
    arguments = ("--model", model, "--dataset", rows, "--eval_dataset", rows, "--eval_steps", 2, "--save_steps", 2,
                 "--max_steps", 4, "--rank", 4, "--format", "chatml", "--experiments_dir", folder, "--name", "run",
                 "--report_to", tracker)  # fmt: skip
    whole = run(*arguments, env=variables)
    assert whole.returncode == 0, whole.stderr
    shutil.rmtree(folder / "run" / "checkpoint-4")
    shutil.rmtree(folder / "run" / "final_model")
    resumed = run("--resume", folder / "run", env=variables)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stderr
    return folder / "run"


def test_tensorboard(inputs, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tracked_twice("tensorboard", inputs, tmp_path)
    found = events.EventAccumulator(str(folder / "runs"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars("eval/loss")] == [2, 4]
    means = [event.value for event in found.Scalars("train/train_loss")]
    assert len(means) == 2 and means[0] == pytest.approx(means[1], rel=1e-4)
    assert "parameters/text_summary" in found.Tags()["tensors"]


def test_mlflow(inputs, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracked_twice("mlflow", inputs, tmp_path, MLFLOW_TRACKING_URI=address)
    client = mlflow.MlflowClient(tracking_uri=address)
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 4]
    known = found.data.params
    assert (known["rank"], known["alpha"], known["data"], known["format"]) == ("4", "8", "rows.jsonl", "chatml")


def test_trackio(inputs, tmp_path):
    """Two runs of one name, in two folders: two runs of the tracker, each continued by its own resume."""
    pytest.importorskip("trackio")
    for folder in ("one", "two"):
        tracked_twice("trackio", inputs, tmp_path / folder, TRACKIO_DIR=str(tmp_path / "trackio"))
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [(name, json.loads(row)) for name, row in database.execute("SELECT run_name, metrics FROM metrics")]
        configs = [json.loads(row[0]) for row in database.execute("SELECT config FROM configs")]
    names = {json.loads((tmp_path / folder / "run" / "tracker.json").read_text())["run"] for folder in ("one", "two")}
    assert len(names) == 2 and all(name.startswith("run ") for name in names)
    for name in names:
        steps = sorted(one["train/global_step"] for of, one in rows if of == name and "train/loss" in one)
        assert steps == [1, 2, 3, 4]
    assert [(one["rank"], one["alpha"], one["format"]) for one in configs] == [(4, 8, "chatml")] * 2


def test_wandb(inputs, tmp_path):
    pytest.importorskip("wandb")
    tracked_twice("wandb", inputs, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    starts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    ids = {path.name.rsplit("-", 1)[-1] for path in starts}
    assert starts and len(ids) == 1
    assert json.loads((tmp_path / "run" / "tracker.json").read_text())["run"] in ids
    rows = [row for folder in starts for row in wandb_rows(next(folder.glob("*.wandb")))]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["train/global_step"] for row in rows if "eval/loss" in row] == [2, 4]
    assert [row["_step"] for row in rows] == list(range(len(rows)))  # W&B's server drops a number that it has


def wandb_rows(path):
    """The rows of an offline run: protocol buffers in LevelDB's log format, blocks of 32 KB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            found = Record.FromString(record)
            record = b""
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_vanished_run_folder_is_not_made_again(tmp_path):
    """By the tracker's own file; its error is the run's, not one of the tracker."""
    pytest.importorskip("tensorboard")
    callback = trackers.tracker_callback("tensorboard", SimpleNamespace(folder=tmp_path / "gone"))
    callback.path, callback.record = tmp_path / "gone" / "tracker.json", {}
    with pytest.raises(UserError, match="has disappeared"), callback.guarded():
        callback.write()
    assert not (tmp_path / "gone").exists()


def test_tracker_that_is_down_costs_a_warning(inputs, tmp_path, monkeypatch):
    """A tracker's package whose server does not answer: the run finishes, with one line about it."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(
        "__version__ = '1'\ndef init(**_):\n    raise OSError('no route to http://u:p@ss@host/x')"
    )
    model, rows = inputs
    arguments = ("--model", model, "--dataset", rows, "--max_steps", 2, "--format", "chatml", "--report_to", "trackio",
                 "--experiments_dir", tmp_path, "--name", "run")  # fmt: skip
    done = run(*arguments, fresh=True, env={"PYTHONPATH": str(tmp_path / "packages")})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trackio failed (no route to http://***@host/x); the run continues without it") == 1
    assert "p@ss" not in (tmp_path / "run" / "training.log").read_text()
    assert "Traceback" not in done.stderr


def test_parameters_have_no_folders():
    flags = {"rank": 4, "alpha": 8, "use_rslora": False, "dropout": 0.0, "target_modules": ["all-linear"],
             "dataset": ["/home/ann/rows.jsonl*0.5", "org/name@train"], "eval_dataset": None}  # fmt: skip
    config = {"flags": flags, "base_model": "/home/ann/model", "format": {"name": "qwen"}, "data": {"fingerprint": "f"}}
    found = trackers.parameters(config)
    assert found["data"] == "rows.jsonl*0.5 org/name@train" and found["base_model"] == "model"
    assert not [value for value in found.values() if "ann" in str(value)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tracker": "wandb"}', '{"tracker": "mlflow", "sent": {"loss": "x"}}',
             '{"tracker": "mlflow", "sent": 5}', '{"tracker": "mlflow", "rows": "x"}'],
)  # fmt: skip
def test_damaged_state_starts_a_new_tracker_run(tmp_path, text):
    (tmp_path / "tracker.json").write_text(text)
    assert trackers.read_state(tmp_path / "tracker.json", "mlflow") == {}


def test_own_variables_win(monkeypatch):
    import os

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    with trackers.environment({"WANDB_RUN_ID": "recorded", "WANDB_RESUME": "allow"}):
        assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("mine", "allow")
    assert "WANDB_RESUME" not in os.environ
