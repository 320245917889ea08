"""Progress and log rows of a run, and stopping it by a signal."""

from __future__ import annotations

import logging
import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finetune import distributed
from finetune.runs.run_log import RunLog

log = logging.getLogger("sandwich")
# Signals by which the system ends a run: a preempted machine, a closed terminal (Windows has no SIGHUP).
TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class LogCallback(TrainerCallback):
    """Writes training_log.csv and the progress bar."""

    def __init__(self, run_log: RunLog, console: Console, quiet: bool = False):
        self.run_log = run_log
        self.console = console
        self.quiet = quiet
        self.last_row: dict[str, Any] = {}
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.run_log.start(resumed_at_step=state.global_step or None)
        if self.quiet:
            return
        if not self.console.is_terminal:
            log.info("step %d of %d", state.global_step, state.max_steps)
            return
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_step_begin(self, args, state, control, **kwargs):
        self.run_log.flush()

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:  # the last step gets a row whatever --logging_steps is
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or "learning_rate" not in logs:
            return
        self.last_row = self.run_log.log_row(
            step=state.global_step, epoch=state.epoch, learning_rate=logs["learning_rate"], grad_norm=logs["grad_norm"]
        )
        status = f"loss {self.last_row['loss']:.4f}  {self.last_row['tokens_per_second']:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.task, status=status)
        elif not self.quiet:
            done = state.global_step
            left = self.run_log.counters.seconds / max(done, 1) * (state.max_steps - done)
            left = timedelta(seconds=round(min(left, 1e9)))  # a timedelta holds less than 1e14 s
            log.info("step %d of %d  %s  %s left", done, state.max_steps, status, left)

    def on_train_end(self, args, state, control, **kwargs):
        self.run_log.flush()
        self.stop()

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopCallback(TrainerCallback):
    """The first Ctrl-C or termination signal ends the run after the current step, with a checkpoint.

    Stopping between steps makes the resume exact. A second Ctrl-C stops at once. Once the last step is done, the rest
    of the run is finished. In a data-parallel run all ranks have to stop after the same step, so a request only
    counts when the trainer confirms that all ranks know of it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.is_trained = False
        self.raises: type[Exception] | None = None  # what the first signal raises: set during an evaluation
        self.is_confirmed = distributed.size() == 1
        self._former_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, *TERMINATION_SIGNALS):
            if signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGINT:  # nohup
                continue
            self._former_handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            # torchrun forwards a Ctrl-C as SIGTERM and kills ranks that take too long. A closed terminal sends two
            # SIGHUP, one by its shell.
            if distributed.size() > 1 or name == "SIGHUP":
                return
            raise KeyboardInterrupt
        self.requested = name
        rest = "saving the adapter" if self.is_trained else "finishing this step, then saving a checkpoint"
        if self.raises:
            rest = "stopping the evaluation, then saving a checkpoint"
        log.warning("%s: %s (again to stop at once)", self.requested, rest)
        if self.raises:
            raise self.raises

    @property
    def exit_status(self) -> int:
        """The exit status of a run that a signal stopped."""
        return 143 if self.requested == "SIGTERM" else 130

    def confirm(self) -> None:
        """All ranks know that one of them was asked to stop."""
        self.requested = self.requested or "another process"
        self.is_confirmed = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested and self.is_confirmed:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.is_trained = True

    def restore_handlers(self) -> None:
        """Restore the signals' former handlers."""
        if distributed.size() == 1:  # a launcher's SIGTERM must not interrupt what is still to be written
            for number, handler in self._former_handlers.items():
                signal.signal(number, handler)
