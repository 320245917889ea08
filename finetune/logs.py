"""One logger, two outputs: short lines on the console, all of them with dates in the run's training.log."""

from __future__ import annotations

import logging
import logging.handlers
import os
import time
import warnings
from pathlib import Path

from rich.console import Console

from finetune.progress import printable, without_passwords

log = logging.getLogger("sandwich")


class ConsoleHandler(logging.Handler):
    """Prints above a live progress bar; long lines are wrapped by the terminal alone, so a log file has them in one."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        text = printable(without_passwords(record.getMessage()))
        message = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {text}"
        self.console.print(message, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(without_passwords(super().format(record)))


def start_logging(console: Console | None = None) -> None:
    """Print messages on the console (default: stderr), and buffer them for the run folder's log until `log_to_file`."""
    console = console or Console(stderr=True)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # training.log on a full disk: the run's own error is the one to show
    log.handlers.clear()
    log.addHandler(ConsoleHandler(console))
    log.addHandler(logging.handlers.MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1))
    # Advice of libraries is about code that the user does not see.
    warnings.filterwarnings("ignore")
    for name in ("transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import sets the level again
    if not console.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def log_to_file(path: Path) -> None:
    """Append all messages so far, and from now on, to the file."""
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    for handler in list(log.handlers):
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            log.removeHandler(handler)
    log.addHandler(file)
