"""A progress bar with the time left, on stderr: drawn on a terminal, one line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetune.terminal_text import printable

SECONDS_BETWEEN_LINES = 15


def say(text: str) -> None:
    """Print a status line to stderr; stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1)`. total  0: unknown. shown  False: print nothing."""
    if not shown:
        yield lambda n=1: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(description, total=total or None)
            yield lambda n=1: progress.advance(task, n)
    else:
        yield _print_lines(description, total)


def _print_lines(description: str, total: int) -> Callable[..., None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int = 1) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done:
            last = now
            left = (now - started) / done * (total - done)
            suffix = f" of {total:,}, {left:.0f} s left" if total else ""
            print(f"{printable(description)}: {done:,}{suffix}", file=sys.stderr, flush=True)

    return advance
