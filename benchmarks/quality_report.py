"""Table, paired tests and picture of quality.py's runs."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.charts.palette import CATEGORIES
from finetune.errors import UserError
from finetune.evaluation.metrics import Metric, Scored, paired_differences

NAMES = {"ours": "ours", "responses": "Unsloth's trainer as it comes", "plain": "Transformers + PEFT"}
MARGIN = 0.05  # "not worse": the interval of the difference lies above -MARGIN
Cells = dict[tuple[str, str, int], dict[str, Any]]  # (task, trainer, seed) -> its JSON


def write_record(folder: Path, target: Path, machine: dict[str, Any]) -> None:
    """Write `target`.json, .md and .png from the finished runs in `folder`."""
    cells: Cells = {}
    for file in sorted(folder.glob("*_*_*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if all("right" in saved for saved in record["saved"].values()):
            cells[record["task"], record["trainer"], record["seed"]] = record
    if not cells:
        raise UserError(f"{folder} has no finished runs; run without --record first")
    runs = [without_texts(one) for one in cells.values()]
    data = {"machine": machine, "comparisons": comparisons(cells), "runs": runs}
    target.with_suffix(".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    text = "\n".join([*table(cells), "", *comparison_table(data["comparisons"])])
    target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(cells, target.with_suffix(".png"))


def without_texts(record: dict[str, Any]) -> dict[str, Any]:
    """The run as it is recorded: verdicts as strings of 0 and 1, without answers and local paths."""
    saved = {
        name: {key: "".join(map(str, value)) if key in ("right", "tool") else value
               for key, value in one.items() if key != "examples"}
        for name, one in record["saved"].items()
    }  # fmt: skip
    return {key: value for key, value in record.items() if key not in ("file", "origins")} | {"saved": saved}


def table(cells: Cells) -> list[str]:
    """One line for each trainer and point: means over the seeds."""
    lines = ["| task | trainer | seeds | point | step | CPU minutes | tools right | all right |",
             "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for task, trainer in dict.fromkeys(key[:2] for key in cells):
        runs = [one for key, one in cells.items() if key[:2] == (task, trainer)]
        for point in runs[0]["saved"]:
            some = [one["saved"][point] for one in runs if point in one["saved"]]
            means = {name: np.mean([np.mean(one[name]) for one in some])
                     for name in ("step", "cpu_minutes", "tool", "right")}  # fmt: skip
            lines.append(
                f"| {task} | {NAMES[trainer]} | {len(some)} | {point.replace('_', ' ')} | {means['step']:.1f} | "
                f"{means['cpu_minutes']:.2f} | {means['tool']:.3f} | {means['right']:.3f} |"
            )
    return lines


def comparisons(cells: Cells) -> list[dict[str, Any]]:
    """Ours - each other trainer at every point that both have, over the seeds that both have."""
    found = []
    for task, trainer in dict.fromkeys(key[:2] for key in cells if key[1] != "ours"):
        seeds = [seed for *names, seed in cells if names == [task, trainer] and (task, "ours", seed) in cells]
        pairs = [(cells[task, trainer, seed], cells[task, "ours", seed]) for seed in seeds]
        for point in pairs[0][0]["saved"] if pairs else ():
            theirs, ours = ([one for run in side for one in scored(run, point)] for side in zip(*pairs, strict=True))
            metrics = [Metric("all right", "right"), Metric("tools right", "tool")]
            for name, values in paired_differences(theirs, ours, metrics_of=metrics).items():
                where = {"task": task, "trainer": trainer, "seeds": seeds, "point": point}
                found.append({**where, "score": name, **values})
    return found


def scored(run: dict[str, Any], point: str) -> Iterable[Scored]:
    """The verdicts of one run at one point; the same held-out row of several seeds counts as one row."""
    saved = run["saved"][point]
    for origin, right, tool in zip(run["origins"], saved["right"], saved["tool"], strict=True):
        yield Scored(Namespace(origin=tuple(origin[:2]), turn=origin[2]), "", [], {"right": right, "tool": tool}, 0.0)


def comparison_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| task | point | ours against | score | theirs | ours | difference (95%) | p (McNemar) | verdict |",
             "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for one in found:
        low, high = one["interval_95"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "not worse" if low > -MARGIN else "undecided"
        lines.append(
            f"| {one['task']} | {one['point'].replace('_', ' ')} | {NAMES[one['trainer']]} | {one['score']} | "
            f"{one['base']:.3f} | {one['tuned']:.3f} | {one['difference']:+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{one['p_value']:.2g} | {verdict} |"
        )
    return lines


def draw(cells: Cells, target: Path) -> None:
    """Score against CPU minutes: a line through the means, a dot for each seed and budget, a ring after equal steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(key[0] for key in cells))
    figure = Figure(figsize=(5.2 * len(tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for color, (trainer, label) in zip(CATEGORIES, NAMES.items(), strict=False):
            if not (runs := [one for key, one in cells.items() if key[:2] == (task, trainer)]):
                continue
            budgets = [(minutes, [np.mean(one["saved"][f"minute_{minutes:g}"]["right"]) for one in runs])
                       for minutes in runs[0]["minutes"]]  # fmt: skip
            axes.plot([x for x, _ in budgets], [np.mean(ys) for _, ys in budgets], color=color, label=label)
            axes.plot([x for x, ys in budgets for _ in ys], [y for _, ys in budgets for y in ys], ".", color=color)
            rings = [one["saved"][f"step_{step}"] for one in runs for step in one["equal_steps"]]
            points = [one["cpu_minutes"] for one in rings], [np.mean(one["right"]) for one in rings]
            axes.plot(*points, "o", markersize=9, color=color, fillstyle="none")
        axes.set(
            title=task, xlabel="CPU minutes of one thread (rings: equal steps)", ylim=(-0.02, 1.02), xlim=(0, None)
        )
        axes.set_ylabel("share of held-out requests answered right")
        axes.legend(frameon=False)
    figure.savefig(target, dpi=110)
