"""Runs tests/gpu with a time limit for each test; a test that hangs costs itself only.

A hanging CUDA call cannot be interrupted from Python. So the test process ends itself with a traceback
(`faulthandler.dump_traceback_later`), and the tests that have no outcome yet run in a new process.

    python -m benchmarks.gpu_parts.limit_tests tests/gpu --limit 90 --json FILE
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
STARTED = "started"


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that the test began, and set its limit (this module is also the plugin of the test process)."""
    _note({"test": nodeid, "outcome": STARTED})
    faulthandler.dump_traceback_later(float(os.environ["TEST_LIMIT"]), exit=True)


def pytest_runtest_logreport(report: Any) -> None:
    """Note a test's outcome: of its set-up where that failed or skipped it, else of the test itself."""
    if report.when == "call" or report.outcome != "passed":
        error = "" if report.passed else str(report.longrepr)[-1500:]
        _note({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1), "error": error})


def pytest_runtest_logfinish(nodeid: str) -> None:
    """The limit ends with the test."""
    faulthandler.cancel_dump_traceback_later()


def _note(entry: dict[str, Any]) -> None:
    with Path(os.environ["TEST_NOTES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def run_all(targets: list[str], limit: float, notes: Path, expression: str = "") -> tuple[list[dict[str, Any]], int]:
    """(one entry per test, exit code of the last process); every failure collected, none stopping the others."""
    notes.unlink(missing_ok=True)
    notes.touch()
    while True:
        before = _entries(notes)
        done = [f"--deselect={test}" for test in before]
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_parts.limit_tests", "-p", "no:cacheprovider",
             "-k", expression, *targets, *done], cwd=ROOT, check=False,
            env={**os.environ, "TEST_LIMIT": str(limit), "TEST_NOTES": str(notes)},
        ).returncode  # fmt: skip
        entries = _entries(notes)
        hung = [entry for entry in entries.values() if entry["outcome"] == STARTED]
        for entry in hung:
            entry |= {"outcome": "time limit or crash", "error": f"ended the process (limit {limit:g} s)"}
        with notes.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in hung)
        if not hung or len(entries) == len(before):
            return list(entries.values()), code


def _entries(notes: Path) -> dict[str, dict[str, Any]]:
    """The last note of each test."""
    lines = notes.read_text(encoding="utf-8").splitlines()
    return {entry["test"]: entry for entry in map(json.loads, lines)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", help="test files or folders")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each test (default: 90)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only the tests that pytest's -k selects")
    parser.add_argument("--json", type=Path, required=True, help="one entry per test")
    args = parser.parse_args(argv)
    entries, code = run_all(args.targets, args.limit, args.json.with_suffix(".notes"), args.k)
    write_text_atomic(args.json, json.dumps(entries, indent=1) + "\n")
    bad = [entry for entry in entries if entry["outcome"] not in ("passed", "skipped")]
    # 5: pytest's "no tests were collected", when all that is left was deselected.
    return 1 if bad or not entries or code not in (0, 1, 5) else 0


if __name__ == "__main__":
    sys.exit(main())
