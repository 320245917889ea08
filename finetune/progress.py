"""What is shown on stderr: status lines, and a progress bar that is drawn on a terminal or printed as lines into a log.

Text of others is shown without control characters, which could clear the terminal, retitle it or fake its lines.
"""

from __future__ import annotations

import importlib.abc
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 15
_CONTROL = (*(set(range(32)) - {ord("\n"), ord("\t")}), *range(0x7F, 0xA0))
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # reorder or hide what is around them
_REPLACED = dict.fromkeys((*_CONTROL, *_BIDIRECTIONAL), "\ufffd")


def without_passwords(text: str) -> str:
    """The text without the user names and passwords of URLs, which may themselves hold @ and /."""

    def hidden(word: re.Match[str]) -> str:
        scheme, found, rest = word[0].partition("://")
        return f"{scheme}://***@{rest.rpartition('@')[2]}" if found and "@" in rest else word[0]

    return re.sub(r"\S+", hidden, text)


def printable(text: str) -> str:
    """Text with every control character replaced by U+FFFD, except line breaks and tabs."""
    return text.translate(_REPLACED)


def protect_rich() -> None:
    """Let rich's texts, such as table cells and titles, do the same; the styles that rich writes itself stay.

    It happens when rich is imported, which takes too long for --help.
    """
    if "rich.text" in sys.modules:
        _patch_rich()
    elif not any(isinstance(finder, _WhenRichIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenRichIsImported())


def _patch_rich() -> None:
    from rich import control

    control._CONTROL_STRIP_TRANSLATE.update(_REPLACED)  # rich 15 strips five control characters from every Text


class _WhenRichIsImported(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "rich.text":
            sys.meta_path.remove(self)
            _patch_rich()


def print_text(text: object) -> None:
    """Print the text on stdout."""
    print(printable(str(text)))


def counted(number: int | str, noun: str) -> str:
    """`1 row`, `2,000 rows`; a number that is text is shown as it is."""
    shown = number if isinstance(number, str) else f"{number:,}"
    return f"{shown} {noun}{'s' * (shown != '1')}"


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
