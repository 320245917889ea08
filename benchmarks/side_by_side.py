"""Several runs at a time on one GPU or CPU compared with one after another: which is the better default?

sweep_lora.py trains the same ranks of one model for a few steps, first one at a time, then N at a time (on a GPU by
--gpus_per_run 1/N, on a CPU by --cpus_per_run cores/N), and in reverse order in the next repeat.

  python benchmarks/side_by_side.py                                   SmolLM2-135M, bundled; about 30 minutes on a GPU
  python benchmarks/side_by_side.py --at_once 2 --steps 8             two ranks, eight steps: enough for two cores
  python benchmarks/side_by_side.py --model Qwen/Qwen2.5-0.5B-Instruct --json 0.5b.json -- --format auto --lr 2e-4
  python benchmarks/side_by_side.py --show side_by_side.json          print the table of a file

Two ratios, both above 1 where side by side is faster. "whole": from the first run's start to the last one's end, with
imports and loading, without the start of Ray and the final chart. "steps": the steps only, without each run's first
two; long runs approach it. Nothing else should run on the machine. Of several GPUs the first is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.errors import UserError, one_line_errors  # noqa: E402
from finetune.files import write_text_atomic  # noqa: E402
from finetune.flags.types import positive_int  # noqa: E402
from finetune.runs.run_log import COLUMNS, read_rows  # noqa: E402

RANKS = (4, 8, 16, 32, 64, 12, 24, 48)
WARMUP_STEPS = 2  # first steps of a run, not counted: kernels are compiled, memory is allocated
MIN_SPEEDUP = 1.1  # for a default that needs the memory of N runs
SECONDS_BETWEEN_READINGS = 0.5


def words_of(args: argparse.Namespace, at_once: int, folder: Path, name: str, runs: int) -> list[str]:
    """The command of one sweep: `runs` ranks, `at_once` of them at a time."""
    if args.cuda:
        share = ["--gpus_per_run", f"{10_000 // at_once / 10_000:g}"]  # rounded down, or N would not fit into one
    else:
        share = ["--gpus_per_run", "0", "--cpus_per_run", str(args.cores // at_once)]
    sweep = ["--rank", *map(str, RANKS[:runs]), "--experiments_dir", str(folder), "--name", name, "--retries", "0"]
    if args.command:
        sweep += ["--command", args.command]
    flags = ["--config", str(ROOT / "configs" / "demo_full.yaml"), "--dataset",
             str(ROOT / "data" / "samples" / "gennx_train.jsonl"), "--model", args.model,
             "--max_steps", str(args.steps), "--save_steps", "0"]  # fmt: skip
    if args.cuda:
        # By default the free memory limits a pass, and N runs at a time have less of it.
        flags += ["--tokens_per_pass", "8192"]
    return [sys.executable, str(ROOT / "sweep_lora.py"), *sweep, *share, "--", *flags, *args.flags]


def measure(args: argparse.Namespace, at_once: int, runs: int) -> dict[str, Any]:
    """The record of one sweep; UserError with its last line when a run has failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with gpu_memory_peak(args.gpu) as peak:
            code, output = run_quietly(words_of(args, at_once, folder, "s", runs), args.env)
        if code != 0:
            failed = next((line for line in output if "failed: " in line), output[-1] if output else "no output")
            raise UserError(f"{runs} runs, {at_once} at a time: exit status {code}: {failed}")
        record = record_of(folder / "s", at_once)
    return record | {"gpu_gb": peak.get("gb")}


def run_quietly(command: list[str], env: dict[str, str]) -> tuple[int, list[str]]:
    """(exit status, lines of stderr). A Ctrl-C also reaches the sweep, which gets the time to end its runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=pipe, text=True, encoding="utf-8",
                          errors="replace") as process:  # fmt: skip
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            process.communicate()
            raise
    return process.returncode, errors.strip().splitlines()


def one_gpu(environment: Mapping[str, str]) -> tuple[dict[str, str], int | None]:
    """(the environment with only the first of its visible GPUs, that GPU's index for the driver).

    None: the GPU is given by its UUID, or none is visible.
    """
    first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    env = {**environment, "CUDA_VISIBLE_DEVICES": first, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the driver's order
    return env, int(first) if first.isdecimal() else None


@contextlib.contextmanager
def gpu_memory_peak(gpu: int | None) -> Iterator[dict[str, float]]:
    """Peak memory in use on the GPU inside the block, by all processes: {"gb": …}; {} without a GPU."""
    from finetune.memory.devices import NoDriver, open_driver

    peak: dict[str, float] = {}
    stop = threading.Event()

    def watch() -> None:
        with contextlib.suppress(NoDriver, UserError), open_driver() as driver:
            while not stop.is_set():
                used = next((one.memory_used_gb for one in driver.gpus() if one.index == gpu), None)
                if used is not None:
                    peak["gb"] = max(used, peak.get("gb", 0.0))
                stop.wait(SECONDS_BETWEEN_READINGS)

    thread = threading.Thread(target=watch, daemon=True)
    if gpu is not None:
        thread.start()
    try:
        yield peak
    finally:
        stop.set()
        if gpu is not None:
            thread.join()


def record_of(folder: Path, at_once: int) -> dict[str, Any]:
    """Times and memory of a finished sweep; UserError unless `at_once` runs were side by side.

    whole_s: first start to last end. steps_s: seconds in steps of all runs, without their first steps. peak_gb: sum of
    the `at_once` largest peaks of single runs.
    """
    runs = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["runs"]
    spans, seconds, peaks, losses = [], [], [], {}
    for run in runs:
        attempt = run["attempts"][-1]
        spans.append(tuple(datetime.fromisoformat(attempt[name]).timestamp() for name in ("started", "ended")))
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in read_rows(folder / run["name"] / "training_log.csv")]
        if len(rows) <= WARMUP_STEPS:
            raise UserError(f"{run['name']} has logged {len(rows)} steps; --steps must be > {WARMUP_STEPS}")
        seconds.append(float(rows[-1]["seconds"]) - float(rows[WARMUP_STEPS - 1]["seconds"]))
        peaks.append(max(float(row["peak_memory_gb"]) for row in rows))
        losses[run["name"]] = float(rows[-1]["loss"])
    if (most := most_at_once(spans)) != at_once:
        raise UserError(f"{at_once} runs should have been side by side, but {most} were; stop other programs, or use a "
                        "machine with a core for each run")  # fmt: skip
    config = json.loads((folder / runs[0]["name"] / "experiment_config.json").read_text(encoding="utf-8"))
    return {
        "at_once": at_once, "runs": len(runs), "whole_s": round(max(end for _, end in spans) - min(spans)[0], 2),
        "steps_s": round(sum(seconds), 2), "peak_gb": round(sum(sorted(peaks)[-at_once:]), 2),
        "dtype": config.get("dtype"), "losses": losses,
    }  # fmt: skip


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """The largest number of (start, end) that overlap."""
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def ratios(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, list[float]]]:
    """at_once -> {"whole", "steps"}: for each repeat, how many times faster than one after another.

    The N-th record of its kind belongs to the N-th repeat. Runs that share a GPU are slower each, but N of them do N
    times the steps of one in that time.
    """
    ones = [one for one in records if one["at_once"] == 1]
    found: dict[int, dict[str, list[float]]] = {}
    for at_once in sorted({one["at_once"] for one in records} - {1}):
        pairs = list(zip(ones, [one for one in records if one["at_once"] == at_once], strict=False))
        found[at_once] = {
            "whole": [one["whole_s"] / other["whole_s"] for one, other in pairs],
            "steps": [at_once * one["steps_s"] / max(other["steps_s"], 1e-9) for one, other in pairs],
        }
    return found


def verdict(records: Sequence[dict[str, Any]], cuda: bool) -> str:
    """One line: the better default. Side by side must be MIN_SPEEDUP times faster by both ratios in every repeat."""
    better = {
        at_once: median(kinds["steps"])
        for at_once, kinds in ratios(records).items()
        if all(values and min(values) >= MIN_SPEEDUP for values in kinds.values())
    }
    if not better:
        flag = "--gpus_per_run 1" if cuda else "--cpus_per_run all of them"
        return f"default should be: one after another ({flag}); nothing was {MIN_SPEEDUP:g} times faster every time"
    best = max(better, key=lambda at_once: better[at_once])
    flag = f"--gpus_per_run {1 / best:.4g}" if cuda else f"--cpus_per_run cores/{best}"
    return f"default should be: {best} at a time ({flag}) where the memory estimate says that {best} fit"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per number of runs, medians over the repeats, ratios with minimum and maximum."""
    lines = ["| at a time | repeats | whole s | s in steps, all runs | peak GB of the runs | GB in use on the GPU | "
             "whole: times faster | steps: times faster |",
             "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    faster = ratios(records)
    for at_once in sorted({one["at_once"] for one in records}):
        some = [one for one in records if one["at_once"] == at_once]
        middle = {name: median(one[name] for one in some) for name in ("whole_s", "steps_s")}
        used = [one["gpu_gb"] for one in some if one.get("gpu_gb")]
        cells = [at_once, len(some), f"{middle['whole_s']:.1f}", f"{middle['steps_s']:.1f}",
                 f"{max(one['peak_gb'] for one in some):.2f}", f"{max(used):.2f}" if used else ""]  # fmt: skip
        for kind in ("whole", "steps"):
            values = faster.get(at_once, {}).get(kind, [])
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{median(values):.2f}{spread}" if values else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(data: dict[str, Any]) -> str:
    """The text report of a file of records."""
    records = data["records"]
    facts = data["machine"] | {"dtype": records[0]["dtype"]}
    losses_by_rank = [[one["losses"][name] for one in records] for name in records[0]["losses"]]
    spread = max(max(losses) - min(losses) for losses in losses_by_rank)
    return "\n".join(
        [
            f"{data['command']}\n{json.dumps(facts)}\n",
            table(records),
            "",
            f"The final losses of a rank differ by at most {spread:.1e} between sweeps.",
            *data["failed"],
            verdict(records, data["cuda"]),
        ]
    )


def show(path: Path) -> None:
    """Print the report of a file; UserError when it is not a file of records."""
    try:
        print(report(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a file of this benchmark, or has no records yet ({error!r})") from error


def machine_facts(env: dict[str, str]) -> dict[str, Any]:
    """Processor, cores, GPU, versions; in a process of its own, because CUDA takes memory of the GPU."""
    code = "import json; from benchmarks.throughput import machine; print(json.dumps(machine()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="Hub id or folder (default: smollm2-135m, bundled)")
    add("--at_once", type=positive_int, nargs="+", metavar="N", help="default: 2 4 on a GPU, 2 on a CPU")
    add("--steps", type=positive_int, metavar="N", help="of each run (default: 100 on a GPU, 8 on a CPU)")
    add("--repeats", type=positive_int, default=3, metavar="N", help="of each number of runs, in turn (default: 3)")
    add("--json", type=Path, default=Path("side_by_side.json"), metavar="FILE",
        help="records, written after every sweep (default: side_by_side.json)")  # fmt: skip
    add("--show", type=Path, metavar="FILE", help="measure nothing, print the report of a file")
    add("--command", help="run this instead of train_lora.py, followed by the same flags")
    add("flags", nargs="*", metavar="-- FLAGS", help="more flags of every run, such as --format auto")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.show:
        show(args.show)
        return 0
    args.env, args.gpu = one_gpu(os.environ)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    facts = machine_facts(args.env)
    args.cuda, args.cores = facts["gpu"] is not None, facts["cores"]
    if not args.cuda:
        args.env, args.gpu = dict(os.environ), None
    args.at_once = args.at_once or ([2, 4] if args.cuda else [2])
    args.steps = args.steps or (100 if args.cuda else 8)
    counts, runs = [1, *(n for n in sorted(set(args.at_once)) if n > 1)], max(args.at_once)
    if len(counts) == 1 or runs > len(RANKS) or any(runs % n for n in counts):
        raise UserError(f"--at_once {args.at_once}: must be numbers from 2 to {len(RANKS)} that divide the largest")
    if not args.cuda and runs > args.cores:
        raise UserError(f"--at_once {runs}: this machine has {args.cores} cores; a run needs one")
    if args.steps <= WARMUP_STEPS:
        raise UserError(f"--steps {args.steps}: must be > {WARMUP_STEPS}; the first {WARMUP_STEPS} are not counted")
    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/side_by_side.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": facts | {"load_average": load}, "cuda": args.cuda, "model": args.model, "steps": args.steps,
        "ranks": RANKS[:runs], "started": datetime.now().astimezone().isoformat(timespec="seconds"), "records": [],
        "failed": [],
    }  # fmt: skip
    print("warm-up run, not counted: reads files and compiles kernels", file=sys.stderr, flush=True)
    measure(args, 1, 1)
    for repeat in range(args.repeats):
        for at_once in counts[:: 1 if repeat % 2 == 0 else -1]:
            try:
                record = measure(args, at_once, runs)
            except UserError as error:
                if at_once == 1:
                    raise
                counts.remove(at_once)  # such as out of memory: a result too, and the others are kept
                data["failed"].append(f"{at_once} at a time failed: {error}")
                data["records"] = [one for one in data["records"] if one["at_once"] != at_once]
                print(data["failed"][-1], file=sys.stderr, flush=True)
                continue
            data["records"].append(record)
            write_text_atomic(args.json, json.dumps(data, indent=1) + "\n")
            print(f"{at_once} at a time: {record['whole_s']:.1f} s, steps {record['steps_s']:.1f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
        if len(counts) == 1:
            break
    data["verdict"] = verdict(data["records"], args.cuda)
    write_text_atomic(args.json, json.dumps(data, indent=1) + "\n")
    print(report(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
