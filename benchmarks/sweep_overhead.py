"""Overhead of a sweep: seconds per run, compared with the same processes started by a plain loop.

    python benchmarks/sweep_overhead.py                 1,000 queued runs of a stub; prints a table
    python benchmarks/sweep_overhead.py --runs 50 --seconds 1

The stub creates a run's folder like train_lora.py, but no model. Only wall time is measured, because most processes of
a sweep are children of Ray's daemons, whose CPU time is not known; so nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "tests" / "sweep_stub.py"


def stub_command(folder: Path, seconds: float) -> list[str]:
    """The stub with one step of `seconds`."""
    folder.mkdir(parents=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"steps": 1, "seconds": seconds}))
    return [sys.executable, "-S", str(STUB), str(plan)]


def bare(folder: Path, runs: int, seconds: float, side_by_side: int) -> None:
    """The same processes without a sweep, `side_by_side` at a time."""
    command = stub_command(folder / "plan", seconds)
    (folder / "s").mkdir()
    running: list[subprocess.Popen] = []
    for rank in range(1, runs + 1):
        if len(running) == side_by_side:
            running.pop(0).wait()
        flags = ["--rank", str(rank), "--experiments_dir", str(folder / "s"), "--name", f"rank{rank}"]
        running.append(subprocess.Popen([*command, *flags]))
    for process in running:
        process.wait()


def sweep(folder: Path, runs: int, seconds: float) -> str:
    command = stub_command(folder / "plan", seconds)
    ranks = [str(rank) for rank in range(1, runs + 1)]
    flags = ["--rank", *ranks, "--experiments_dir", str(folder), "--name", "s", "--cpus_per_run", "1"]
    script = [sys.executable, str(ROOT / "sweep_lora.py"), *flags, "--command", shlex.join(command)]
    result = subprocess.run(script, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = json.loads((folder / "s" / "sweep.json").read_text())["runs"]
    assert len(records) == runs
    assert {record["status"] for record in records} == {"finished"}
    assert {len(record["attempts"]) for record in records} == {1}
    return result.stderr


def timed(function, *arguments) -> float:
    """Wall seconds."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0, help="of the stub's one step (default: 0)")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{options.runs} runs, {cores} side by side, load average before: {os.getloadavg()[0]:.1f}\n")
    print("| what | wall s | wall s per run |\n| --- | --- | --- |")
    walls = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, function, runs, arguments in (
            ("bare processes", bare, options.runs, (options.seconds, cores)),
            ("sweep of 2 runs", sweep, 2, (options.seconds,)),
            ("sweep", sweep, options.runs, (options.seconds,)),
        ):
            wall = walls[name] = timed(function, Path(scratch) / name.replace(" ", "_"), runs, *arguments)
            print(f"| {name} | {wall:.1f} | {wall / runs:.3f} |", flush=True)
    more = (walls["sweep"] - walls["bare processes"]) / options.runs
    start = walls["sweep of 2 runs"]
    print(f"\nOverhead per run: {more:.3f} s, including its share of the sweep's start and end ({start:.1f} s)")


if __name__ == "__main__":
    main()
