"""What a run shows and how it is stopped: progress bar, log rows, Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finetune import distributed
from finetune.runs.run_log import RunLog

log = logging.getLogger("sandwich")
# What ends a run from outside: a preempted machine, and a terminal that was closed (Windows has no such signal).
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class LogCallback(TrainerCallback):
    """Writes training_log.csv and the progress bar."""

    def __init__(self, run_log: RunLog, console: Console, quiet: bool = False):
        self.run_log = run_log
        self.console = console
        self.quiet = quiet
        self.last: dict[str, Any] = {}
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.run_log.start(resumed_at_step=state.global_step or None)
        if self.quiet:
            return
        if not self.console.is_terminal:
            log.info("step %d of %d", state.global_step, state.max_steps)
            return
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, news="")

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, news=self._news())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or "learning_rate" not in logs:
            return
        self.last = self.run_log.log_row(
            step=state.global_step, epoch=state.epoch, learning_rate=logs["learning_rate"], grad_norm=logs["grad_norm"]
        )
        if self.progress is not None:
            self.progress.update(self.task, news=self._news())
        elif not self.quiet:
            done = state.global_step
            seconds = self.run_log.counters.seconds / max(done, 1) * (state.max_steps - done)
            log.info("step %d of %d  %s  %s left", done, state.max_steps, self._news(), format_seconds(seconds))

    def on_step_begin(self, args, state, control, **kwargs):
        self.run_log.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.run_log.flush()
        self.stop()

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _news(self) -> str:
        if not self.last:
            return ""
        return f"loss {self.last['loss']:.4f}  {self.last['tokens_per_second']:,.0f} tokens/s"


class LastStepCallback(TrainerCallback):
    """Evaluates (and, where the best checkpoint is wanted, saves) after the very last step, wherever it falls."""

    def __init__(self, *, evaluate: bool, save: bool):
        self.evaluate, self.save = evaluate, save

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate |= self.evaluate
            control.should_save |= self.save
        return control


class StopCallback(TrainerCallback):
    """The first Ctrl-C (or another signal to end, see ENDING) ends the run after the step at hand, with a checkpoint.

    Stopping between steps is what makes the resume exact. A second Ctrl-C stops at once. What comes after the last
    step is short and is finished: without it the run would have been for nothing. In a data-parallel run all
    ranks have to stop after the same step, so a request counts when the trainer says that all have heard of it.
    """

    def __init__(self):
        self.requested: str | None = None
        self.trained = False
        self.agreed = distributed.size() == 1
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, *ENDING):
            if signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGINT:  # nohup
                continue
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.requested:
            if (
                distributed.size() > 1
            ):  # torchrun passes a Ctrl-C on as SIGTERM, and ends us itself when we take too long
                return
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        rest = "saving the adapter" if self.trained else "finishing this step, then saving a checkpoint"
        log.warning("%s: %s (again to stop at once)", self.requested, rest)

    def agree(self) -> None:
        """All ranks know that one of them was asked to stop."""
        self.requested = self.requested or "another process"
        self.agreed = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested and self.agreed:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.trained = True

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        if distributed.size() > 1:  # a launcher's SIGTERM must not cut short what is still to be written
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
