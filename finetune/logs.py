"""One logger, two places: short lines on the screen, all of it with dates in the run's training.log."""

from __future__ import annotations

import logging
import logging.handlers
import os
import time
import warnings
from pathlib import Path

from rich.console import Console

log = logging.getLogger("sandwich")


class ConsoleHandler(logging.Handler):
    """Prints above a live progress bar; long lines are left to the terminal, so that a log file keeps them whole."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        message = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {record.getMessage()}"
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def start_logging(console: Console) -> None:
    """Show messages on the console and keep them until a run folder exists to hold them."""
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # training.log on a full disk: the error of the run itself is the one to show
    log.handlers.clear()
    log.addHandler(ConsoleHandler(console))
    log.addHandler(logging.handlers.MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1))
    # Libraries: their advice is about code the user does not see; what matters is checked and said here.
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not console.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def log_to_file(path: Path) -> None:
    """Write everything said so far, and from now on, into training.log (appended to when a run is resumed)."""
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in list(log.handlers):
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            log.removeHandler(handler)
    log.addHandler(file)
