"""Mean and spread of repeats, and which run of a sweep is the best."""

from pathlib import Path

import numpy as np
import pytest

from finetune.charts.curves import COLUMNS, LoggedRun, read_run, summarize
from finetune.charts.repeats import mean_and_spread, merge_repeats
from finetune.charts.rows import Rows
from finetune.charts.run_labels import compare_runs
from finetune.sweep import summary
from finetune.sweep.grid import make_points
from finetune.sweep.runs import open_sweep
from finetune.sweep.summary import find_best


def made(losses, eval_losses=None, status="finished", **flags):
    """A run as the charts read it: one row per step, eval_loss in the last rows."""
    rows = Rows({name: np.full(len(losses), np.nan) for name in COLUMNS})
    rows["step"] = np.arange(1.0, len(losses) + 1)
    rows["seconds"] = rows["step"] * 2
    rows["loss"] = np.array(losses, float)
    if eval_losses:
        rows["eval_loss"][len(losses) - len(eval_losses) :] = eval_losses
    name = "_".join(f"{key}{value}" for key, value in flags.items())
    return LoggedRun(Path("s") / name, rows, {"status": status, "flags": flags})


def test_repeats_become_their_mean_and_a_band():
    runs = [made([3, 2, 1], [1.0], rank=8, seed=1), made([5, 4, 3, 9], [2.0], rank=8, seed=2), made([7, 7], rank=4)]
    merged, bands = merge_repeats(compare_runs(runs))
    assert [len(band.runs) for band in bands] == [2]
    assert [look.group for look in merged.looks] == ["rank=4", "rank=8  mean of 2 seeds"]
    xs, ys = merged.runs[1].points("step", "loss")
    assert (xs.tolist(), ys.tolist()) == ([1, 2, 3], [4, 3, 2]), "only steps that both have reached"
    xs, middle, spread = mean_and_spread(bands[0].runs, "time", "loss", 0)
    assert xs.tolist() == [2, 4, 6]
    assert middle.tolist() == [4, 3, 2]
    assert spread == pytest.approx([np.std([3, 5], ddof=1)] * 3)


def test_failed_run_keeps_its_own_curve():
    runs = [made([3, 2], rank=8, seed=1), made([5, 4], rank=8, seed=2), made([9], rank=8, seed=3, status="failed")]
    merged, bands = merge_repeats(compare_runs([*runs, made([1], rank=4, seed=1)]))
    assert [len(band.runs) for band in bands] == [2]
    assert len(merged.runs) == 3


def test_best_has_the_lowest_mean_eval_loss():
    runs = [
        made([1.0], [0.9], rank=4, seed=1), made([1.0], [0.1], rank=4, seed=2),  # mean 0.5
        made([2.0], [0.4], rank=8, seed=1), made([2.0], [0.4], rank=8, seed=2),  # mean 0.4
        made([0.1], [0.01], rank=16, seed=1), made([0.1], rank=16, seed=2, status="failed"),
    ]  # fmt: skip
    best = find_best(compare_runs(runs))
    assert (best.setting, best.metric, best.values) == ("rank=8", "eval_loss", [0.4, 0.4])
    assert "0.4000 ± 0.0000 over 2 seeds" in best.text()


def test_best_without_evaluation_uses_the_last_tenth():
    steady = made([2.0] * 19 + [1.0], rank=4)  # the last two: mean 1.5
    lucky = made([2.0] * 18 + [2.9, 0.5], rank=8)  # the last two: mean 1.7, though its last one is the lowest
    best = find_best(compare_runs([steady, lucky]))
    assert (best.setting, best.metric, best.values) == ("rank=4", "training loss", [1.5])


def test_no_best_among_failed_and_diverged_runs():
    runs = [made([1.0], rank=4, status="failed"), made([float("nan")], rank=8), made([float("inf")], rank=16)]
    assert find_best(compare_runs(runs)) is None


def test_diverged_run_is_not_the_best(tmp_path):
    """In logs: `nan` for a loss that is not finite, an empty cell for one that was not measured."""
    logs = {
        "steady": ["1,2.0,1.5", "2,1.9,1.4"],
        "diverged": ["1,1.0,0.5", "2,nan,nan"],
        "loss_alone": ["1,1.0,0.5", "2,nan,0.6"],
        "evaluation_alone": ["1,1.0,0.5", "2,1.0,nan"],
        "recovered": ["1,nan,nan", "2,1.8,1.3"],
    }
    runs = []
    for rank, (name, lines) in enumerate(logs.items(), start=1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_log.csv").write_text("\n".join(["step,loss,eval_loss", *lines, ""]))
        runs.append(read_run(tmp_path / name / "training_log.csv"))
        runs[-1].config |= {"status": "finished", "flags": {"rank": rank}}
    best = find_best(compare_runs(runs))
    assert (best.setting, best.metric, best.values) == ("rank=5", "eval_loss", [1.3])
    assert find_best(compare_runs(runs[1:4])) is None
    table = {run.folder.name: summarize(run) for run in runs}
    assert table["diverged"]["final_loss"] == float("inf")
    assert (table["diverged"]["min_loss"], table["diverged"]["best_eval_loss"]) == (1.0, 0.5)
    assert "eval_loss is not finite in 1 row" in table["evaluation_alone"]["notes"]


def test_repeats_are_grouped_by_the_sweeps_flags(tmp_path):
    """A --command may record other flags."""
    points = make_points({}, {"dataset": [["a.jsonl"], ["b.jsonl"]]}, seeds=2)
    sweep = open_sweep(tmp_path / "s", points, identity="x", argv=[], settings={})
    for run, loss in zip(sweep.runs, (4.0, 2.0, 1.0, 6.0), strict=True):
        folder = sweep.run_folder(run)
        folder.mkdir()
        run.status = "finished"
        (folder / "training_log.csv").write_text(f"step,loss\n1,{loss}\n")
        (folder / "experiment_config.json").write_text('{"status": "finished", "flags": {"rank": 1}}')
    best = find_best(compare_runs([summary.as_curve(sweep, run) for run in sweep.runs]))
    assert (best.setting, best.values) == ("a.jsonl", [4.0, 2.0])
    sweep.close()


def test_closed_pipe_loses_no_results(tmp_path, monkeypatch):
    """`sweep_lora.py … | head`: rich raises SystemExit when it writes to a closed pipe."""

    def gone(table):
        raise SystemExit(1)

    sweep = open_sweep(tmp_path / "s", make_points({}, {"rank": [4]}), identity="x", argv=[], settings={})
    sweep.runs[0].status = "failed"
    monkeypatch.setattr(summary, "print_table", gone)
    assert summary.write_results(sweep) is None
    assert (tmp_path / "s" / "summary.csv").exists()
    sweep.close()
