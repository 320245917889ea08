"""Reads the folders of training runs: their log as far as it goes, their settings, and one row of summary each.

Nothing here draws. A log may still be written to, be empty, end in the middle of a line or belong to a run that
failed; whatever is odd about a run is kept in `Run.notes` and ends up in the summary table.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LOG_NAME = "training_log.csv"
CONFIG_NAME = "experiment_config.json"
# The columns that curves and summary need; the others of the log are not even parsed.
COLUMNS = (
    "step", "epoch", "loss", "eval_loss", "tokens_seen", "trained_tokens", "seconds", "peak_memory_gb",
)  # fmt: skip
X_COLUMNS = {"step": "step", "epoch": "epoch", "tokens": "tokens_seen", "time": "seconds"}
# Scores of evaluate_lora.py that the summary shows when a run has been evaluated.
SCORES = ("tool_name_accuracy", "parameter_accuracy")
SILENT_AFTER_SECONDS = 600  # a run that says it is running and has not logged for this long is worth a word
LARGEST = 1e100  # a loss beyond is no number any more, and neither are sums and squares of such
_FOLDER_NAME = re.compile(
    r"(?P<model>.+)_r(?P<rank>\d+)_a(?P<alpha>[\d.]+)_lr(?P<lr>[^_]+)_ep(?P<epochs>[^_]+)_\d{8}_\d{6}(_\d+)?"
)


@dataclass
class Run:
    """One training run as it lies on disk; `rows` holds `COLUMNS` as float64, NaN where a cell is empty.

    A loss that was logged and is no number is infinite there, so that nobody takes it for one that was not logged.
    """

    folder: Path
    rows: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def flags(self) -> dict[str, Any]:
        """The settings of the run: from its config, or as far as the folder's name tells them."""
        flags = self.config.get("flags")
        return flags if isinstance(flags, dict) and flags else flags_from_name(self.folder.name)

    @property
    def status(self) -> str:
        status = self.config.get("status")
        return status if isinstance(status, str) and status else "unknown"

    def points(self, x: str, y: str) -> tuple[Any, Any]:
        """Two float arrays of one length: column `y` over the x axis named `x` (a key of `X_COLUMNS`), no NaN."""
        pair = self.rows[[X_COLUMNS[x], y]].to_numpy()
        pair = pair[(pair == pair).all(axis=1) & (abs(pair[:, 1]) != float("inf"))]
        return pair[:, 0], pair[:, 1]


def flags_from_name(name: str) -> dict[str, Any]:
    """`kanana_r16_a32_lr2em04_ep3_20251218_143022` -> model, rank, alpha, lr, epochs; {} for any other name."""
    match = _FOLDER_NAME.fullmatch(name)
    if not match:
        return {}
    flags: dict[str, Any] = {"model": match["model"], "rank": int(match["rank"])}
    for key in ("alpha", "lr", "epochs"):
        try:
            number = float(match[key].replace("em", "e-").replace("ep", "e+"))
        except ValueError:
            continue
        flags[key] = int(number) if key != "lr" and number.is_integer() else number
    return flags


def find_logs(arguments: list[str]) -> list[Path]:
    """The logs that `arguments` name: log files, run folders, folders of run folders, or patterns with * ? [ ].

    A run folder without a log is returned as the path its log would have. Files that are no CSV are passed over, so
    that `experiments/*` works. Raises UserError when an argument matches nothing.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        matches = [Path(argument)]
        if not matches[0].exists() and glob.has_magic(argument):
            # cmd.exe and PowerShell hand patterns on unexpanded.
            matches = sorted(map(Path, glob.glob(argument, recursive=True)), key=natural_key)  # noqa: PTH207 (a pattern may be absolute)
        if not matches or not matches[0].exists():
            raise UserError(f"{argument}: no such log or folder; give training_log.csv files or experiment folders")
        logs: list[Path] = []
        for match in matches:
            if match.is_dir():
                logs += logs_in(match)
            elif match.suffix == ".csv" or len(arguments) == len(matches) == 1:
                logs.append(match)
        if not logs and len(matches) == 1 and matches[0].is_dir() and len(arguments) == 1:
            raise UserError(f"{argument}: holds no {LOG_NAME}; give an experiment folder or a folder of them")
        for log in logs:
            found.setdefault(log.resolve(), log)
    if not found:
        raise UserError(f"no {LOG_NAME} among the {len(arguments)} paths given")
    return list(found.values())


def logs_in(folder: Path) -> list[Path]:
    """The log of a run folder, or the logs of all run folders below `folder`."""
    if (folder / LOG_NAME).exists() or (folder / CONFIG_NAME).exists():
        return [folder / LOG_NAME]
    below = {path.parent for name in (LOG_NAME, CONFIG_NAME) for path in folder.rglob(name)}
    # A name that starts with a dot is a folder still being made.
    return [run / LOG_NAME for run in sorted(below, key=natural_key) if not run.name.startswith(".")]


def natural_key(path: Path | str) -> list[tuple[int, Any]]:
    """Sort key in which r4 comes before r16."""
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", str(path)) if part]


def read_run(log: Path) -> Run:
    """Read one log and the config beside it; never raises for what is inside them, see `Run.notes`."""
    notes: list[str] = []
    config = read_json(log.parent / CONFIG_NAME, notes)
    rows = read_log(log, notes)
    if config.get("status") == "running" and log.exists():
        silent = time.time() - log.stat().st_mtime
        if silent > SILENT_AFTER_SECONDS:
            notes.append(f"says it is running, last wrote {duration(silent)} ago")
    return Run(log.parent, rows, config, notes)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"no {path.name}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error.__class__.__name__})")
        return {}
    return config if isinstance(config, dict) else {}


def read_log(path: Path, notes: list[str]) -> pd.DataFrame:
    """`COLUMNS` of one training_log.csv, one row per step in the order of steps; what was odd goes to `notes`."""
    import numpy as np
    import pandas as pd

    empty = pd.DataFrame({name: pd.Series(dtype="float64") for name in COLUMNS})
    try:
        data = path.read_bytes()
    except OSError as error:
        notes.append("no log yet" if isinstance(error, FileNotFoundError) else f"log cannot be read: {error.strerror}")
        return empty
    if b"\0" in data:
        data = data.replace(b"\0", b"")
        notes.append("NUL bytes in the log (the machine went down?)")
    if not data.endswith(b"\n") and data.strip():
        # Only a comma or a line end shows that a number was written to its last digit.
        cut = max(data.rfind(b","), data.rfind(b"\n")) + 1
        data = data[:cut]
        notes.append("last line is cut")
    try:
        raw = pd.read_csv(
            io.BytesIO(data), usecols=lambda name: name.strip() in COLUMNS, index_col=False, quoting=csv.QUOTE_NONE,
            keep_default_na=False, na_values=[""], encoding="utf-8-sig", encoding_errors="replace", low_memory=False,
        )  # fmt: skip
    except pd.errors.EmptyDataError:
        notes.append("empty log")
        return empty
    except (ValueError, pd.errors.ParserError) as error:
        notes.append(f"not a training log ({' '.join(str(error).split())[:80]})")
        return empty
    raw.columns = [name.strip() for name in raw.columns]
    if not {"step", "loss"} <= set(raw.columns):
        notes.append("not a training log (no columns step and loss)")
        return empty

    spoilt = data.count(b"\n") - 1 - len(raw)
    rows = empty.copy() if raw.empty else pd.DataFrame(index=raw.index)
    for name in COLUMNS:
        column = raw[name] if name in raw else pd.Series(np.nan, index=raw.index)
        if column.dtype == object:  # pandas reads 500 digits as an integer that no float holds, and then cannot go on
            column = column.where(column.isna(), column.astype(str))
        rows[name] = pd.to_numeric(column, errors="coerce").astype("float64")
        if name in ("loss", "eval_loss"):
            text = column.astype(str).str.lower() if column.dtype.kind not in "fiu" else None
            endless = rows[name].abs() >= LARGEST
            diverged = endless if text is None else endless | text.str.contains("nan|inf")
            diverged &= column.notna()
            if diverged.any():
                rows.loc[diverged, name] = np.inf
                first = rows["step"][diverged].iloc[0]
                notes.append(f"{name} is no number in {int(diverged.sum())} rows, first at step {first:.0f}")
        else:
            rows[name] = rows[name].where(rows[name].abs() < LARGEST)
    spoilt += int(rows["step"].isna().sum())
    rows = rows[rows["step"].notna()]
    if spoilt > 0:
        notes.append(f"{spoilt} unreadable line{'s' * (spoilt > 1)} left out")
    if rows.empty:
        notes.append("no rows yet")
        return empty
    if not (rows["step"].diff().iloc[1:] > 0).all():
        # The same step may come once with the loss and once with eval_loss; a repeated loss means a restart.
        if rows.loc[rows["loss"].notna(), "step"].duplicated().any():
            notes.append("steps were logged more than once; the later rows count")
        rows = rows.groupby("step", as_index=False).last()[list(COLUMNS)]
    if not rows["loss"].notna().any():
        notes.append("no loss yet")
    rows["seconds"] += (-rows["seconds"].diff()).clip(lower=0).fillna(0).cumsum()  # a restart may begin at 0 again
    return rows.reset_index(drop=True)


def smooth(values: Any, width: int | None = None) -> Any:
    """Mean over `width` neighbouring points, centred, with shorter windows at both ends.

    Centred, so that a fall of the loss is not drawn later than it happened. `width` None takes 1/25 of the curve and
    at least 5 points; 0 or 1 leaves `values` as they are.
    """
    import pandas as pd

    if width is None:
        width = max(5, len(values) // 25)
    if width < 2 or len(values) < 3:
        return values
    return pd.Series(values).rolling(min(width, len(values)), center=True, min_periods=1).mean().to_numpy()


def thin(y: Any, points: int) -> Any:
    """Indices of at most `points` (and the two ends) of `y` that keep every bucket's lowest and highest value."""
    import numpy as np

    if len(y) <= points:
        return np.arange(len(y))
    buckets = max(points // 2 - 1, 1)
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    size = int(np.diff(edges).max())
    index = np.minimum(edges[:-1, None] + np.arange(size)[None, :], edges[1:, None] - 1)
    values = np.asarray(y)[index]
    rows = np.arange(buckets)
    return np.unique(
        np.concatenate([[0, len(y) - 1], index[rows, values.argmin(axis=1)], index[rows, values.argmax(axis=1)]])
    )


def summarize(run: Run) -> dict[str, Any]:
    """One row of the summary table; None where the run has not measured it. Times in seconds, memory in GB."""
    rows = run.rows
    last = {name: _last(rows[name]) for name in COLUMNS}
    best, lowest = _lowest(rows, "eval_loss"), _lowest(rows, "loss")
    tokens, seconds = last["tokens_seen"], last["seconds"]
    row: dict[str, Any] = {
        "run": run.label or run.folder.name,
        "status": run.status,
        "steps": _whole(last["step"]),
        "epochs": last["epoch"],
        "final_loss": last["loss"],
        "min_loss": lowest[0],
        "min_loss_step": _whole(lowest[1]),
        "best_eval_loss": best[0],
        "best_eval_step": _whole(best[1]),
        "tokens": _whole(tokens),
        "trained_tokens": _whole(last["trained_tokens"]),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "peak_memory_gb": None if rows.empty or rows["peak_memory_gb"].isna().all() else rows["peak_memory_gb"].max(),
        "trainable_parameters": _number(run.config.get("trainable_parameters")),
    }
    for which in ("base", "finetuned"):
        metrics = read_json(run.folder / "evaluation" / f"{which}_model_metrics.json", [])
        row |= {f"{which}_{name}": metrics[name] for name in SCORES if _number(metrics.get(name)) is not None}
    return row | {"folder": str(run.folder), "notes": "; ".join(run.notes)}


def _last(column: pd.Series) -> float | None:
    index = column.last_valid_index()
    return None if index is None else float(column[index])


def _lowest(rows: pd.DataFrame, column: str) -> tuple[float | None, float | None]:
    values = rows[column].dropna()
    return (None, None) if values.empty else (float(values.min()), float(rows["step"][values.idxmin()]))


def _number(value: Any) -> float | None:
    """A finite number of a JSON file as it is, None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def duration(seconds: float) -> str:
    """95 -> 1:35 min, 7260 -> 2:01 h, 9 -> 9 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def broke_off(run: Run) -> bool:
    """Whether the curve's end is no regular end and gets a cross."""
    return run.status not in ("finished", "running", "unknown") or any("no number" in note for note in run.notes)
