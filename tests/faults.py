"""Kill train_lora.py with SIGKILL at random moments, resume it, and compare with a run that was never killed.

    python -m tests.faults --kills 20 --seed 1 [--load_in_4bit …]

Prints one line per kill and a verdict; exit status 1 when adapter or log differ. Further flags go to train_lora.py.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.scripts import ROOT
from tests.training_runs import command, conversation, log_rows, write_rows, write_tiny_model

# Columns that depend on the machine.
TIMING_COLUMNS = {"tokens_per_second", "computed_tokens_per_second", "seconds", "peak_memory_gb"}
FLAGS = ("--format", "chatml", "--batch_size", 2, "--grad_accum", 2, "--epochs", 8, "--dropout", 0.1, "--save_steps", 2,
         "--logging_steps", 3, "--eval_fraction", 0.17, "--eval_steps", 5, "--lr", "5e-3", "--name", "run", "--resume",
         "auto")  # fmt: skip


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What must not depend on kills: the adapter's bytes, and the log without timings."""
    rows = [{name: cell for name, cell in row.items() if name not in TIMING_COLUMNS} for row in log_rows(folder)]
    return (folder / "final_model" / "adapter_model.safetensors").read_bytes(), rows


def start(arguments: tuple[Any, ...], output: Path) -> subprocess.Popen:
    with output.open("a", encoding="utf-8") as file:
        return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=file, stderr=file)


def newest_checkpoint(folder: Path) -> str:
    steps = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    return f"checkpoint-{max(steps)}" if steps else "no checkpoint"


def compare_killed_run(flags: tuple[Any, ...], workspace: Path, kills: int, seed: int) -> list[str]:
    """Run once undisturbed and once with `kills` SIGKILLs; returns one line per kill. AssertionError if they differ.

    Every second kill waits for the run's log, so that not all of them hit the imports.
    """
    generator = random.Random(seed)
    output = workspace / "output.txt"
    undisturbed, killed = workspace / "undisturbed", workspace / "killed"
    began = time.monotonic()
    code = start((*flags, "--experiments_dir", undisturbed), output).wait()
    assert code == 0, output.read_text(encoding="utf-8")
    duration = time.monotonic() - began
    lines = []
    for number in range(kills):
        process = start((*flags, "--experiments_dir", killed), output)
        log = killed / "run" / "training_log.csv"
        began, size = time.time(), log.stat().st_size if log.exists() else 0
        while (
            number % 2
            and process.poll() is None
            and not (log.exists() and (log.stat().st_mtime > began or log.stat().st_size != size))
        ):
            time.sleep(0.01)
        delay = generator.uniform(0, duration / 4 if number % 2 else duration)
        try:
            code = process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        where = newest_checkpoint(killed / "run") if (killed / "run").exists() else "no run folder"
        lines.append(f"kill {number + 1}: after {time.time() - began:.1f} s, exit status {code}, {where}")
        assert code in (0, -9), output.read_text(encoding="utf-8")
    assert start((*flags, "--experiments_dir", killed), output).wait() == 0, output.read_text(encoding="utf-8")
    expected, found = outcome(undisturbed / "run"), outcome(killed / "run")
    assert found[1] == expected[1], "the rows of training_log.csv differ"
    assert found[0] == expected[0], "the adapter's bytes differ"
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        rows = write_rows(workspace / "rows.jsonl", [conversation(number) for number in range(12)])
        model = write_tiny_model(workspace / "model")
        try:
            lines = compare_killed_run(
                ("--model", model, "--dataset", rows, *FLAGS, *flags), workspace, arguments.kills, arguments.seed
            )
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    print(*lines, sep="\n")
    print(f"{arguments.kills} kills: adapter and log equal those of an undisturbed run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
