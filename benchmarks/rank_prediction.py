"""Five trained ranks beside the truncations of the largest: how well one run predicts the others.

    python benchmarks/rank_prediction.py --seeds 3407 3408 3409
    python benchmarks/rank_prediction.py --seeds 3407 --repair_steps 4        and the truncations after 4 more steps
    python benchmarks/rank_prediction.py --limit 12 -- --max_steps 12 --batch_size 8        a shorter one

The demo's model, data and recipe, shortened to 25 steps of 12 rows. Runs and reports that exist already
are not repeated; results.json, results.md and results.png are written after every seed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.charts.palette import ramp  # noqa: E402

RANKS = (4, 8, 16, 32, 64)
TRAINING = ("--config", "configs/demo.yaml", "--batch_size", 12, "--max_steps", 25)
HELD_OUT = ("--dataset", "data/samples/demo_heldout.jsonl", "--max_new_tokens", 80)
REPORT = "evaluation/ranks.json"
SCORES = {"tool_name_accuracy": "tool name", "parameter_accuracy": "parameters"}
PROCESSES = multiprocessing.get_context("fork")  # not on Windows
HOW = ("trained", "truncated", "repaired")


def make(result: Path, script: str, *arguments: Any) -> bool:
    """Run a script, which makes `result`, unless it exists; whether it does now."""
    if not result.exists():
        process = PROCESSES.Process(target=run_script, args=(script, list(map(str, arguments))))
        process.start()
        process.join()
    return result.exists()


def run_script(script: str, arguments: list[str]) -> None:
    """In a copy of the first process, which has the imports already: they would take as long as four steps."""
    sys.exit(importlib.import_module(script).main(arguments))


def train_and_evaluate(run: Path, ranks: tuple[int, ...], limit: int, *flags: Any) -> None:
    """Make the run, and its report for `ranks` on the first `limit` held-out rows."""
    if run.is_dir() and not (run / "final_model").exists():
        shutil.rmtree(run)  # stopped in one of its few steps
    names = ("--experiments_dir", run.parent, "--name", run.name)
    if make(run / "final_model", "train_lora", *TRAINING, *flags, *names):
        report = ("--limit", limit, "--ranks", ",".join(map(str, ranks)))
        make(run / REPORT, "evaluate_lora", run, *HELD_OUT, *report)


def measure(folder: Path, seed: int, limit: int, repair_steps: int, flags: list[str]) -> None:
    """All runs and reports of one seed, largest rank first."""
    for rank in reversed(RANKS):
        ranks = RANKS if rank == max(RANKS) else (rank,)
        train_and_evaluate(folder / f"trained_{rank}_{seed}", ranks, limit, "--rank", rank, "--seed", seed, *flags)
    for rank in RANKS[:-1] if repair_steps else ():
        cut, largest = folder / f"cut_{rank}_{seed}", folder / f"trained_{max(RANKS)}_{seed}"
        if make(cut, "export_lora", largest, "--to", "adapter", "--rank", rank, "--output", cut):
            alpha = json.loads((cut / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
            repair = (*flags, "--init_adapter", cut, "--rank", rank, "--alpha", alpha, "--max_steps", repair_steps)
            repair += ("--seed", seed)
            train_and_evaluate(folder / f"repaired_{rank}_{seed}", (rank,), limit, *repair)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Loss and scores of each seed, rank and way to get it, as far as there are reports."""
    entries = []
    for report in sorted(folder.glob(f"*/{REPORT}")):
        how, _, seed = report.relative_to(folder).parts[0].split("_")
        ranks = json.loads(report.read_text(encoding="utf-8"))["ranks"]
        for rank, values in ranks.items():
            kept = {name: values[name] for name in ("eval_loss", "energy", *SCORES) if name in values}
            ways = [how] if len(ranks) == 1 else ["truncated", how] if int(rank) == max(RANKS) else ["truncated"]
            entries += [{"seed": int(seed), "rank": int(rank), "how": way, **kept} for way in ways]
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    ways = [how for how in HOW if any(entry["how"] == how for entry in entries)]
    names = {"eval_loss": "loss", **SCORES}
    header = ["rank", *(f"{what}, {how}" for what in names.values() for how in ways)]
    lines = [header, ["---:"] * len(header)]
    for rank in RANKS:
        cells = [str(rank)]
        for name in names:
            for how in ways:
                of = [one[name] for one in entries if (one["rank"], one["how"]) == (rank, how) and name in one]
                cells.append(f"{mean(of):.4f}" if of else "")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(entries: list[dict[str, Any]], output: Path) -> None:
    """Loss, and scores above zero, against the rank: the mean over the seeds as a line, every seed as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named = {"eval_loss": "evaluation loss, nats per token", **SCORES}
    titles = {name: title for name, title in named.items() if any(entry.get(name) for entry in entries)}
    figure = Figure(figsize=(max(8, 4 * len(titles)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = dict(zip(HOW, ("trained at this rank", f"rank {max(RANKS)} cut to it", "cut, then repaired"), strict=True))
    for axes, (name, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        for color, line, how in zip(ramp(len(HOW)), ("o-", "s--", "^:"), HOW, strict=True):
            of = [entry for entry in entries if entry["how"] == how and name in entry]
            ranks = sorted({entry["rank"] for entry in of})
            means = [mean(entry[name] for entry in of if entry["rank"] == rank) for rank in ranks]
            if of:
                axes.plot(ranks, means, line[1:], color=color, label=labels[how])
                axes.plot([one["rank"] for one in of], [one[name] for one in of], line[0], color=color, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, list(map(str, RANKS)))
        axes.minorticks_off()
        axes.set_xlabel("rank")
        axes.set_title(title)
        axes.grid(axis="y", color="#E6E6E6")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(output, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 3408, 3409])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments" / "rank_prediction")
    parser.add_argument("--limit", type=int, default=40, metavar="N", help="held-out rows to evaluate")
    parser.add_argument("--repair_steps", type=int, default=0, metavar="N", help="train each truncation N steps longer")
    parser.add_argument("flags", nargs="*", help="after --: further flags of train_lora.py for every run")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    for module in ("finetune.training.run", "finetune.evaluation.run"):
        importlib.import_module(module)
    for seed in args.seeds:
        measure(folder, seed, args.limit, args.repair_steps, args.flags)
        entries = collect(folder)
        (folder / "results.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        (folder / "results.md").write_text(markdown(entries), encoding="utf-8")
        if entries:
            draw(entries, folder / "results.png")
    print(markdown(entries), end="")


if __name__ == "__main__":
    main()
