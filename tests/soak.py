"""Long runs on the tiny model, and many at once.

    python -m tests.soak --steps 3000     memory and open files of one run, measured while it trains; slopes reported
    python -m tests.soak --runs 20        so many runs started within a second, while others read their folders

Exit status 1 when memory or open files grow, or a run or a reader fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from tests.faults import write_byte_model
from tests.scripts import QUIET, ROOT
from tests.training_runs import command, config_of, conversation, log_rows, write_rows

MAX_MB_PER_1000_STEPS = 5.0
MAX_FILES_PER_1000_STEPS = 0.5
FLAGS = ("--format", "chatml", "--batch_size", 1, "--grad_accum", 1, "--logging_steps", 1, "--name", "run")


def slopes(samples: list[tuple[int, float, int]]) -> tuple[float, float]:
    """Growth per 1,000 steps of memory (MB) and open files over the second half of (step, MB, files)."""
    steps, memory, files = np.array(samples[len(samples) // 2 :], float).T
    return tuple(1000 * np.polyfit(steps, values, 1)[0] for values in (memory, files))  # type: ignore[return-value]


def soak(folder: Path, steps: int) -> bool:
    write_byte_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(60)])
    arguments = command(
        "--model", folder / "model", "--dataset", rows, *FLAGS, "--max_steps", steps, "--save_steps",
        100, "--save_total_limit", 2, "--eval_fraction", 0.1, "--eval_steps", 50, "--experiments_dir", folder,
    )  # fmt: skip
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | QUIET, stdout=output, stderr=output)
    watched, log, samples = psutil.Process(process.pid), folder / "run" / "training_log.csv", []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            memory, files = watched.memory_info().rss / 1e6, watched.num_fds()
            if memory and log.exists() and (step := log.read_text().count("\n") - 1) > 0:  # none left: it has ended
                samples.append((step, memory, files))
        except psutil.Error:
            break
    if process.wait():
        print((folder / "output").read_text()[-2000:])
        return False
    memory, files = slopes(samples)
    first, last = samples[len(samples) // 2], samples[-1]
    print(f"{steps} steps, {len(samples)} samples; from step {first[0]} to {last[0]}:")
    print(f"memory  {first[1]:.1f} to {last[1]:.1f} MB, {memory:+.2f} MB per 1,000 steps")
    print(f"files   {first[2]} to {last[2]} open, {files:+.2f} per 1,000 steps")
    return memory <= MAX_MB_PER_1000_STEPS and files <= MAX_FILES_PER_1000_STEPS


def read_all(folder: Path, stop: threading.Event, problems: list[str], counts: list[int]) -> None:
    """What other commands do with a folder of runs: list, read configs and logs."""
    while not stop.is_set():
        for run in [path for path in folder.iterdir() if not path.name.startswith(".")]:
            try:
                json.loads((run / "experiment_config.json").read_text(encoding="utf-8"))
                if (run / "training_log.csv").exists():
                    for row in log_rows(run):
                        assert None not in row.values() and int(row["step"]) > 0, row
                counts[0] += 1
            except (OSError, ValueError, AssertionError) as error:
                problems.append(f"{run.name}: {error}")


def draw_all(folder: Path, stop: threading.Event, problems: list[str], counts: list[int]) -> None:
    """visualize_loss.py of all runs, again and again; there may be none yet."""
    command = [sys.executable, str(ROOT / "visualize_loss.py"), str(folder), "-o", str(folder.parent / "runs.png")]
    while not stop.is_set():
        drawn = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, check=False)
        if drawn.returncode == 0:
            counts[1] += 1
        elif drawn.returncode != 2 or not drawn.stderr.startswith("error: "):
            problems.append(f"visualize_loss.py: {drawn.returncode}, {drawn.stderr[-500:]}")


def start_many(folder: Path, runs: int) -> bool:
    from finetune.models.loading import import_unsloth

    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(12)])
    model = write_byte_model(folder / "model")
    import_unsloth()
    from trl import SFTTrainer  # noqa: F401

    from tests.scripts import run_forked

    experiments = folder / "experiments"
    experiments.mkdir()
    flags = [flag for flag in FLAGS if flag not in ("--name", "run")]
    arguments = command("--model", model, "--dataset", rows, *flags, "--max_steps", 3, "--save_steps", 1,
                        "--experiments_dir", experiments)[1:]  # fmt: skip
    began = time.monotonic()
    children = [run_forked(arguments, folder / f"output_{number}") for number in range(runs)]
    print(f"{runs} runs started in {time.monotonic() - began:.2f} s")
    stop, problems, counts = threading.Event(), [], [0, 0]
    readers = [
        threading.Thread(target=read, args=(experiments, stop, problems, counts)) for read in (read_all, draw_all)
    ]
    for reader in readers:
        reader.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stop.set()
    for reader in readers:
        reader.join()
    finished = [path for path in experiments.iterdir() if config_of(path)["status"] == "finished"]
    complete = [path for path in finished if [row["step"] for row in log_rows(path)] == ["1", "2", "3"]]
    adapters = {(path / "final_model" / "adapter_model.safetensors").read_bytes() for path in complete}
    print(
        f"exit status 0: {codes.count(0)}; run folders: {len(list(experiments.iterdir()))}; complete: {len(complete)}; "
        f"different adapters: {len(adapters)}; folders read meanwhile: {counts[0]}; pictures drawn: {counts[1]}"
    )
    print(*problems[:5], sep="\n")
    failed = next((number for number, code in enumerate(codes) if code), None)
    if failed is not None:
        print((folder / f"output_{failed}").read_text()[-2000:])
    return len(complete) == runs and len(adapters) == 1 and not any(codes) and not problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--runs", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        passed = start_many(Path(name), options.runs) if options.runs else soak(Path(name), options.steps or 3000)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
