"""What a sweep costs beyond its runs: seconds per run, next to the same processes started by a plain loop.

    python benchmarks/sweep_overhead.py                 1,000 queued runs of a stub; prints a table
    python benchmarks/sweep_overhead.py --runs 50 --seconds 1

The stub makes a run's folder as train_lora.py does, and no model. CPU time is that of the sweep, of Ray and of the runs
together; it says more than the clock on a machine that has other work.
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
    """The same processes without a sweep, so many at a time."""
    command = stub_command(folder / "plan", seconds)
    (folder / "s").mkdir()
    going: list[subprocess.Popen] = []
    for rank in range(1, runs + 1):
        if len(going) == side_by_side:
            going.pop(0).wait()
        words = ["--rank", str(rank), "--experiments_dir", str(folder / "s"), "--name", f"rank{rank}"]
        going.append(subprocess.Popen([*command, *words]))
    for process in going:
        process.wait()


def sweep(folder: Path, runs: int, seconds: float) -> str:
    command = stub_command(folder / "plan", seconds)
    ranks = [str(rank) for rank in range(1, runs + 1)]
    words = ["--rank", *ranks, "--experiments_dir", str(folder), "--name", "s", "--cpus_per_run", "1"]
    script = [sys.executable, str(ROOT / "sweep_lora.py"), *words, "--command", shlex.join(command)]
    result = subprocess.run(script, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = json.loads((folder / "s" / "sweep.json").read_text())["runs"]
    assert len(records) == runs
    assert {record["status"] for record in records} == {"finished"}
    assert {len(record["attempts"]) for record in records} == {1}
    return result.stderr


def timed(function, *arguments) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all child processes)."""
    begin, used = time.perf_counter(), os.times()
    function(*arguments)
    after = os.times()
    cpu = after.children_user + after.children_system - used.children_user - used.children_system
    return time.perf_counter() - begin, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.0, help="of the stub's one step (default: 0)")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{options.runs} runs, {cores} side by side, load average before: {os.getloadavg()[0]:.1f}\n")
    print("| what | wall s | CPU s | wall s a run | CPU s a run |\n| --- | --- | --- | --- | --- |")
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, function, runs, arguments in (
            ("bare processes", bare, options.runs, (options.seconds, cores)),
            ("sweep of 2 runs", sweep, 2, (options.seconds,)),
            ("sweep", sweep, options.runs, (options.seconds,)),
        ):
            wall, cpu = rows[name] = timed(function, Path(scratch) / name.replace(" ", "_"), runs, *arguments)
            print(f"| {name} | {wall:.1f} | {cpu:.1f} | {wall / runs:.3f} | {cpu / runs:.3f} |", flush=True)
    start = rows["sweep of 2 runs"]
    for what, index in (("wall", 0), ("CPU", 1)):
        more = (rows["sweep"][index] - rows["bare processes"][index]) / options.runs
        print(f"\nOverhead a run, {what}: {more:.3f} s, with the sweep's own start and end ({start[index]:.1f} s)")


if __name__ == "__main__":
    main()
