"""visualize_loss.py as a subprocess, on run folders with the layout of train_lora.py's."""

import csv
import html
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from finetune.charts import curves, other_logs, palette, run_labels
from finetune.errors import UserError
from tests.browser import CHROMIUM, REASON

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "step,epoch,loss,eval_loss,learning_rate,grad_norm,tokens_seen,trained_tokens,tokens_per_second,"
    "computed_tokens_per_second,seconds,peak_memory_gb"
)


def make_run(
    parent: Path, name: str, *, steps=40, floor=0.5, status="finished", noise_seed=0, eval_every=10, **flags
) -> Path:
    """A run folder with the columns and keys that train_lora.py writes; loss falls from 2.5 to `floor` with noise."""
    noise = random.Random(noise_seed)
    folder = parent / name
    folder.mkdir(parents=True)
    lines = [HEADER]
    for step in range(1, steps + 1):
        loss = floor + (2.5 - floor) * math.exp(-6 * step / steps)
        evaluated = f"{loss * 1.1:.6f}" if eval_every and step % eval_every == 0 else ""
        lines.append(
            f"{step},{3 * step / steps:.4f},{loss * (1 + noise.gauss(0, 0.05)):.6f},{evaluated},{2e-4:.8f},0.8,"
            f"{step * 5000},{step * 600},2500.0,,{step * 2.0:.2f},{3 + step / 1000:.3f}"
        )
    (folder / "training_log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    all_flags = {"model": "org/small-1b", "rank": 16, "lr": 2e-4, "epochs": 3, "batch_size": 4, "seed": 1, **flags}
    all_flags.setdefault("alpha", 2 * all_flags["rank"])
    config = {"flags": all_flags, "status": status, "trainable_parameters": 1000 * all_flags["rank"]}
    (folder / "experiment_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def visualize(*arguments, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, str(ROOT / "visualize_loss.py"), *map(str, arguments)], check=False, cwd=cwd,
        capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr + result.stdout
    return result


def read_summary(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def picture_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """experiments/ with ranks 4, 16 and 8, in folders whose names sort differently."""
    for index, rank in enumerate([16, 4, 8]):
        make_run(tmp_path / "experiments", f"small_r{rank}_a{2 * rank}_lr2em04_ep3_2025121{index}_143022", rank=rank,
                 floor=1 / rank, noise_seed=index)  # fmt: skip
    return tmp_path


# ---- documented commands


def test_picture_and_summary_of_log_files(ranks):
    logs = sorted((ranks / "experiments").glob("*/training_log.csv"))
    result = visualize("-o", "comparison.png", "-s", "summary.csv", *logs, cwd=ranks)
    assert picture_size(ranks / "comparison.png") == (1800, 1012)
    rows = read_summary(ranks / "summary.csv")
    assert [row["run"] for row in rows] == ["rank=4", "rank=8", "rank=16"]  # sorted as numbers
    assert [row["rank"] for row in rows] == ["4", "8", "16"]
    assert [row["trainable_parameters"] for row in rows] == ["4000", "8000", "16000"]
    for row, log in zip(rows, (logs[1], logs[2], logs[0]), strict=True):
        lines = list(csv.DictReader(log.open(encoding="utf-8")))
        losses = [float(line["loss"]) for line in lines]
        assert float(row["final_loss"]) == losses[-1]
        assert float(row["min_loss"]) == min(losses)
        assert int(row["min_loss_step"]) == losses.index(min(losses)) + 1
        assert float(row["best_eval_loss"]) == min(float(line["eval_loss"]) for line in lines if line["eval_loss"])
        assert (row["best_eval_step"], row["steps"], row["tokens"], row["seconds"]) == ("40", "40", "200000", "80.0")
        assert float(row["tokens_per_second"]) == 2500 and float(row["peak_memory_gb"]) == 3.04
        assert row["status"] == "finished" and row["notes"] == ""
    assert "wrote comparison.png" in result.stdout and "rank=16" in result.stdout


def test_default_picture_is_written_then_replaced(ranks):
    assert "wrote loss_comparison.png" in visualize(cwd=ranks).stdout
    assert "replaced loss_comparison.png" in visualize(cwd=ranks).stdout


@pytest.mark.parametrize(
    "paths",
    [
        ["experiments"],
        ["experiments/*"],
        ["experiments/*/training_log.csv"],
        ["experiments/small_r4*", "experiments", "experiments/small_r*/training_log.csv"],
    ],
)
def test_folders_and_unexpanded_patterns(ranks, paths):
    (ranks / "experiments" / "README.md").write_text("about", encoding="utf-8")
    visualize("-s", "summary.csv", *paths, cwd=ranks)
    assert [row["run"] for row in read_summary(ranks / "summary.csv")] == ["rank=4", "rank=8", "rank=16"]


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (["--x", "epoch"], "epoch"),
        (["--x", "tokens", "--log-y"], "tokens seen"),
        (["--x", "time", "--smooth", "0"], "time (seconds)"),
        (["--y_range", "0.25,1.5", "--no-seed_bands"], "optimizer step"),
    ],
)
def test_axes(ranks, options, label):
    visualize("-o", "out.svg", *options, "experiments", cwd=ranks)
    svg = (ranks / "out.svg").read_text(encoding="utf-8")
    texts = {html.unescape(text) for text in re.findall(r">([^<>\n]+)</text>", svg)}
    assert {"rank=4", "rank=8", "rank=16", "Training loss by rank", "evaluation (dot: its lowest)", label} <= texts


def test_pdf_picture(ranks):
    visualize("-o", "out.pdf", "experiments", cwd=ranks)
    assert (ranks / "out.pdf").read_bytes().startswith(b"%PDF")


# ---- damaged and partial logs


def test_overlong_numbers_are_not_finite(tmp_path):
    log = make_run(tmp_path, "long", rank=1, steps=5) / "training_log.csv"
    lines = log.read_text().splitlines()
    lines[2] = "9" * 500 + lines[2].removeprefix("2")
    lines[4] = re.sub(r"^(4,[^,]*),[^,]*", r"\1," + "9" * 500, lines[4])
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = visualize("-o", "out.png", "-s", "summary.csv", "long", cwd=tmp_path)
    assert "loss is not finite in 1 row, first at step 4" in result.stdout
    (row,) = read_summary(tmp_path / "summary.csv")
    assert row["steps"] == "5" and "1 unreadable line skipped" in row["notes"]


def test_damaged_logs_are_drawn_and_noted(tmp_path):
    runs = tmp_path / "experiments"
    make_run(runs, "whole", rank=1)
    log = make_run(runs, "cut", rank=2, steps=20, status="running") / "training_log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:20]) + "20,3.0,0.1", encoding="utf-8")
    (make_run(runs, "empty", rank=3, status="failed") / "training_log.csv").write_bytes(b"")
    (make_run(runs, "header", rank=4, status="running") / "training_log.csv").write_text(HEADER + "\n")
    (make_run(runs, "none", rank=5, status="failed") / "training_log.csv").unlink()
    log = make_run(runs, "diverged", rank=6, steps=20, status="failed") / "training_log.csv"
    lines = log.read_text().splitlines()
    lines[19] = re.sub(r"^(19,[^,]*),[^,]*", r"\1,nan", lines[19])
    lines[20] = re.sub(r"^(20,[^,]*),[^,]*", r"\1,inf", lines[20])
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    log = make_run(runs, "spoilt", rank=7, steps=20) / "training_log.csv"
    lines = log.read_text().splitlines()
    lines[5:7] = ["what, is this", '"an unclosed quote,1,2,3']
    log.write_text("\ufeff" + "\n".join(lines) + "\n\0\0\0", encoding="utf-8")
    (make_run(runs, "noconfig", rank=8) / "experiment_config.json").write_text('{"flags": {"ra', encoding="utf-8")
    log = make_run(runs, "repeated", rank=9, steps=20) / "training_log.csv"
    log.write_text(log.read_text() + log.read_text().split("\n", 11)[11], encoding="utf-8")  # steps 11..20 once more

    result = visualize("-o", "out.png", "-s", "summary.csv", "experiments", cwd=tmp_path)
    rows = {Path(row["folder"]).name: row for row in read_summary(tmp_path / "summary.csv")}
    assert len(rows) == 9
    notes = {name: row["notes"] for name, row in rows.items()}
    assert notes["whole"] == ""
    assert notes["cut"] == "last line is cut" and rows["cut"]["status"] == "running"
    assert float(rows["cut"]["final_loss"]) == float(
        (runs / "cut/training_log.csv").read_text().splitlines()[19].split(",")[2]
    )
    assert (notes["empty"], rows["empty"]["final_loss"], rows["empty"]["status"]) == ("empty log", "", "failed")
    assert notes["header"] == "no rows yet"
    assert notes["none"] == "no log yet"
    assert notes["diverged"] == "loss is not finite in 2 rows, first at step 19"
    assert "2 unreadable lines skipped" in notes["spoilt"] and "last line is cut" in notes["spoilt"]
    assert rows["spoilt"]["steps"] == "20"
    assert notes["noconfig"].startswith("experiment_config.json cannot be read")
    assert notes["repeated"] == "steps were logged more than once; the later rows count"
    assert rows["repeated"]["steps"] == "20"
    for note in notes.values():
        assert note in result.stdout
    assert picture_size(tmp_path / "out.png")[0] == 1800


def test_rows_of_one_step_are_merged(tmp_path):
    log = tmp_path / "training_log.csv"
    log.write_text("step,loss,eval_loss\n1,3.0,\n2,2.0,\n2,,1.5\n3,1.0,\n", encoding="utf-8")
    notes = []
    rows = curves.read_log(log, notes)
    assert rows["step"].tolist() == [1, 2, 3] and rows["loss"].tolist() == [3, 2, 1]
    assert rows["eval_loss"].tolist()[1] == 1.5 and notes == []


def test_time_continues_after_a_restart(tmp_path):
    log = tmp_path / "training_log.csv"
    log.write_text("step,loss,seconds\n1,3,10\n2,2,20\n3,1,5\n4,1,10\n", encoding="utf-8")
    assert curves.read_log(log, [])["seconds"].tolist() == [10, 20, 20, 25]


def test_nothing_to_draw_is_an_error(tmp_path):
    (make_run(tmp_path, "empty") / "training_log.csv").write_text(HEADER + "\n")
    result = visualize("-o", "out.png", "empty", cwd=tmp_path, code=2)
    assert result.stderr == "error: none of these runs has logged a loss yet; nothing to draw\n"
    assert "no rows yet" in result.stdout and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere: no such log or folder"), (["no*where"], "no*where: no such log or folder"),
     (["-o", "picture.docx", "experiments"], "picture.docx: unknown type of picture"),
     (["-o", "experiments/README/x.png", "experiments"], "cannot write")],
)  # fmt: skip
def test_bad_input_is_one_line(ranks, arguments, message):
    (ranks / "experiments" / "README").write_text("a file, not a folder", encoding="utf-8")
    result = visualize(*arguments, cwd=ranks, code=2)
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-s", "experiments/a/training_log.csv", "experiments/b/training_log.csv"],  # -s */training_log.csv
        ["-s", "experiments/a/training_log.csv"],
        ["--html", "experiments/b/experiment_config.json"],
        ["-s", "log.csv", "log.csv"],
        ["-o", "new.png", "--html", "./new.png"],
        ["-o", "new.bmp", "-s", "new.csv"],
    ],
)
def test_outputs_never_overwrite_records(tmp_path, arguments):
    for name in ("a", "b"):
        make_run(tmp_path / "experiments", name)
    (tmp_path / "log.csv").write_bytes((tmp_path / "experiments/a/training_log.csv").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = visualize(*arguments, cwd=tmp_path, code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_infinite_losses_and_odd_names_are_drawn(tmp_path):
    """Losses of inf and 1e307, config values of a wrong type, and names that matplotlib would parse as formulas."""
    runs = tmp_path / "experiments"
    for name, losses in (("endless", ["2.5", "2", "inf", "-inf", "nan"]), ("vast", ["2.5"] + ["1e307"] * 9)):
        folder = make_run(runs, name, steps=1, dataset=["$x_{$ ^^"])
        lines = [f"{n},0.1,{loss},,1,1,100,10,1,1,{n},1" for n, loss in enumerate(losses, start=1)]
        (folder / "training_log.csv").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    with (make_run(runs, "steps", dataset=["c\nd\u202e"]) / "training_log.csv").open("a") as file:
        file.write("inf,0.1,2,,1,1,100,10,1,1,9,1\n")
    odd = {"flags": {"rank": "x", "lr": None, "model": 5, "dataset": {"a": 1}}, "status": ["x"],
           "trainable_parameters": "many"}  # fmt: skip
    (make_run(runs, "odd") / "experiment_config.json").write_text(json.dumps(odd))
    huge = {"flags": {}, "trainable_parameters": 10**400}
    (make_run(runs, "huge") / "experiment_config.json").write_text(json.dumps(huge))
    outputs = ["-o", "out.png", "-s", "out.csv", "--html", "out.html", "--log-y"]
    result = visualize(*outputs, "experiments", cwd=tmp_path)
    assert result.stderr == "" and picture_size(tmp_path / "out.png")[0] == 1800
    rows = {Path(row["folder"]).name: row for row in read_summary(tmp_path / "out.csv")}
    assert (rows["endless"]["final_loss"], rows["endless"]["min_loss"]) == ("inf", "2.0")
    assert "loss is not finite in 3 rows, first at step 3" in rows["endless"]["notes"]
    assert (rows["vast"]["final_loss"], rows["vast"]["min_loss"]) == ("inf", "2.5")
    assert "9 rows, first at step 2" in rows["vast"]["notes"]
    assert "1 unreadable line skipped" in rows["steps"]["notes"]
    assert "c d" in rows["steps"]["run"] and "\u202e" not in rows["steps"]["run"]
    assert rows["odd"]["status"] == "unknown" and rows["odd"]["trainable_parameters"] == ""


def test_temporary_run_folders_are_skipped(tmp_path):
    make_run(tmp_path, "run")
    make_run(tmp_path, ".new_run_x")
    assert [log.parent.name for log in curves.find_logs([str(tmp_path)])] == ["run"]
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=r"no training_log\.csv in"):
        curves.find_logs([str(tmp_path / "hollow")])


# ---- labels and colours


def compare(tmp_path: Path, *flags: dict) -> run_labels.Comparison:
    folders = [make_run(tmp_path, f"run{index}", steps=3, **one) for index, one in enumerate(flags)]
    return run_labels.compare_runs([curves.read_run(folder / "training_log.csv") for folder in folders])


def test_labels_name_only_what_differs(tmp_path):
    comparison = compare(tmp_path, {"rank": 64}, {"rank": 8}, {"rank": 8, "lr": 1e-5, "report_to": "wandb"})
    assert [run.label for run in comparison.runs] == ["rank=8  lr=1e-05", "rank=8  lr=2e-04", "rank=64  lr=2e-04"]
    assert comparison.common["model"] == "org/small-1b"


def test_alpha_is_labelled_unless_implied_by_rank(tmp_path):
    comparison = compare(tmp_path, {"rank": 8, "alpha": 16}, {"rank": 16, "alpha": 64}, {"rank": 16, "alpha": 16})
    labels = [run.label for run in comparison.runs]
    assert labels == ["rank=8  alpha=16", "rank=16  alpha=16", "rank=16  alpha=64"]


def test_models_are_labelled_by_their_names(tmp_path):
    comparison = compare(tmp_path, {"model": "kakaocorp/kanana-1.5-2.1b"}, {"model": "Qwen/Qwen2.5-3B"})
    assert {run.label for run in comparison.runs} == {"kanana-1.5-2.1b", "Qwen2.5-3B"}
    assert run_labels.comparable("model", "org/small-1b") == run_labels.comparable("model", "/copies/small-1b")


def test_runs_without_config_are_labelled_by_folder(tmp_path):
    for name in ("kanana_r16", "kanana_r4"):
        (make_run(tmp_path, name) / "experiment_config.json").unlink()
    comparison = run_labels.compare_runs([curves.read_run(log) for log in curves.find_logs([str(tmp_path)])])
    assert [run.label for run in comparison.runs] == ["kanana_r4", "kanana_r16"]


def test_natural_key_ignores_superscripts():
    assert sorted(["run1²2", "run1²10", "run1", "run4"], key=curves.natural_key) == [
        "run1", "run1²2", "run1²10", "run4",
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="users and permissions of Unix")
def test_run_of_another_user_is_noted():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others
        Path(name).chmod(0o755)
        curves.read_run(make_run(Path(name), "mine") / "training_log.csv")  # loads what only root may be able to
        make_run(Path(name), "private").chmod(0)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)  # permissions do not hold for root
            runs = [curves.read_run(log) for log in curves.find_logs([name])]
        finally:
            os.seteuid(user)
            (Path(name) / "private").chmod(0o755)
    assert [run.folder.name for run in runs] == ["mine", "private"]
    assert runs[1].notes == [
        "experiment_config.json cannot be read (PermissionError)",
        "log cannot be read: Permission denied",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with a name")
def test_pipe_in_a_run_folder_is_noted(tmp_path):
    for name in ("training_log.csv", "experiment_config.json", "trainer_state.json"):
        os.mkfifo(tmp_path / name)
    assert curves.read_run(tmp_path / "training_log.csv").notes == [
        "experiment_config.json cannot be read (OSError)", "log cannot be read: not a regular file",
    ]  # fmt: skip
    with pytest.raises(UserError, match="not a regular file"):
        other_logs.read_runs([tmp_path / "trainer_state.json"])


def test_deeply_nested_config_is_noted(tmp_path):
    notes = []
    (tmp_path / "experiment_config.json").write_text("[" * 100_000)
    assert curves.read_json(tmp_path / "experiment_config.json", notes) == {}
    assert notes == ["experiment_config.json cannot be read (RecursionError)"]


def test_many_differing_flags_are_abbreviated(tmp_path):
    one = {"dataset": ["a.jsonl"], "lr": 1e-3, "epochs": 1, "batch_size": 16, "warmup_steps": 2}
    other = {"dataset": ["b.jsonl"], "lr": 2e-4, "epochs": 2, "batch_size": 2, "warmup_steps": 0}
    comparison = compare(tmp_path, one, other, {**other, "rank": 4})
    labels = [run.label for run in comparison.runs]
    assert labels == ["a.jsonl  rank=16  …", "b.jsonl  rank=4  …", "b.jsonl  rank=16  …"]
    assert "warmup_steps" in comparison.differing


def test_huge_flag_values_are_text(tmp_path):
    flags = [{"rank": 10**400, "alpha": 8}, {"rank": "many", "alpha": 8}, {"rank": 4, "lr": float("nan")}]
    assert {"rank=4", "rank=many"} <= {run.label.split()[0] for run in compare(tmp_path, *flags).runs}


def test_undecodable_folder_names_are_labelled(tmp_path):
    runs = [
        curves.LoggedRun(tmp_path / name, curves.read_log(tmp_path / "none", []))
        for name in ("a\udcff", "a\udcfe", "b\n")
    ]
    assert [run.label for run in run_labels.compare_runs(runs).runs] == ["a  [a] #1", "a  [a] #2", "b"]


def test_equal_settings_get_distinct_labels(tmp_path):
    comparison = compare(tmp_path, {}, {}, {"rank": 8})
    labels = [run.label for run in comparison.runs]
    assert len(set(labels)) == 3 and labels[0] == "rank=8"


def test_seeds_share_a_colour_ranks_a_scale(tmp_path):
    comparison = compare(tmp_path, *[{"rank": rank, "seed": seed} for seed in (1, 2) for rank in (64, 4, 16)])
    assert [run.label for run in comparison.runs[:3]] == ["rank=4  seed=1", "rank=4  seed=2", "rank=16  seed=1"]
    colors = [look.color for look in comparison.looks]
    assert colors[0] == colors[1] and len(set(colors)) == 3
    lightness = [_lightness(color) for color in colors[::2]]
    assert lightness == sorted(lightness)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 12])
def test_ramp_colours_differ_in_lightness(count):
    """Distinct without colour vision, and dark enough for a white background."""
    light = [_lightness(color) for color in palette.ramp(count)]
    assert min(np.diff(light)) > 40 / count and light[-1] < 84


def test_categories_differ_under_colour_blindness():
    """Machado et al. 2009, severity 1: deuteranopia and protanopia; distances in linear RGB."""
    matrices = [
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ]
    colors = np.array([_linear(color) for color in palette.CATEGORIES])
    for matrix in matrices:
        seen = colors @ np.array(matrix).T
        for index in range(len(seen)):
            for other in range(index):
                assert np.linalg.norm(seen[index] - seen[other]) > 0.1, (index, other)


def _linear(color: str) -> list[float]:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def _lightness(color: str) -> float:
    """CIE L*, 0 to 100."""
    return float(116 * np.dot(_linear(color), [0.2126, 0.7152, 0.0722]) ** (1 / 3) - 16)


# ---- curves


def test_smoothing_is_centred():
    line = np.arange(50, dtype=float)
    assert np.allclose(curves.smooth(line, 5), line)  # at both ends too
    assert np.allclose(curves.smooth(line, 6), line) and np.allclose(curves.smooth(line[:4], 9), line[:4])
    falling = 10.755 * np.exp(-np.arange(40) / 8)
    assert curves.smooth(falling)[0] == falling[0]  # runs that start alike are drawn alike
    spiked = np.array([0.24, 0.31, 0.79, 0.08, 0.17, 0.11, 0.1])
    assert curves.smooth(spiked, 5).min() >= spiked.min()
    assert curves.smooth(line, 0) is line and curves.smooth(line, 1) is line
    step = np.r_[np.zeros(20), np.ones(20)]
    assert curves.smooth(step, 10)[19:21].mean() == pytest.approx(0.5, abs=0.06)


def test_thinning_keeps_ends_order_and_extremes():
    values = np.sin(np.arange(10_000) / 50)
    values[7777], values[1234] = 9.0, -9.0
    index = curves.thin(values, 500)
    assert len(index) <= 502 and index[0] == 0 and index[-1] == 9999 and (np.diff(index) > 0).all()
    assert {7777, 1234} <= set(index.tolist())
    assert curves.thin(values[:100], 500).tolist() == list(range(100))


def test_evaluation_scores_are_in_the_table(ranks):
    folder = next((ranks / "experiments").glob("small_r8_*"))
    (folder / "evaluation").mkdir()
    for which, value in (("base", 0.1), ("finetuned", 0.95)):
        metrics = {"tool_name_accuracy": value, "per_tool": {"x": 1}}
        (folder / "evaluation" / f"{which}_model_metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    result = visualize("-s", "summary.csv", "experiments", cwd=ranks)
    rows = read_summary(ranks / "summary.csv")
    assert [row["finetuned_tool_name_accuracy"] for row in rows] == ["", "0.95", ""]
    assert "0.950" in result.stdout and "tool name tuned" in result.stdout


def test_hundred_long_runs(tmp_path):
    """All runs are in the summary, and the page stays small."""
    first = make_run(tmp_path / "experiments", "run_0", steps=10_000, rank=1, eval_every=500)
    log = (first / "training_log.csv").read_bytes()
    for index in range(1, 100):
        folder = make_run(tmp_path / "experiments", f"run_{index}", steps=1, rank=index + 1)
        (folder / "training_log.csv").write_bytes(log)
    visualize("-o", "out.png", "-s", "summary.csv", "--html", "out.html", "experiments", cwd=tmp_path)
    rows = read_summary(tmp_path / "summary.csv")
    assert [int(row["rank"]) for row in rows] == list(range(1, 101)) and {row["steps"] for row in rows} == {"10000"}
    assert picture_size(tmp_path / "out.png") == (1800, 1012)
    assert (tmp_path / "out.html").stat().st_size < 5_000_000


# ---- the interactive page


def test_page_is_self_contained_and_escaped(tmp_path):
    make_run(tmp_path / "experiments", "a", model="org/</script><script>alert(1)</script>")
    make_run(tmp_path / "experiments", "b", model="org/한국어")
    visualize("--html", "page.html", "experiments", cwd=tmp_path)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "한국어" in page
    assert page.count("</script>") == 2 and "alert(1)</script>" not in page
    addresses = set(re.findall(r"https?://[^\"'\s]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert not re.findall(r"<(?:link|img|iframe)|src=|@import|url\((?!#)", page)


# Runs in the page after it has drawn: operates its controls and records what the page shows.
DRIVER = """
<script>
addEventListener("load", () => setTimeout(() => {
  const out = {};
  try { drive(out); } catch (error) { out.errors = [String(error), error.stack]; }
  const node = document.createElement("pre"); node.id = "outcome";
  node.textContent = JSON.stringify(out); document.body.append(node);
}, 300));
function drive(out) {
  const chart = document.querySelector("#chart > svg");
  const curves = () => [...chart.querySelectorAll("path.curve")].map(p => p.dataset.run);
  const area = chart.getBoundingClientRect();
  const mouse = (type, x, y) => chart.dispatchEvent(
    new PointerEvent(type, {bubbles: true, clientX: area.left + x, clientY: area.top + y}));
  out.first = curves();
  out.legend = [...document.querySelectorAll("#legend label")].map(l => l.innerText.trim());
  out.axes = [...document.querySelectorAll("#axis option")].map(o => o.textContent);
  mouse("pointermove", area.width / 2, 200);
  out.tip = document.getElementById("tip").innerText;
  out.tipShown = getComputedStyle(document.getElementById("tip")).display;
  const tip = document.getElementById("tip").getBoundingClientRect(); out.tipSize = [tip.width, tip.height];
  document.querySelectorAll("#legend input")[0].click();
  out.toggled = curves();
  document.getElementById("all").click();
  const find = document.getElementById("find"); find.value = "rank=16"; find.dispatchEvent(new Event("input"));
  out.found = curves();
  document.getElementById("all").click();
  const d = () => chart.querySelector("path.curve").getAttribute("d");
  const before = d(); document.getElementById("logy").click(); out.logChanged = d() !== before;
  document.getElementById("logy").click(); out.logBack = d() === before;
  mouse("pointerdown", area.width / 2, 100);
  for (const type of ["pointermove", "pointerup"]) mouse(type, area.width * .75, 100);
  out.zoomed = d() !== before; document.getElementById("reset").click(); out.unzoomed = d() === before;
  const axis = document.getElementById("axis"); axis.value = "time"; axis.dispatchEvent(new Event("change"));
  chart.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  out.timeTip = document.getElementById("tip").innerText;
  document.querySelectorAll("#table th button")[3].click();
  out.sorted = [...document.querySelectorAll("#table tbody tr")].map(r => r.cells[0].innerText);
  out.errors = window.failed;
}
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
def test_page_in_a_real_browser(ranks):
    visualize("--html", "page.html", "experiments", cwd=ranks)
    page = (ranks / "page.html").read_text(encoding="utf-8")
    errors = "<head><script>window.failed = []; onerror = m => { failed.push(m); };</script>"
    driven = ranks / "driven.html"
    driven.write_text(page.replace("<head>", errors, 1).replace("</body>", DRIVER, 1), encoding="utf-8")
    profile = ranks / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
               "--window-size=1400,900", "--virtual-time-budget=4000", "--dump-dom", driven.as_uri()]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8", timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("chromium is installed but does not start headless on this machine")
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:] + done.stdout[-1000:]
    out = json.loads(html.unescape(found[1]))
    names = ["rank=4", "rank=8", "rank=16"]
    assert out["errors"] == []
    assert out["first"] == names and out["legend"] == names
    assert out["axes"] == ["optimizer step", "epoch", "tokens seen", "time"]
    assert out["tipShown"] == "block" and all(name in out["tip"] for name in names)
    assert out["tipSize"][0] < 400 and out["tipSize"][1] < 200
    step = int(re.search(r"optimizer step (\d+)", out["tip"])[1])
    log = next((ranks / "experiments").glob("small_r8_*")) / "training_log.csv"
    logged = float(log.read_text(encoding="utf-8").splitlines()[step].split(",")[2])
    assert f"{logged:.4f}" in re.search(r"rank=8\s+(.*)", out["tip"])[0]
    assert out["toggled"] == ["rank=8", "rank=16"] and out["found"] == ["rank=16"]
    assert out["logChanged"] and out["logBack"] and out["zoomed"] and out["unzoomed"]
    assert "time" in out["timeTip"]
    assert out["sorted"] == ["rank=16", "rank=8", "rank=4"]  # by final loss: rank 16 ends lowest
