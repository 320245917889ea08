"""Experiment folders: their names, their atomic birth, their log."""

import json
import os
import threading
from datetime import datetime

import pytest

from finetune.errors import UserError
from finetune.experiment import CONFIG, Experiment, check_writable, find_resumable, run_name
from finetune.run_log import COLUMNS, RunLog, read_rows

WHEN = datetime(2025, 12, 18, 14, 30, 22)


@pytest.mark.parametrize(
    ("model", "rank", "alpha", "lr", "epochs", "wanted"),
    [
        ("kakaocorp/kanana-1.5-2.1b-instruct-2505", 16, 32, 2e-4, 3,
         "kanana_1.5_2.1b_instruct_2505_r16_a32_lr2em04_ep3_20251218_143022"),
        ("Qwen/Qwen2.5-3B-Instruct", 8, 16, 1.5e-5, 0.5, "Qwen2.5_3B_Instruct_r8_a16_lr1.5em05_ep0.5_20251218_143022"),
        ("/models/my model/", 4, 8, 1, 1, "my_model_r4_a8_lr1ep00_ep1_20251218_143022"),
    ],
)  # fmt: skip
def test_run_names(model, rank, alpha, lr, epochs, wanted):
    assert run_name(model, rank, alpha, lr, epochs, WHEN) == wanted


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    made = []

    def create():
        made.append(Experiment.create(tmp_path, "run", {"who": threading.get_ident()}, exact_name=False).folder)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in made) == sorted(["run", *(f"run_{i}" for i in range(2, 9))])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in made)
    assert all((p / CONFIG).is_file() for p in made)


def test_a_named_run_is_never_overwritten(tmp_path):
    first = Experiment.create(tmp_path, "mine", {"a": 1}, exact_name=True)
    with pytest.raises(UserError, match="exists already"):
        Experiment.create(tmp_path, "mine", {"a": 2}, exact_name=True)
    assert Experiment.open(first.folder).config == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--experiments_dir"):
        check_writable(tmp_path / "experiments")


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "experiments").write_text("")
    with pytest.raises(UserError, match="--experiments_dir"):
        check_writable(tmp_path / "experiments")


def make_run(folder, status, checkpoints):
    experiment = Experiment.create(folder, f"run_{status}", {"status": status}, exact_name=True)
    for step in checkpoints:
        (experiment.folder / f"checkpoint-{step}").mkdir()
    return experiment


def test_resume_finds_the_newest_checkpoint(tmp_path):
    finished = make_run(tmp_path, "finished", [9])
    stopped = make_run(tmp_path, "interrupted", [2, 10])
    (stopped.folder / ".saving").mkdir()
    for target in ("", str(stopped.folder)):
        experiment, checkpoint = find_resumable(target, tmp_path)
        assert experiment.folder == stopped.folder
        assert checkpoint.name == "checkpoint-10"
    assert find_resumable(str(finished.folder / "checkpoint-9"), tmp_path)[1].name == "checkpoint-9"
    empty = make_run(tmp_path, "failed", [])
    with pytest.raises(UserError, match="no checkpoint"):
        find_resumable(str(empty.folder), tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
        find_resumable(str(tmp_path / "other"), tmp_path)


def step(log, number, loss_sum=2.0, trained=4):
    log.add_step(loss_sum=loss_sum, tokens=100, trained_tokens=trained, computed_tokens=60)
    log.log_row(step=number, epoch=number / 10, learning_rate=1e-3, grad_norm=0.5)


def test_log_has_one_row_a_step_with_the_evaluation_in_it(tmp_path):
    log = RunLog(tmp_path / "training_log.csv")
    log.start()
    step(log, 1)
    step(log, 2)
    log.log_eval(step=2, epoch=0.2, eval_loss=0.75)
    step(log, 3, loss_sum=1.0)
    log.flush()
    lines = log.path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    rows = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == ["0.5", "0.5", "0.25"]
    assert [row["eval_loss"] for row in rows] == ["", "0.75", ""]
    assert [row["tokens_seen"] for row in rows] == ["100", "200", "300"]
    assert [row["trained_tokens"] for row in rows] == ["4", "8", "12"]


def test_rows_behind_the_checkpoint_are_cut_off_and_half_lines_too(tmp_path):
    path = tmp_path / "training_log.csv"
    log = RunLog(path)
    log.start()
    for number in range(1, 5):
        step(log, number)
    log.flush()
    with path.open("a") as file:
        file.write("5,0.5,0.4")  # killed in the middle of a line
    before = path.read_text().splitlines()
    again = RunLog(path)
    again.restore(log.state())
    again.start(resumed_at_step=2)
    assert path.read_text().splitlines() == before[:3]
    assert [row[0] for row in read_rows(path)] == ["1", "2"]


@pytest.mark.parametrize("written", [2, 3])
def test_a_process_that_takes_over_writes_each_row_once(tmp_path, written):
    """The first process dies while it writes a row, with or without the last whole step's."""
    path = tmp_path / "training_log.csv"
    first, second = RunLog(path), RunLog(None)
    for log in (first, second):
        log.start()
        for number in range(1, 4):
            step(log, number)
            log.log_eval(step=number, epoch=number / 10, eval_loss=0.5)
            if number <= written:
                log.flush()
    with path.open("a") as file:
        file.write("4,0.4,0.")
    second.take_over(path, 3)
    second.flush()
    assert [row[0] for row in read_rows(path)] == ["1", "2", "3"]
    assert path.read_text().endswith("\n")


def test_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    experiment = Experiment.create(tmp_path, "run", {"a": 1}, exact_name=True)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("finetune.errors.os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        experiment.update(a=2)
    monkeypatch.undo()
    assert json.loads((experiment.folder / CONFIG).read_text()) == {"a": 1}
    assert [p.name for p in experiment.folder.iterdir()] == [CONFIG]
