"""Runs the parts of gpu.py one after another, each in a process of its own with its own time limit.

What is known is written after every part, so that a machine that is taken away loses one part at most. A second start
runs what is missing or failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, TIME_LIMIT, NO_TIME = "done", "failed", "time limit", "no time left"
LINES_OF_A_FAILURE = 12
MAX_AT_ONCE = 10  # parts of a group, on 15 cores or more


@dataclass(frozen=True)
class Part:
    """One command; consecutive parts of one `group` run at the same time.

    limit: seconds; result: a JSON file that the command writes, taken into the report; text: a text file likewise.
    """

    name: str
    command: Sequence[str]
    limit: float
    group: str = ""
    result: Path | None = None
    text: Path | None = None
    env: dict[str, str] = field(default_factory=dict)


def run_parts(
    parts: Sequence[Part],
    record: dict[str, Any],
    write: Callable[[dict[str, Any]], None],
    seconds: float,
    logs: Path,
    at_once: int = max(2, min(MAX_AT_ONCE, (os.cpu_count() or 2) * 2 // 3)),
) -> None:
    """Fill `record["parts"]`, calling `write(record)` after each part; a part already done is left out.

    No part starts after `seconds`, and a running one is stopped then.
    """
    end = time.monotonic() + seconds
    logs.mkdir(parents=True, exist_ok=True)
    known = record.setdefault("parts", {})
    missing = [part for part in parts if known.get(part.name, {}).get("status") != DONE]
    for group in groups(missing):
        with ThreadPoolExecutor(at_once if len(group) > 1 else 1) as pool:
            for part, outcome in zip(group, pool.map(lambda part: run_part(part, end, logs), group), strict=True):
                known[part.name] = outcome
                seconds_text = f"{outcome['seconds']:.0f} s" if "seconds" in outcome else ""
                print(f"{part.name}: {outcome['status']} {seconds_text}", flush=True)
                write(record)


def groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts that run at the same time."""
    for _, group in groupby(enumerate(parts), key=lambda item: item[1].group or item[0]):
        yield [part for _, part in group]


def run_part(part: Part, end: float, logs: Path) -> dict[str, Any]:
    """Run one part; its status, seconds, result and, where it failed, the end of its output."""
    limit = min(part.limit, end - time.monotonic())
    if limit <= 0:
        return {"status": NO_TIME}
    for left in (part.result, part.text):
        if left:
            left.unlink(missing_ok=True)
    log = logs / f"{part.name}.log"
    started = time.monotonic()
    status: str
    code: int | None
    try:
        with log.open("w", encoding="utf-8", errors="replace") as output:
            code = run_limited(list(part.command), limit, output, part.env)
    except OSError as error:  # no space left, or no such program
        return {"status": FAILED, "seconds": time.monotonic() - started, "end": str(error)}
    status = TIME_LIMIT if code is None else DONE if code == 0 else FAILED
    outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if status != DONE:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        outcome |= {"exit_code": code, "limit": round(limit, 1), "end": "\n".join(lines[-LINES_OF_A_FAILURE:])}
    # A part that was stopped may have written some of its results.
    if part.result and part.result.is_file():
        try:
            outcome["result"] = json.loads(part.result.read_text(encoding="utf-8"))
        except ValueError as error:
            outcome |= {"status": FAILED, "end": f"{part.result.name}: {error}"}
    if part.text and part.text.is_file():
        outcome["text"] = part.text.read_text(encoding="utf-8", errors="replace")
    return outcome


def run_limited(command: list[str], limit: float, output: Any, env: dict[str, str]) -> int | None:
    """The exit code of a command, None where the limit stopped it together with every process that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={**os.environ, **env}, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Children of an ended command too: they would hold the GPU's memory.
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def load_record(path: Path) -> dict[str, Any]:
    """The record of an earlier start, or an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_record(record: dict[str, Any], path: Path, page: str) -> None:
    """The JSON file and the Markdown page beside it; printed instead where they cannot be written."""
    try:
        write_text_atomic(path, json.dumps(record, indent=1) + "\n")
        write_text_atomic(path.with_suffix(".md"), page)
    except (OSError, UserError) as error:
        print(f"cannot write {path} ({error}); the record as it is now:\n{json.dumps(record)}", flush=True)
