"""Charts of many runs: the legend, the limits, the columns of the table, and what they leave of the picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console

from finetune.charts import curves, legend, plots, tables
from finetune.charts.curves import COLUMNS, LoggedRun
from finetune.charts.plots import visible_range
from finetune.charts.rows import Rows
from finetune.charts.run_labels import compare_runs
from finetune.evaluation.report import pictured_tables
from finetune.terminal_tables import fit, print_markdown


def run(tmp_path, name, losses, evals=(), **flags) -> LoggedRun:
    rows = Rows({column: np.full(len(losses), np.nan) for column in COLUMNS})
    rows["step"] = np.arange(1.0, len(losses) + 1)
    rows["loss"] = np.array(losses, float)
    for step, value in evals:
        rows["eval_loss"][step - 1] = value
    return LoggedRun(tmp_path / name, rows, {"flags": {"model": "org/m", **flags}, "status": "finished"})


def falling(count, steps=60, start=2.5):
    return [[0.3 + 0.01 * index + (start - 0.3) * math.exp(-step / 10) for step in range(steps)]
            for index in range(count)]  # fmt: skip


KINDS = {
    "ranks": lambda index: {"rank": 2**index},
    "grid": lambda index: {"rank": [4, 8, 16, 32, 64][index % 5], "lr": 1e-5 * (1 + index // 5)},
    "names": lambda index: {"dataset": [f"a_rather_long_name_of_a_data_set_{index}.jsonl"]},
    "nothing": lambda index: {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5, 30, 100])
def test_the_chart_keeps_two_thirds(tmp_path, monkeypatch, count, kind):
    """Axes take two thirds of the area, whatever the legend needs, and the legend lies above them."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    monkeypatch.setattr(plots, "write_bytes_atomic", lambda *_: None)
    runs = [run(tmp_path, f"r{n}", losses, [(40, 1.0)], **KINDS[kind](min(n, 40) if kind == "ranks" else n))
            for n, losses in enumerate(falling(count))]  # fmt: skip
    plots.draw_curves(compare_runs(runs), tmp_path / "x.png")
    (figure,) = figures
    (axes,) = figure.axes
    box = axes.get_position()
    assert box.width * box.height >= 0.665
    drawn = figure.legends[0].get_window_extent(figure.canvas.get_renderer())
    assert drawn.y0 >= box.y1 * figure.bbox.height and drawn.x1 <= figure.bbox.width + 1


def test_many_runs_are_explained_by_what_differs(tmp_path):
    grid = [run(tmp_path, f"r{n}", [2, 1], rank=[4, 8, 16, 32, 64][n % 5], lr=1e-4 * (1 + n // 5)) for n in range(30)]
    labels = [one.label for one in legend.entries(compare_runs(grid))]
    assert [text for text in labels if text.startswith("rank=")] == [f"rank={2**n}" for n in range(2, 7)]
    assert len(labels) == 11 and all(text.startswith(("rank=", "lr=")) for text in labels)
    names = [run(tmp_path, f"r{n}", [2, 1], dataset=[f"d{n}.jsonl"]) for n in range(100)]
    labels = [one.label for one in legend.entries(compare_runs(names))]
    assert len(labels) <= 16 and "more, see the table" in labels[-1]


def test_a_spike_does_not_squash_the_rest():
    quiet = np.linspace(1.0, 0.5, 200)
    spiked = quiet.copy()
    spiked[40:45] = 30
    lowest, top, highest = visible_range([quiet, spiked])
    assert (lowest, highest) == (0.5, 30) and top < 2
    steep = np.array([10.7, 6, 3, *np.linspace(1.2, 0.8, 97)])
    assert visible_range([steep])[1] < 2
    plain = 0.3 + 2.2 * np.exp(-np.arange(200) / 40)
    assert visible_range([plain])[1] == plain.max()  # an ordinary curve is shown from its start
    rising = np.r_[quiet, np.linspace(0.5, 4, 60)]
    assert visible_range([rising])[1] > 3  # a level that a run holds is no spike


def test_final_loss_has_the_mean_of_the_last_tenth(tmp_path):
    losses = [3.0] * 90 + [1.0, 2.0] * 5
    row = curves.summarize(run(tmp_path, "r", losses))
    assert (row["final_loss"], row["last_tenth_loss"]) == (2.0, 1.5)
    assert curves.summarize(run(tmp_path, "r", []))["last_tenth_loss"] is None


def test_max_steps_are_shown_in_place_of_epochs(tmp_path):
    runs = [run(tmp_path, f"r{rank}", [2, 1], rank=rank, epochs=3, max_steps=20) for rank in (4, 8)]
    text = plots.subtitle(compare_runs(runs))
    assert "max_steps 20" in text and "epochs" not in text
    runs = [run(tmp_path, f"r{rank}", [2, 1], rank=rank, epochs=3, max_steps=None) for rank in (4, 8)]
    assert "epochs 3" in plots.subtitle(compare_runs(runs))


def test_rows_of_one_step_keep_every_column():
    rows = Rows({"step": [2, 1, 2, 2], "loss": [5, 4, 3, math.nan], "eval_loss": [math.nan, math.nan, math.nan, 7]})
    merged = rows.by_step()
    assert merged["step"].tolist() == [1, 2] and merged["loss"].tolist() == [4, 3]
    assert merged.logged("eval_loss").tolist() == [7]


# ---- tables in a narrow terminal


def printed(table, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(fit(table, width))
    return console.export_text().splitlines()


def test_no_flag_is_split_in_80_columns():
    from finetune.memory.plan import MemoryPlan
    from finetune.memory.sizes import sizes_of_billions
    from finetune.memory.tables import changes_table
    from finetune.training.memory_plan import Workload

    plan = MemoryPlan(sizes_of_billions(7.0), Workload(tokens=2048, load_in_4bit=True, gradient_checkpointing=True))
    lines = printed(changes_table(plan), 80)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for flag in ("--no-gradient_checkpointing", "--max_seq_length", "--tokens_per_pass", "--no-load_in_4bit"):
        assert flag in words


def test_markup_in_a_status_is_text(capsys):
    row = dict.fromkeys(tables.SHOWN_COLUMNS, 1.25) | {"status": "a[/INST]b", "run": "r", "notes": ""}
    tables.print_table([row])
    assert "a[/INST]b" in capsys.readouterr().out.split()


def test_summary_table_omits_columns_and_says_so(monkeypatch, capsys, tmp_path):
    row = dict.fromkeys(tables.SHOWN_COLUMNS, 1.25) | {"status": "finished", "run": "rank=64  lr=1e-03", "notes": ""}
    monkeypatch.setattr(tables, "shown_width", lambda: 80)
    tables.print_table([row])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80 and "not shown: trainable" in out
    assert "rank=64" in out.split() and "lr=1e-03" in out.split() and "1.2500" in out.split()


def test_metric_names_are_not_split(tmp_path):
    rows = "| metric | n | base |\n| --- | ---: | ---: |\n| missing_parameter_accuracy | 5 | 0.1 |\n"
    text = f"# Title\n\nfive answers\n\n{rows}"
    console = Console(width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_markdown(text + "\n## F1\n\n| tool | x |\n| --- | ---: |\n| a\\|b | 1 |\n", console)
    words = console.export_text().split()
    assert "missing_parameter_accuracy" in words and "a|b" in words and "five" in words


def test_confusion_matrices_have_the_same_classes():
    base = {"labels": ["a", "(no call)"], "matrix": [[0, 5], [0, 1]]}
    tuned = {"labels": ["a", "b", "(no call)"], "matrix": [[4, 1, 0], [0, 0, 0], [0, 0, 1]]}
    labels, counts = pictured_tables({"base": base, "tuned": tuned})
    assert counts["base"].shape == counts["tuned"].shape == (len(labels), len(labels)) and {"a", "b"} <= set(labels)
    assert counts["base"].sum() == 6 and counts["tuned"].sum() == 6
    assert json.loads(json.dumps(counts["tuned"].tolist()))[labels.index("a")][labels.index("b")] == 1
