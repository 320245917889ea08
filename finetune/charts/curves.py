"""The logs of training runs: finding them, reading them, one row of summary each.

A log may still be written to, be empty, end in the middle of a line or belong to a failed run: whatever is odd about
a run is in `LoggedRun.notes` and in the summary table.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.charts.rows import Rows
from finetune.errors import UserError
from finetune.files import read_shown
from finetune.progress import counted
from finetune.runs import run_log
from finetune.runs.experiment import CHECKPOINT, CONFIG, LOG

if TYPE_CHECKING:
    import numpy as np

# The columns of training_log.csv that curves and summary need.
COLUMNS = (
    "step", "epoch", "loss", "eval_loss", "tokens_seen", "trained_tokens", "seconds", "peak_memory_gb",
    "eval_tool_name_accuracy", "eval_parameter_accuracy",
)  # fmt: skip
# What other trainers write into their output folder: LLaMA-Factory, Transformers' Trainer (see other_logs.py).
OTHER_LOGS = ("trainer_log.jsonl", "trainer_state.json")
X_COLUMNS = {"step": "step", "epoch": "epoch", "tokens": "tokens_seen", "time": "seconds"}
# Scores of evaluate_lora.py that the summary shows when a run has been evaluated.
SCORES = ("tool_name_accuracy", "parameter_accuracy")
MAX_SILENT_SECONDS = 600  # a run with status "running" that has not logged for this long gets a note
MAX_LOSS = 1e100  # larger losses count as infinite: their sums and squares would overflow


@dataclass
class LoggedRun:
    """A training run as the charts read it; `rows` holds `COLUMNS` as float64, NaN where a cell is empty.

    A logged loss that is not a finite number is infinite, so that it differs from one that was not logged.
    """

    folder: Path
    rows: Rows
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def flags(self) -> dict[str, Any]:
        """The run's settings, {} where there is no config."""
        flags = self.config.get("flags")
        return flags if isinstance(flags, dict) else {}

    @property
    def status(self) -> str:
        status = self.config.get("status")
        return status if isinstance(status, str) and status else "unknown"

    @property
    def is_broken_off(self) -> bool:
        """Whether the curve ends where training failed, stopped early or diverged."""
        ended = self.status in ("finished", "running", "unknown") or self.is_truncated
        return not ended or any("not finite" in note for note in self.notes)

    @property
    def is_truncated(self) -> bool:
        """Whether nothing was trained: the adapter of a run of a larger rank was cut (sweep_lora.py --from_largest)."""
        return self.status.startswith("from rank ")

    def points(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Two float arrays of one length: column `y` over the x axis named `x` (a key of `X_COLUMNS`), all finite."""
        xs, ys = self.rows[X_COLUMNS[x]], self.rows[y]
        known = (xs == xs) & (ys == ys) & (abs(ys) != float("inf"))
        return xs[known], ys[known]


def find_logs(arguments: list[str]) -> list[Path]:
    """The logs that `arguments` name: log files, run folders, folders of run folders, or patterns with * ? [ ].

    A run folder without a log is returned as the path its log would have. Other files that a pattern matches are
    skipped. Raises UserError when an argument matches nothing.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        matches = [Path(argument)]
        if not matches[0].exists() and glob.has_magic(argument):  # cmd.exe and PowerShell do not expand patterns
            matches = sorted(map(Path, glob.glob(argument, recursive=True)), key=natural_key)  # noqa: PTH207 (a pattern may be absolute)
        if not matches or not matches[0].exists():
            raise UserError(f"{argument}: no such log or folder; give training_log.csv files or experiment folders")
        for match in matches:
            if match.is_dir():
                found |= {log.resolve(): log for log in logs_in(match)}
            elif match.suffix == ".csv" or match.name in OTHER_LOGS or len(arguments) == len(matches) == 1:
                found[match.resolve()] = match
    if not found:
        raise UserError(f"no {LOG} in {', '.join(arguments[:3])}; give an experiment folder or a folder of them")
    return list(found.values())


def logs_in(folder: Path) -> list[Path]:
    """The log of a run folder, or the logs of all run folders below `folder`."""
    if (folder / LOG).exists() or (folder / CONFIG).exists():
        return [folder / LOG]
    below = {path.parent for name in (LOG, CONFIG) for path in folder.rglob(name)}
    below |= {path for path in folder.iterdir() if path.is_dir() and _is_private(path)}  # rglob is silent about them
    # A name with a leading dot is a temporary folder of a run that is starting.
    runs = [run / LOG for run in sorted(below, key=natural_key) if not run.name.startswith(".")]
    return runs or _other_logs_in(folder)


def _is_private(folder: Path) -> bool:
    """Whether it is another user's, which cannot be read."""
    try:
        os.scandir(folder).close()
    except PermissionError:
        return True
    return False


def _other_logs_in(folder: Path) -> list[Path]:
    """One log of each folder that another trainer wrote: its trainer_log.jsonl, or its newest trainer_state.json."""
    found: dict[Path, Path] = {}
    for name in reversed(OTHER_LOGS):  # the first one wins
        for path in sorted(folder.rglob(name), key=natural_key):
            found[path.parent.parent if CHECKPOINT.fullmatch(path.parent.name) else path.parent] = path
    return [found[run] for run in sorted(found, key=natural_key)]


def natural_key(path: Path | str) -> list[tuple[int, Any]]:
    """Sort key in which r4 comes before r16."""
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", str(path)) if part]


def read_run(log: Path) -> LoggedRun:
    """One log and the config beside it. Never raises for their contents: see `LoggedRun.notes`."""
    notes: list[str] = []
    config = read_json(log.parent / CONFIG, notes)
    rows = read_log(log, notes)
    if config.get("status") == "running" and log.exists():
        silent = time.time() - log.stat().st_mtime
        if silent > MAX_SILENT_SECONDS:
            notes.append(f"status is running, but the last row was logged {duration(silent)} ago")
    return LoggedRun(log.parent, rows, config, notes)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in a file; {} and a note where there is none."""
    try:
        config = json.loads(read_shown(path))
    except FileNotFoundError:
        notes.append(f"no {path.name}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error.__class__.__name__})")
        return {}
    return config if isinstance(config, dict) else {}


def read_log(path: Path, notes: list[str]) -> Rows:
    """`COLUMNS` of one training_log.csv as float64, one row per step, sorted by step; adds what is odd to `notes`."""
    try:
        log = run_log.read_log(path)
        notes += _log_notes(log)
    except OSError as error:
        notes.append("no log yet" if isinstance(error, FileNotFoundError) else f"log cannot be read: {error.strerror}")
        log = run_log.LogRows([], [])
    cells = dict(zip(run_log.COLUMNS, zip(*log.rows, strict=True), strict=True)) if log.rows else {}
    return tidy({name: [parse(cell) for cell in cells.get(name, ())] for name in COLUMNS}, notes)


def tidy(columns: dict[str, list[float]], notes: list[str]) -> Rows:
    """One row per step, sorted by step; adds what is odd to `notes`."""
    import numpy as np

    rows = Rows(columns)
    for name in COLUMNS:
        if name not in ("loss", "eval_loss"):
            rows[name] = np.where(np.isfinite(rows[name]), rows[name], np.nan)
        elif (diverged := np.isinf(rows[name])).any():
            first = rows["step"][diverged][0]
            notes.append(f"{name} is not finite in {counted(int(diverged.sum()), 'row')}, first at step {first:.0f}")
    if unplaced := int(np.isnan(rows["step"]).sum()):
        notes.append(f"{counted(unplaced, 'row')} without a step")
        rows = rows.take(~np.isnan(rows["step"]))
    if not len(rows):
        return rows
    if not (np.diff(rows["step"]) > 0).all():
        # Loss and eval_loss of a step may be in two rows; a step with two losses was repeated after a restart.
        steps = rows["step"][~np.isnan(rows["loss"])]
        if len(np.unique(steps)) < len(steps):
            notes.append("steps were logged more than once; the later rows count")
        rows = rows.by_step()
    if not len(rows.logged("loss")):
        notes.append("no loss yet")
    back = -np.diff(rows["seconds"], prepend=rows["seconds"][:1])  # a restart may begin at 0 again
    rows["seconds"] = rows["seconds"] + np.where(back > 0, back, 0).cumsum()
    return rows


def _log_notes(log: run_log.LogRows) -> list[str]:
    if not log.header:
        return ["empty log"]
    if not {"step", "loss"} <= set(log.header):
        return ["not a training log (no columns step and loss)"]
    notes = ["last line is cut"] if log.is_cut else []
    if log.unreadable:
        notes.append(f"{counted(log.unreadable, 'unreadable line')} skipped")
    return notes if log.rows else [*notes, "no rows yet"]


def parse(cell: str) -> float:
    """NaN for an empty cell, infinity for one that does not hold a number below `MAX_LOSS`."""
    if not cell:
        return float("nan")
    try:
        number = float(cell)
    except ValueError:
        return float("inf")
    return number if abs(number) < MAX_LOSS else float("inf")


def smooth(values: np.ndarray, width: int | None = None) -> np.ndarray:
    """Centred mean over `width` neighbouring points, one more if that is even.

    The window is narrower near the start, down to the first value itself: there the loss falls fastest, and a window
    with more points on one side would move the curve. The last half window is the straight line fitted to the last
    `width` values, within their range: one high loss must not push the end below zero. A straight line stays as it is.

    width  None: 1/25 of the curve, at least 5 points; 0 or 1: no smoothing
    """
    import numpy as np

    if width is None:
        width = max(5, len(values) // 25)
    if width < 2 or len(values) < 3:
        return values
    half = min(width // 2, (len(values) - 1) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values) - half)
    reach = np.minimum(at, half)
    smoothed = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    last = values[-2 * half - 1 :]
    slope = (np.arange(-half, half + 1) @ last) / (np.arange(-half, half + 1) ** 2).sum()
    end = np.clip(last.mean() + slope * np.arange(1, half + 1), last.min(), last.max())
    return np.concatenate([smoothed, end])


def thin(y: np.ndarray, points: int) -> np.ndarray:
    """Indices of at most `points` (and the two ends) of `y` that keep every bucket's lowest and highest value."""
    import numpy as np

    if len(y) <= points:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), max(points // 2 - 1, 1) + 1).astype(int)
    kept = {0, len(y) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    return np.array(sorted(kept))


def summarize(run: LoggedRun) -> dict[str, Any]:
    """One row of the summary table: times in seconds, memory in GB, None where nothing was measured."""
    rows = run.rows
    last: dict[str, Any] = {name: next(reversed(rows.logged(name).tolist()), None) for name in COLUMNS}
    best, lowest = _lowest(rows, "eval_loss"), _lowest(rows, "loss")
    tokens, seconds = last["tokens_seen"], last["seconds"]
    row: dict[str, Any] = {
        "run": run.label or run.folder.name,
        "status": run.status,
        "steps": _to_int(last["step"]),
        "epochs": last["epoch"],
        "final_loss": last["loss"],
        "last_tenth_loss": last_tenth(rows.logged("loss")),
        "min_loss": lowest[0],
        "min_loss_step": _to_int(lowest[1]),
        "best_eval_loss": best[0],
        "best_eval_step": _to_int(best[1]),
        "tokens": _to_int(tokens),
        "trained_tokens": _to_int(last["trained_tokens"]),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "peak_memory_gb": max(rows.logged("peak_memory_gb").tolist(), default=None),
        "trainable_parameters": _number(run.config.get("trainable_parameters")),
    }
    for which in ("base", "finetuned"):
        metrics = read_json(run.folder / "evaluation" / f"{which}_model_metrics.json", [])
        row |= {f"{which}_{name}": metrics[name] for name in SCORES if _number(metrics.get(name)) is not None}
    return row | {"folder": str(run.folder), "notes": "; ".join(run.notes)}


def last_tenth(losses: np.ndarray) -> float | None:
    """Mean of the last tenth of the logged losses: the loss of one step is mostly noise."""
    return float(losses[-math.ceil(len(losses) / 10) :].mean()) if len(losses) else None


def _lowest(rows: Rows, column: str) -> tuple[float | None, float | None]:
    import numpy as np

    if not len(rows.logged(column)):
        return None, None
    index = int(np.nanargmin(rows[column]))
    return float(rows[column][index]), float(rows["step"][index])


def _number(value: Any) -> float | None:
    """`value` when it is a finite number, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if known else None


def _to_int(value: float | None) -> int | None:
    return None if value is None else int(value)


def duration(seconds: float) -> str:
    """95 -> 1:35 min, 7260 -> 2:01 h, 9 -> 9 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
