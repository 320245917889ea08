"""Mutated inputs against every reader: rows, files, logs, scores, configs, format files, schemas, generated text.

    python -m tests.fuzz --cases 100000 --seed 0            # a table; exit 1 if any case breaks a promise
    python -m tests.fuzz --kind rows --seed 0 --first 123 --cases 1     # one case again

What must hold: no exception but those that become one line for the user, no case over 5 s of CPU time, kept plus
rejected rows are the rows read, no control token out of a content, and no text lost without a word. Every failure
prints the command that repeats it and the smallest input found that still fails.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz_inputs import shrunk
from tests.fuzz_readers import KINDS, Kind

MAX_SECONDS = 5.0
SHOWN = 3000  # characters of an input


class Hang(BaseException):
    """A case took too long; not an Exception, so that no reader catches it."""


@dataclass
class Failure:
    """One broken promise: where it was raised, how often, and the smallest input."""

    kind: str
    case: int
    error: BaseException
    smallest: Any
    times: int = 1

    def report(self, seed: int) -> str:
        lines = traceback.format_exception(self.error)
        again = f"python -m tests.fuzz --kind {self.kind} --seed {seed} --first {self.case} --cases 1"
        return f"{again}   ({self.times} times)\n{''.join(lines[-6:])}input: {repr(self.smallest)[:SHOWN]}\n"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds of CPU time; no limit on Windows, which has no such timer."""
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def stop(*_: Any) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def failure_of(kind: Kind, case: Any, folder: Path) -> BaseException | None:
    """What a case raises that it must not; None if everything holds."""
    try:
        with time_limit(MAX_SECONDS):
            kind.check(case, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a reader must not end the program
        return error
    return None


def place_of(error: BaseException) -> tuple[str, str]:
    """(type, place) by which failures of one cause are told from others: the last line of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/finetune/" in frame.filename or "/formats/" in frame.filename] or frames
    detail = str(error)[:40] if isinstance(error, AssertionError) else ""
    return type(error).__name__ + detail, f"{ours[-1].filename}:{ours[-1].lineno}"


def run(kind: Kind, seed: int, numbers: range, folder: Path) -> tuple[Counter, list[Failure]]:
    """(cases by outcome, failures, one of each cause) of the cases with these numbers."""
    found: dict[tuple[str, str], Failure] = {}
    counts: Counter = Counter()
    logging.disable(logging.WARNING)  # one line a case
    kind.prepare()
    for number in numbers[:3]:  # imports what the readers need, which takes longer than a case may
        with contextlib.suppress(Exception, SystemExit):
            kind.check(kind.make(random.Random(f"{kind.name}:{seed}:{number}")), folder)
    for number in numbers:
        case = kind.make(random.Random(f"{kind.name}:{seed}:{number}"))
        counts["cases"] += 1
        if (error := failure_of(kind, case, folder)) is None:
            continue
        counts["failed"] += 1
        place = place_of(error)
        if place in found:
            found[place].times += 1
            continue

        def fails_alike(smaller: Any, place: tuple[str, str] = place) -> bool:
            other = failure_of(kind, smaller, folder)
            return other is not None and place_of(other) == place

        tries = 20 if isinstance(error, Hang) else 400
        found[place] = Failure(kind.name, number, error, shrunk(case, fails_alike, tries))
    logging.disable(logging.NOTSET)
    return counts, list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="cases in all, or of the one --kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this kind")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if args.kind in (None, kind.name)]
    total = sum(kind.share for kind in kinds)
    failures: list[Failure] = []
    print("| input | cases | failed | causes | s |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            began = time.process_time()
            cases = max(1, round(args.cases * kind.share / total))
            counts, found = run(kind, args.seed, range(args.first, args.first + cases), Path(folder))
            seconds = time.process_time() - began
            print(f"| {kind.text} | {cases} | {counts['failed']} | {len(found)} | {seconds:.0f} |", flush=True)
            failures += found
            for failure in found:
                print(failure.report(args.seed), file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
