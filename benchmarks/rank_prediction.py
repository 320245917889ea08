"""Five trained ranks beside the truncations of the largest: how well one run predicts the others.

    python benchmarks/rank_prediction.py --seeds 3407 3408 --folder experiments/rank_prediction

A short setting that a CPU can afford: the demo's model and recipe, rows of four of its fifteen tools with one call
each, 20 steps of 6 rows. Runs and reports that exist already are not repeated. Writes results.json, results.md and
results.png into the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.charts.palette import ramp  # noqa: E402

RANKS = (4, 8, 16, 32, 64)
TOOLS = {"POST /db/unit", "POST /db/cons", "POST /db/grup", "GET /db/node"}
TRAINING = ("--config", "configs/demo.yaml", "--lr", "1e-3", "--batch_size", "6", "--max_steps", "20")
SCORE = "parameter_accuracy"


def write_rows(source: Path, target: Path) -> Path:
    """Rows of `source` with one call, of one of `TOOLS`, and the schemas of these tools alone."""
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        calls = {call["function"]["name"] for m in row["messages"] for call in m.get("tool_calls") or []}
        if len(row["messages"]) == 3 and calls and calls <= TOOLS:
            tools = [tool for tool in json.loads(row["tools"]) if tool["function"]["name"] in TOOLS]
            kept.append(json.dumps(row | {"tools": json.dumps(tools)}, ensure_ascii=False) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(kept), encoding="utf-8")
    return target


def measure(folder: Path, seed: int, rank: int) -> dict[str, Any] | None:
    """The report of one run; trains and evaluates what is missing. None where that fails."""
    run, report = folder / f"r{rank}_s{seed}", folder / f"r{rank}_s{seed}" / "evaluation" / "ranks.json"
    commands = {
        run / "final_model": ["train_lora.py", *TRAINING, "--rank", rank, "--seed", seed, "--dataset",
                              folder / "train.jsonl", "--name", run.name, "--experiments_dir", folder],
        report: ["evaluate_lora.py", run, "--dataset", folder / "heldout.jsonl", "--ranks",
                 ",".join(map(str, RANKS)) if rank == max(RANKS) else rank],
    }  # fmt: skip
    for result, command in commands.items():
        arguments = [sys.executable, *map(str, command)]
        if not result.exists() and subprocess.run(arguments, cwd=ROOT, check=False).returncode:
            return None
    return read(report)


def losses_alone(folder: Path, seed: int, every: int) -> dict[int, dict[str, Any]]:
    """As the reports of one seed's runs, without scores, on every N-th held-out row; the base is loaded once."""
    from finetune.evaluation.rank_losses import LossMeter, encode_loss_rows
    from finetune.models.adapter import attach_adapter
    from finetune.models.truncation import TruncatableAdapter, energy_share
    from finetune.runs.find import find_run

    reports: dict[int, dict[str, Any]] = {}
    base = rows = None
    for rank in reversed(RANKS):
        path = folder / f"r{rank}_s{seed}"
        if not (path / "final_model").is_dir():
            continue
        run = find_run(path)
        if base is None:
            loaded, fmt = run.load_base()
            base, tokenizer = loaded.model, loaded.tokenizer
            rows = encode_loss_rows(run, tokenizer, fmt, [str(folder / "heldout.jsonl")])[0].sequences[::every]
        model = attach_adapter(base, run.adapter)
        adapter, meter = TruncatableAdapter(model), LossMeter(model, tokenizer, rows)
        reports[rank] = {}
        for cut in RANKS if rank == max(RANKS) else (rank,):
            with adapter.at_rank(cut):
                energy = energy_share(adapter.spectra, cut)
                reports[rank][str(cut)] = {"eval_loss": round(meter.loss(), 6), "energy": round(energy, 6)}
            print(f"seed {seed}, trained {rank}, cut to {cut}: {reports[rank][str(cut)]}", flush=True)
        base = model.unload()
    print(f"{meter.tokens} trained tokens of {len(rows)} sequences")
    return reports


def read(report: Path) -> dict[str, Any] | None:
    return json.loads(report.read_text(encoding="utf-8"))["ranks"] if report.is_file() else None


def collect(reports: dict[int, dict[int, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    """An entry for each seed and rank: loss and score of the trained run, if there is one, and of the truncation."""
    entries = []
    for seed, of_ranks in reports.items():
        largest = of_ranks.get(max(RANKS))
        for rank in RANKS if largest is not None else ():
            own, cut = (of_ranks.get(rank) or {}).get(str(rank), {}), largest[str(rank)]
            entries.append(
                {"seed": seed, "rank": rank, "trained": own.get("eval_loss"), "truncated": cut["eval_loss"],
                 "trained_score": own.get(SCORE), "truncated_score": cut.get(SCORE), "energy": cut["energy"]}
            )  # fmt: skip
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    """Means over the seeds that have a value."""
    columns = (f"{what}, {how}" for what in ("loss", SCORE) for how in ("trained", "truncated"))
    header = ["rank", *columns, "energy kept"]
    lines = [header, ["---:"] * len(header)]
    for rank in RANKS:
        of = [entry for entry in entries if entry["rank"] == rank]
        cells = [str(rank)]
        for name in ("trained", "truncated", "trained_score", "truncated_score", "energy"):
            values = [entry[name] for entry in of if entry[name] is not None]
            cells.append(f"{mean(values):.4f}" if values else "")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(entries: list[dict[str, Any]], output: Path) -> None:
    """Loss of trained ranks and of truncations, one pair of lines for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seeds = sorted({entry["seed"] for entry in entries})
    for color, seed in zip(ramp(len(seeds)), seeds, strict=True):
        of = sorted((entry for entry in entries if entry["seed"] == seed), key=lambda entry: entry["rank"])
        for name, line in (("trained", "o-"), ("truncated", "s--")):
            label = f"{name}, seed {seed}" if name == "trained" else f"rank {max(RANKS)} cut to it, seed {seed}"
            known = [one for one in of if one[name] is not None]
            axes.plot([one["rank"] for one in known], [one[name] for one in known], line, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, list(map(str, RANKS)))
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel("evaluation loss (nats per token)")
    axes.grid(axis="y", color="#E6E6E6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments" / "rank_prediction")
    parser.add_argument(
        "--losses",
        type=int,
        metavar="N",
        help="train nothing and score no answers: losses alone of the runs that exist, on every N-th held-out row",
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    write_rows(ROOT / "data/samples/gennx_train.jsonl", folder / "train.jsonl")
    write_rows(ROOT / "data/samples/gennx_heldout.jsonl", folder / "heldout.jsonl")
    reports = {
        seed: losses_alone(folder, seed, args.losses) if args.losses
        else {rank: measure(folder, seed, rank) for rank in reversed(RANKS)} for seed in args.seeds
    }  # fmt: skip
    entries = collect(reports)
    (folder / "results.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(entries), encoding="utf-8")
    if entries:
        draw(entries, folder / "results.png")
    print(markdown(entries), end="")


if __name__ == "__main__":
    main()
