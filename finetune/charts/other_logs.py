"""Logs of other trainers and trackers as LoggedRuns.

trainer_state.json of Transformers' Trainer, trainer_log.jsonl of LLaMA-Factory, CSV exports of TensorBoard (one curve
in a file) and of Weights & Biases (a column for each run and metric, or one run's history).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.charts.curves import COLUMNS, LoggedRun, parse, read_run, tidy
from finetune.errors import UserError
from finetune.files import read_shown
from finetune.progress import counted
from finetune.runs.experiment import CHECKPOINT

STEP_NAMES = ("train/global_step", "global_step", "step", "_step")
METRICS = {
    "loss": "loss", "train/loss": "loss", "train_loss": "loss", "training_loss": "loss",
    "eval/loss": "eval_loss", "eval_loss": "eval_loss", "val/loss": "eval_loss", "val_loss": "eval_loss",
    "validation/loss": "eval_loss",
    "train/epoch": "epoch", "epoch": "epoch", "_runtime": "seconds",
}  # fmt: skip
TENSORBOARD_HEADER = ["Wall time", "Step", "Value"]
_TAG = re.compile(r"(.*?)[-_.]?tag[-_.](.+)", re.IGNORECASE)  # the name that TensorBoard gives a download
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d+):(\d+(?:\.\d+)?)")
Entry = Mapping[str, Any]


def read_runs(logs: Iterable[Path]) -> list[LoggedRun]:
    """The runs in these files; curves of one TensorBoard run in several files become one run."""
    runs: dict[Path, LoggedRun] = {}
    for log in logs:
        for run in _read(log):
            earlier = runs.get(run.folder)
            runs[run.folder] = run if earlier is None else _merged(earlier, run)
    return list(runs.values())


def _read(log: Path) -> Iterator[LoggedRun]:
    header = [] if log.suffix in (".json", ".jsonl") else _header(log)
    if log.name == "trainer_state.json":
        folder = log.parent.parent if CHECKPOINT.fullmatch(log.parent.name) else log.parent
        yield _of_entries(folder, _state_entries(log), [])
    elif log.suffix == ".jsonl":
        notes: list[str] = []
        yield _of_entries(log.parent, list(_factory_entries(log, notes)), notes)
    elif header == TENSORBOARD_HEADER:
        yield _tensorboard(log)
    elif not {"step", "loss"} <= set(header) and (columns := _wandb_columns(header)):
        yield from _wandb(log, header, columns)
    else:
        yield read_run(log)


def _text(log: Path) -> str:
    try:
        return read_shown(log)
    except OSError as error:
        raise UserError(f"cannot read {log}: {error.strerror}") from error


def _state_entries(log: Path) -> list[Entry]:
    try:
        history = json.loads(_text(log))["log_history"]
        return [{**entry, "tokens_seen": entry.get("num_input_tokens_seen"), "seconds": None} for entry in history]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{log} is not a log of Transformers' Trainer ({type(error).__name__}: {error})") from error


def _factory_entries(log: Path, notes: list[str]) -> Iterator[Entry]:
    unreadable = 0
    for line in filter(str.strip, _text(log).split("\n")):
        try:
            entry = json.loads(line)
            clock = _CLOCK.fullmatch(str(entry.get("elapsed_time")))
            yield {
                **entry,
                "step": entry["current_steps"],
                "tokens_seen": entry.get("total_tokens"),
                "seconds": _seconds(clock) if clock else None,
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            unreadable += 1
    if unreadable:
        notes.append(f"{counted(unreadable, 'unreadable line')} skipped")


def _seconds(clock: re.Match[str]) -> float:
    return sum(float(n or 0) * unit for n, unit in zip(clock.groups(), (86400, 3600, 60, 1), strict=True))


def _of_entries(folder: Path, entries: list[Entry], notes: list[str]) -> LoggedRun:
    kept = [entry for entry in entries if "step" in entry and ("loss" in entry or "eval_loss" in entry)]
    if not kept:
        notes.append("no loss yet")
    columns = {name: [_number(entry.get(name)) for entry in kept] for name in COLUMNS}
    return LoggedRun(folder, tidy(columns, notes), {}, notes)


def _number(value: Any) -> float:
    """NaN where nothing was logged, infinity for a loss that is not a finite number."""
    return parse("" if value is None else str(value))


def _header(log: Path) -> list[str]:
    try:
        return next(csv.reader(read_shown(log).splitlines()[:1]), [])
    except (OSError, csv.Error):  # read_run says why
        return []


def _rows(log: Path, header: list[str]) -> list[list[str]]:
    with log.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(header) and row != header]


def _tensorboard(log: Path) -> LoggedRun:
    rows = [[parse(cell) for cell in row] for row in _rows(log, TENSORBOARD_HEADER)]
    tagged = _TAG.fullmatch(log.stem)
    name, tag = tagged.groups() if tagged else (log.stem, log.stem)
    metric = "eval_loss" if re.search(r"eval|valid", tag, re.IGNORECASE) else "loss"
    notes: list[str] = []
    columns = {column: [float("nan")] * len(rows) for column in COLUMNS}
    columns |= {"step": [step for _, step, _ in rows], metric: [value for _, _, value in rows]}
    if metric == "loss" and rows:
        columns["seconds"] = [wall - rows[0][0] for wall, _, _ in rows]
    return LoggedRun(
        log.parent / (name.removeprefix("run-").strip("-_. ") or log.stem), tidy(columns, notes), {}, notes
    )


def _wandb_columns(header: list[str]) -> dict[str, dict[str, int]]:
    """Column numbers of each run's metrics; the run "" is that of a history, which has no names."""
    found: dict[str, dict[str, int]] = {}
    for index, title in enumerate(header):
        run, _, metric = title.rpartition(" - ")
        name = "step" if metric.lower() in STEP_NAMES else METRICS.get(metric.lower())
        if name and not (name == "step" and metric.startswith("_") and "step" in found.get(run, {})):
            found.setdefault(run, {})[name] = index
    shared = found.get("", {})
    return {
        run: columns if "step" in columns else {**columns, "step": shared["step"]}
        for run, columns in found.items()
        if {"loss", "eval_loss"} & columns.keys() and ("step" in columns or "step" in shared)
    }


def _wandb(log: Path, header: list[str], runs: dict[str, dict[str, int]]) -> Iterator[LoggedRun]:
    rows = _rows(log, header)
    for run, places in runs.items():
        kept = [
            row for row in rows if any(row[places[name]].strip() for name in ("loss", "eval_loss") if name in places)
        ]
        notes: list[str] = []
        columns = {
            name: [parse(row[places[name]].strip()) if name in places else float("nan") for row in kept]
            for name in COLUMNS
        }
        yield LoggedRun(log / (run.replace("/", "_").strip() or log.stem), tidy(columns, notes), {}, notes)


def _merged(first: LoggedRun, second: LoggedRun) -> LoggedRun:
    notes: list[str] = []
    columns = {name: [*first.rows[name], *second.rows[name]] for name in COLUMNS}
    rows = tidy(columns, notes)
    return LoggedRun(first.folder, rows, first.config, list(dict.fromkeys([*first.notes, *second.notes, *notes])))
