"""sweep_lora.py --from_largest: which runs are trained, and how the others are reported."""

from __future__ import annotations

import csv
import json

import pytest

import sweep_lora
from finetune.errors import UserError
from finetune.sweep.from_largest import largest_points
from finetune.sweep.grid import make_points
from finetune.sweep.runs import open_sweep
from finetune.sweep.summary import write_results
from tests.scripts import run_script

EVALUATED = {"eval_fraction": 0.2}


def test_only_the_largest_rank_of_each_setting_is_trained():
    points = make_points(EVALUATED, {"rank": [4, 64, 16], "lr": [1e-4, 2e-4]}, seeds=2)
    kept = largest_points(points)
    assert [point.name for point in kept] == [point.name for point in points if point.flags["rank"] == 64]
    assert len(kept) == 4 and all(point.flags["eval_ranks"] == [4, 16] for point in kept)
    assert "--eval_ranks 4 16" in " ".join(kept[0].arguments())


def test_asked_ranks_are_kept():
    (point,) = largest_points(make_points(EVALUATED | {"eval_ranks": [2]}, {"rank": [4, 16]}))
    assert point.flags["eval_ranks"] == [2, 4]


@pytest.mark.parametrize(
    ("fixed", "grid", "reason"),
    [
        ({}, {"rank": [4, 8]}, "run rank8 has no evaluation rows"),
        (EVALUATED, {"lr": [1e-4, 2e-4]}, "no two runs differ by their rank alone"),
        (EVALUATED, {"rank": [8]}, "no two runs differ by their rank alone"),
    ],
    ids=["no evaluation", "no rank", "one rank"],
)
def test_refused(fixed, grid, reason):
    with pytest.raises(UserError, match=reason):
        largest_points(make_points(fixed, grid))


def test_dry_run_lists_the_trained_run_alone(capsys, rows, tmp_path):
    argv = ["--rank", "4", "8", "--from-largest", "--dry_run", "--experiments_dir", str(tmp_path), "--name", "s"]
    assert sweep_lora.main([*argv, "--", "--dataset", str(rows), "--eval_fraction", "0.2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 's' / 'rank8'}: train_lora.py ") and line.endswith("--eval_ranks 4")


@pytest.fixture
def sweep(tmp_path):
    """A finished sweep of rank 64 with two seeds, the second of which has the higher losses."""
    points = largest_points(make_points(EVALUATED, {"rank": [4, 16, 64]}, seeds=2))
    sweep = open_sweep(tmp_path / "s", points, identity="x", argv=[], settings={})
    for number, run in enumerate(sweep.runs):
        folder = sweep.run_folder(run)
        folder.mkdir()
        run.status = "finished"
        log = f"step,loss,eval_loss\n1,{3 + number},\n2,{2 + number},{1.3 + number}\n"
        (folder / "training_log.csv").write_text(log)
        losses = {"4": 1.5 + number, "16": 1.2 + number, "64": 1.3 + number}
        config = {"status": "finished", "flags": {"rank": 64}, "ranks": {"eval_loss": losses}}
        (folder / "experiment_config.json").write_text(json.dumps(config))
        (folder / "evaluation").mkdir()
        metrics = {"tool_name_accuracy": 0.5}
        (folder / "evaluation" / "finetuned_model_metrics.json").write_text(json.dumps(metrics))
    yield sweep
    sweep.close()


def test_smaller_ranks_are_in_table_chart_and_best(sweep, capsys):
    best = write_results(sweep)
    with (sweep.folder / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    seen = [(row["rank"], row["seed"], row["status"], row["best_eval_loss"]) for row in table]
    assert seen == [
        ("4", "3407", "from rank 64", "1.5"), ("4", "3408", "from rank 64", "2.5"),
        ("16", "3407", "from rank 64", "1.2"), ("16", "3408", "from rank 64", "2.2"),
        ("64", "3407", "finished", "1.3"), ("64", "3408", "finished", "2.3"),
    ]  # fmt: skip
    assert [row["final_loss"] for row in table] == ["", "", "", "", "2.0", "3.0"]
    assert [row["finetuned_tool_name_accuracy"] for row in table] == ["", "", "", "", "0.5", "0.5"]
    assert {row["folder"] for row in table} == {str(sweep.run_folder(run)) for run in sweep.runs}
    assert (sweep.folder / "comparison.png").stat().st_size > 10_000
    assert (best.setting, best.values, best.cut_to) == ("rank=16 from rank 64", [1.2, 2.2], 16)
    folder = sweep.run_folder(sweep.runs[0])
    assert best.text().endswith(f"get it with: python export_lora.py {folder} --to adapter --rank 16")
    assert "from rank 64" in capsys.readouterr().out


def test_run_that_measured_nothing_is_reported_alone(sweep):
    """A run of another program (--command), or one that was stopped."""
    for run in sweep.runs:
        path = sweep.run_folder(run) / "experiment_config.json"
        path.write_text('{"status": "finished", "flags": {"rank": 64}}')
    best = write_results(sweep)
    assert best.cut_to is None
    assert len((sweep.folder / "summary.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_real_sweep_trains_one_run_and_resumes(rows, tiny_model, tmp_path):
    pytest.importorskip("ray")
    argv = ["--rank", "2", "8", "--from_largest", "--experiments_dir", tmp_path, "--name", "s", "--",
            "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--max_steps", "2",
            "--eval_fraction", "0.2"]  # fmt: skip
    summaries = []
    for _ in range(2):
        result = run_script("sweep_lora.py", *argv, fresh=True)
        assert result.returncode == 0, result.stderr
        summaries.append((tmp_path / "s" / "summary.csv").read_text())
    assert [path.name for path in (tmp_path / "s").glob("rank*")] == ["rank8"]
    assert "1 run, 1 of them done" in result.stderr
    assert summaries[0] == summaries[1] and "from rank 8" in summaries[0]
    sweep = json.loads((tmp_path / "s" / "sweep.json").read_text())
    losses = json.loads((tmp_path / "s" / "rank8" / "experiment_config.json").read_text())["ranks"]["eval_loss"]
    assert set(losses) == {"2", "8"} and len(sweep["runs"]) == 1
    assert sweep["best"]["values"] == [pytest.approx(min(losses.values()), abs=1e-6)]
