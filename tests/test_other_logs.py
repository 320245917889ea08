"""Curves of other trainers and trackers: trainer_state.json, trainer_log.jsonl, CSV exports."""

import json
from pathlib import Path

import pytest

import visualize_loss
from finetune.charts.curves import LoggedRun, find_logs, summarize
from finetune.charts.other_logs import read_runs
from finetune.charts.run_labels import compare_runs
from finetune.errors import UserError


def curve(run: LoggedRun, y: str = "loss", x: str = "step") -> list[tuple[float, float]]:
    return list(zip(*(part.tolist() for part in run.points(x, y)), strict=True))


def read(*paths: Path) -> list[LoggedRun]:
    return compare_runs(read_runs(find_logs([str(path) for path in paths]))).runs


def write_state(folder: Path, steps: int) -> Path:
    folder.mkdir(parents=True)
    history = [{"step": n, "epoch": n / 4, "loss": 3.0 - n, "learning_rate": 1e-4} for n in range(1, steps + 1)]
    history += [{"step": steps, "epoch": steps / 4, "eval_loss": 2.5, "eval_runtime": 1.0}]
    history += [{"step": steps, "train_loss": 9.9, "train_runtime": 60.0}]
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": steps, "log_history": history}))
    return path


def test_trainer_state(tmp_path):
    (run,) = read(write_state(tmp_path / "hf-run", 2))
    assert run.label == "hf-run"
    assert curve(run) == [(1, 2.0), (2, 1.0)] and curve(run, "eval_loss") == [(2, 2.5)]
    assert curve(run, x="epoch") == [(0.25, 2.0), (0.5, 1.0)]


def test_output_folder_gives_its_newest_state(tmp_path):
    write_state(tmp_path / "out" / "checkpoint-2", 2)
    write_state(tmp_path / "out" / "checkpoint-10", 3)
    (run,) = read(tmp_path)
    assert run.folder.name == "out" and len(curve(run)) == 3


def test_llama_factory_log(tmp_path):
    lines = [
        {"current_steps": 5, "total_steps": 20, "loss": 1.5, "lr": 1e-4, "epoch": 0.5, "elapsed_time": "0:00:30"},
        {"current_steps": 10, "total_steps": 20, "loss": 1.25, "lr": 5e-5, "epoch": 1.0,
         "elapsed_time": "1 day, 0:01:00", "total_tokens": 4000},
        {"current_steps": 10, "total_steps": 20, "eval_loss": 1.4, "epoch": 1.0, "elapsed_time": "1 day, 0:01:05"},
    ]  # fmt: skip
    path = tmp_path / "saves" / "trainer_log.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"current_steps": 15, "lo')
    write_state(tmp_path / "saves" / "checkpoint-10", 2)
    (run,) = read(tmp_path / "saves")
    assert curve(run) == [(5, 1.5), (10, 1.25)] and curve(run, "eval_loss") == [(10, 1.4)]
    assert curve(run, x="time")[0] == (30, 1.5) and curve(run, x="tokens") == [(4000, 1.25)]
    assert run.notes == ["1 unreadable line skipped"]


def test_tensorboard_exports_of_one_run(tmp_path):
    train = tmp_path / "run-lr1e-4-tag-train_loss.csv"
    train.write_text("Wall time,Step,Value\n1700000000.5,1,2.5\n1700000010.5,2,NaN\n1700000020.5,3,1.5\n")
    evaluation = tmp_path / "run-lr1e-4-tag-eval_loss.csv"
    evaluation.write_text("Wall time,Step,Value\n1700000021.5,3,2.0\n")
    (run,) = read(train, evaluation)
    assert run.label == "lr1e-4"
    assert curve(run) == [(1, 2.5), (3, 1.5)] and curve(run, "eval_loss") == [(3, 2.0)]
    assert curve(run, x="time") == [(0, 2.5), (20, 1.5)]
    assert any("not finite" in note for note in run.notes)


def test_wandb_export_of_many_runs(tmp_path):
    path = tmp_path / "wandb_export.csv"
    path.write_text(
        '"Step","a - b - train/loss","a - b - train/loss__MIN","a - b - train/loss__MAX",'
        '"r2 - train/loss","r2 - eval/loss"\n'
        '"1","2.5","2.5","2.5","3.5",""\n"2","2.25","2.2","2.3","",""\n"3","","","","3.25","3.75"\n'
    )
    first, second = read(path)
    assert (first.label, second.label) == ("a - b", "r2")
    assert curve(first) == [(1, 2.5), (2, 2.25)]
    assert curve(second) == [(1, 3.5), (3, 3.25)] and curve(second, "eval_loss") == [(3, 3.75)]


def test_wandb_history_of_one_run(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(
        "_step,train/global_step,train/loss,train/epoch,_runtime,eval/loss\n"
        "0,10,2.5,0.5,12,\n1,10,,0.5,13,2.75\n2,20,2.25,1,24,\n"
    )
    (run,) = read(path)
    assert run.label == "history"
    assert curve(run) == [(10, 2.5), (20, 2.25)] and curve(run, "eval_loss") == [(10, 2.75)]
    assert curve(run, x="epoch") == [(0.5, 2.5), (1, 2.25)]


@pytest.mark.parametrize("steps", [["nan"], ["1", ""], ["", "1", "2"]])
def test_rows_without_a_step_are_noted(tmp_path, steps):
    log = tmp_path / "history.csv"
    log.write_text("_step,train/loss,eval/loss\n" + "".join(f"{step},2,2\n" for step in steps))
    (run,) = read(log)
    known = [int(step) for step in steps if step.isdecimal()]
    assert run.rows["step"].tolist() == known and "1 row without a step" in run.notes
    assert summarize(run)["best_eval_step"] == (known[0] if known else None)


def test_equal_names_are_not_repeats(tmp_path):
    """Without a seed two runs called the same are two curves, not one mean."""
    write_state(tmp_path / "a" / "out", 2)
    write_state(tmp_path / "b" / "out", 3)
    comparison = compare_runs(read_runs(find_logs([str(tmp_path)])))
    assert len({look.group for look in comparison.looks}) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [("trainer_state.json", "[]"), ("trainer_state.json", '{"log_history": [5]}'), ("trainer_state.json", "{"),
     ("trainer_state.json", '{"log_history": null}'), ("other.json", '{"loss": 1}')],
)  # fmt: skip
def test_other_json_is_refused_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    runs = []
    try:
        runs = read(tmp_path / name)
    except UserError as error:
        assert str(tmp_path / name) in str(error)
    assert not any(len(run.rows) for run in runs)


def test_all_are_drawn_in_one_picture(tmp_path, capsys):
    write_state(tmp_path / "hf", 4)
    (tmp_path / "w.csv").write_text("Step,x - loss\n1,2\n2,1.5\n")
    (tmp_path / "t-tag-train_loss.csv").write_text("Wall time,Step,Value\n1,1,2\n2,2,1\n")
    picture = tmp_path / "all.png"
    paths = [str(tmp_path / name) for name in ("hf", "w.csv", "t-tag-train_loss.csv")]
    assert visualize_loss.main([*paths, "-o", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("hf", "x", "t"))


def test_output_never_overwrites_the_log(tmp_path, capsys):
    path = write_state(tmp_path / "hf", 2)
    before = path.read_bytes()
    assert visualize_loss.main([str(path), "-o", str(path)]) == 2
    assert path.read_bytes() == before
