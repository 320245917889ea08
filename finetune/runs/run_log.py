"""training_log.csv: one flushed row per logged step, and the counters that a resumed run continues from."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.files import read_shown, require_run_folder, write_text_atomic

COLUMNS = (
    "step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_seen", "trained_tokens",
    "tokens_per_second", "computed_tokens_per_second", "seconds", "peak_memory_gb",
    "eval_tool_name_accuracy", "eval_parameter_accuracy",
)  # fmt: skip

PENDING = "pending_evaluation"
MAX_COUNT = 10**15  # tokens; seconds
_STEP = re.compile(r"[0-9]{1,15}")


@dataclass
class Counters:
    """Totals that a checkpoint stores, so that a resumed run writes the rows of an uninterrupted one.

    The window_* fields belong to the steps since the last logged row. Loss sums are in nats; step_losses is the sum of
    the steps' mean losses, of which Trainer's train_loss is the mean.
    """

    tokens_seen: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    step_losses: float = 0.0
    window_loss_sum: float = 0.0
    window_trained_tokens: int = 0
    window_tokens: int = 0
    window_computed_tokens: int = 0
    window_seconds: float = 0.0


def counters_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's counters; None if a resumed run can continue from them.

    An absent counter is 0: an older version did not have it.
    """
    state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        return f"its {path.name} is not an object"
    known = asdict(Counters())
    row = state.pop(PENDING, {})
    if not isinstance(row, dict) or set(row) - set(COLUMNS):
        return f"its {path.name} has {PENDING} = {row!r}, which is not a row of the log"
    for key, value in state.items():
        if key not in known:
            return f"its {path.name} has an unknown key {key!r}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # The loss of a run that ends with its best checkpoint may be inf or nan.
        if not is_number or not (0 <= value < MAX_COUNT or (isinstance(value, float) and "loss" in key)):
            return f"its {path.name} has {key} = {value!r:.100}, which is not a number >= 0 and < 10**15"
    return None


@dataclass
class RunLog:
    """Counts steps and writes rows. path  None: another process of a data-parallel run writes the file."""

    path: Path | None
    counters: Counters = field(default_factory=Counters)
    evaluation_pending: bool = False  # whether the last step's evaluation was stopped, and the next resume repeats it
    _pending: dict[str, Any] | None = None
    _last_clock: float | None = None

    def start(self, resumed_at_step: int | None = None) -> None:
        """Write the header; after a resume keep the rows up to the checkpoint's step."""
        self._last_clock = time.perf_counter()
        if self.path is None:
            return
        rows = read_rows(self.path) if resumed_at_step is not None and self.path.exists() else []
        pending_step = self._pending["step"] if self._pending else None  # this row will be written again
        kept = [row for row in rows if int(row[0]) <= resumed_at_step and int(row[0]) != pending_step]
        lines = [",".join(COLUMNS), *(",".join(row) for row in kept)]
        write_text_atomic(self.path, "\n".join(lines) + "\n")

    def become_writer(self, path: Path, step: int) -> None:
        """Continue the file of a lost process after its complete rows up to `step`; never write a row twice."""
        pending, self._pending, self.path = self._pending, None, path
        self.start(resumed_at_step=step)
        if pending is not None and str(pending["step"]) not in {row[0] for row in read_rows(path)}:
            self._pending = pending

    def add_step(self, *, loss_sum: float, tokens: int, trained_tokens: int, computed_tokens: int) -> None:
        """Count one optimizer step: its tokens, and the summed loss (nats) of its trained tokens."""
        now = time.perf_counter()
        elapsed, self._last_clock = now - self._last_clock, now
        c = self.counters
        c.tokens_seen += tokens
        c.trained_tokens += trained_tokens
        c.seconds += elapsed
        c.step_losses += loss_sum / max(trained_tokens, 1)
        c.window_loss_sum += loss_sum
        c.window_trained_tokens += trained_tokens
        c.window_tokens += tokens
        c.window_computed_tokens += computed_tokens
        c.window_seconds += elapsed

    def pause(self) -> None:
        """Count the time since the last step (an evaluation, a checkpoint) as run time, not towards tokens/second."""
        now = time.perf_counter()
        self.counters.seconds += now - self._last_clock
        self._last_clock = now

    def log_row(self, *, step: int, epoch: float, learning_rate: float, grad_norm: float) -> dict[str, Any]:
        """Make a row of the window. It stays pending, as an evaluation of this step may add to it."""
        self.flush()
        c = self.counters
        seconds = max(c.window_seconds, 1e-9)
        self._pending = self._row(step, epoch) | {
            "loss": c.window_loss_sum / max(c.window_trained_tokens, 1),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round(c.window_tokens / seconds, 1),
            "computed_tokens_per_second": round(c.window_computed_tokens / seconds, 1),
        }
        c.window_loss_sum = c.window_seconds = 0.0
        c.window_trained_tokens = c.window_tokens = c.window_computed_tokens = 0
        return self._pending

    def log_eval(self, *, step: int, epoch: float, **values: float) -> None:
        """Add the `eval_…` values to the row of this step, or make a row of its own when the step was not logged."""
        self.pause()
        if self._pending is None or self._pending["step"] != step:
            self.flush()
            self._pending = self._row(step, epoch)
        self._pending |= values

    def _row(self, step: int, epoch: float) -> dict[str, Any]:
        return dict.fromkeys(COLUMNS, "") | {
            "step": step,
            "epoch": round(epoch, 6),
            "tokens_seen": self.counters.tokens_seen,
            "trained_tokens": self.counters.trained_tokens,
            "seconds": round(self.counters.seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }

    def flush(self) -> None:
        """Append the pending row to the file."""
        row, self._pending = self._pending, None
        if row is None or self.path is None:
            return
        require_run_folder(self.path.parent)
        is_new = not self.path.exists()  # someone has deleted it
        with self.path.open("a", encoding="utf-8", newline="") as file:
            if is_new:
                file.write(",".join(COLUMNS) + "\n")
            csv.writer(file, lineterminator="\n").writerow([row[column] for column in COLUMNS])

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores; with a stopped evaluation also the row to which it would have added its loss."""
        return asdict(self.counters) | ({PENDING: self._pending or {}} if self.evaluation_pending else {})

    def restore(self, state: dict[str, Any]) -> None:
        row = state.get(PENDING)
        self.counters = Counters(**{name: value for name, value in state.items() if name != PENDING})
        self.evaluation_pending, self._pending = row is not None, dict.fromkeys(COLUMNS, "") | row if row else None


@dataclass(frozen=True)
class LogRows:
    """A training_log.csv as text: `rows` are its complete rows, cells in the order of COLUMNS, "" for a missing one."""

    rows: list[list[str]]
    header: Sequence[str]
    unreadable: int = 0  # complete lines that are not rows
    is_cut: bool = False  # whether the last line lacks its line end


def read_log(path: Path) -> LogRows:
    """The rows of a log, without the lines that a kill or a crash damaged. Raises OSError."""
    text = read_shown(path)
    complete, _, rest = text.rpartition("\n")
    # Every cell is a number, so none is quoted: a stray quote must not swallow the following rows.
    header, *lines = [line.split(",") for line in complete.splitlines()] or [[]]
    places = [header.index(name) if name in header else None for name in COLUMNS]
    complete_lines = (cells for cells in lines if len(cells) == len(header))
    rows = [["" if place is None else cells[place] for place in places] for cells in complete_lines]
    kept = [row for row in rows if _STEP.fullmatch(row[0])]
    return LogRows(kept, header, unreadable=len(lines) - len(kept), is_cut=bool(rest.strip()))


def read_rows(path: Path) -> list[list[str]]:
    """The complete rows of a log, cells in the order of COLUMNS."""
    return read_log(path).rows


def peak_memory_gb() -> float:
    """Peak memory so far in GB (10^9 bytes): reserved CUDA memory on a GPU, resident memory on a CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
