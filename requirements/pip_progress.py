"""`pip` with one progress line for all packages and the time left; its messages are shown when it fails.

Runs before anything is installed: only the standard library.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

SECONDS_BETWEEN_LINES = 10  # in a log; on a terminal the line is rewritten every second


def expected_packages(arguments: list[str]) -> int:
    """How many packages pip will report: those pinned in the requirement files and their constraint files."""
    names: set[str] = set()
    paths = [Path(value) for flag, value in itertools.pairwise(arguments) if flag in ("-r", "-c")]
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            first, _, rest = line.partition(" ")
            if first in ("-r", "-c"):
                paths.append(path.parent / rest.split()[0])
            elif "==" in line:
                names.add(line.partition("==")[0].lower())
    return len(names)


def time_left(seconds: float, done: int, total: int) -> str:
    """`, 12 s left` from the time so far; "" before anything is done and without a total."""
    return f", {seconds / done * max(total - done, 0):.0f} s left" if done and total else ""


def main(arguments: list[str]) -> int:
    """Run `pip` with the arguments; returns its exit status. A first argument `--try`: no messages of a failure."""
    is_try = arguments[:1] == ["--try"]
    command = [sys.executable, "-m", "pip", *arguments[is_try:]]
    packages, site = expected_packages(arguments), Path(sysconfig.get_path("purelib"))
    before = len(list(site.glob("*.dist-info")))
    started, found, output = time.monotonic(), 0, []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES):
                installed = len(list(site.glob("*.dist-info"))) - before
                left = time_left(time.monotonic() - started, found + installed, 2 * packages)
                about = f" of about {max(packages, found)}" if packages else ""
                say(f"packages: {found}{about} found, {installed} installed{left}", replaced=True)

        shown = threading.Thread(target=show)
        shown.start()
        for line in pip.stdout or ():
            output.append(line)
            found += line.startswith(("Collecting ", "Processing "))
        status = pip.wait()
        ended.set()
        shown.join()
    if not status:
        say(f"packages: {found} installed in {time.monotonic() - started:.0f} s")
    elif not is_try:
        say("".join(output))
    return status


def say(text: str, *, replaced: bool = False) -> None:
    """Print a line to stderr. replaced: on a terminal the next one takes its place."""
    is_terminal = sys.stderr.isatty()
    start, end = (f"\r{text:<78}", "") if is_terminal and replaced else (text, "\n")
    print(f"\r{'':<78}\r{start}" if is_terminal else start, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
