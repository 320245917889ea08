"""GPU readings over time: a log that stays readable when the monitor is killed, and its chart."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import time
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.charts.figures import new_figure, picture
from finetune.errors import UserError, user_errors
from finetune.files import read_text, write_bytes_atomic
from finetune.memory.devices import Driver, Gpu

COLUMNS = ("time", *(field.name for field in fields(Gpu) if field.name != "capability"))
NUMBER_COLUMNS = [column for column in COLUMNS if column not in ("time", "name", "status")]
INTEGER_COLUMNS = ("index", "utilization_percent", "temperature_c")
SUFFIXES = (".json", ".jsonl", ".csv")
MAX_SLEEP_SECONDS = 1e9  # time.sleep refuses 1e10
MAX_NUMBER = 1e300  # in a log; Matplotlib's axes overflow beyond


class GpuLog:
    """Appends one record per GPU and reading to a .json (one array), .jsonl or .csv file.

    Each reading is one write at the end of the file, closing bracket included, so the file is complete whenever the
    monitor is killed. An existing log is continued. Raises UserError for another suffix, for a file that is not such a
    log and for a file that cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.kind = self.path.suffix.lower()
        if self.kind not in SUFFIXES:
            raise UserError(f"--output {path}: the name must end in {', '.join(SUFFIXES)}")
        exists = self.path.exists()
        records = read_log(self.path) if exists else []
        self.records = len(records)
        text = _as_text(records, self.kind)
        if not exists or self.path.read_text(encoding="utf-8") != text:
            write_bytes_atomic(self.path, text.encode("utf-8"))

    def add(self, gpus: Iterable[Gpu], moment: str) -> None:
        """Append one reading of all GPUs."""
        records = [{column: moment if column == "time" else getattr(gpu, column) for column in COLUMNS} for gpu in gpus]
        if not records:
            return
        text, closing = _as_text(records, self.kind), b""
        if self.kind == ".json":
            closing = b"\n]\n" if self.records else b"]\n"
            text = ",\n" + text.removeprefix("[\n") if self.records else text.removeprefix("[")
        elif self.kind == ".csv":
            text = text.partition("\n")[2]
        data = text.encode("utf-8")
        what = user_errors(f"cannot write {self.path}", "the log ends here")
        with what, self.path.open("r+b", buffering=0) as file:
            begin = file.seek(-len(closing), os.SEEK_END)
            if file.write(data) < len(data):  # the disk is nearly full
                file.seek(begin)
                file.write(closing)
                file.truncate()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.records += len(records)


def _as_text(records: list[dict[str, Any]], kind: str) -> str:
    """A complete log."""
    if kind == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if kind == ".jsonl":
        return "".join(line + "\n" for line in lines)
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log. Raises UserError for any other file, and for one that a power failure has cut off."""
    path = Path(path)
    kind, not_a_log = path.suffix.lower(), f"{path} is not a log of gpu_memory.py (fix it, or choose another --output)"
    if path.exists() and not path.is_file():  # reading a device may never end
        raise UserError(f"cannot read {path}: not a regular file")
    text, records = read_text(path, "log"), list[dict[str, Any]]()
    if kind != ".json" and not text.endswith("\n") and text:  # half a number would be one too
        raise UserError(f"{not_a_log}: its last line is cut off")
    try:
        if kind == ".csv":
            rows: Any = csv.DictReader(io.StringIO(text))
            if rows.fieldnames not in (None, list(COLUMNS)):
                raise UserError(not_a_log)
        elif kind == ".json":
            rows = json.loads(text or "[]")
        else:
            rows = map(json.loads, text.splitlines())
        for row in rows:
            records.append(_checked(row))
    except (csv.Error, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{not_a_log}: record {len(records) + 1}: {error}") from error
    return records


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The record with its numbers converted, "" to None; raises an exception for a missing or wrong value."""
    if len(values) < len(COLUMNS) or None in values or not 1970 <= datetime.fromisoformat(values["time"]).year < 3000:
        raise ValueError(f"malformed record of {values['time']!r}")  # the years are those of Matplotlib's axis
    str(values["name"]).encode()  # raises for half a surrogate pair, which cannot be written again
    record = {column: values[column] for column in COLUMNS}
    for column in NUMBER_COLUMNS:
        if column == "index" or record[column] not in (None, ""):
            record[column] = (int if column in INTEGER_COLUMNS else float)(record[column])
            if not abs(record[column]) < MAX_NUMBER:
                raise ValueError(f"{column} is {record[column]!r}")
        else:
            record[column] = None
    return record


def watch(driver: Driver, log: GpuLog | None, console: Console, *, interval: float, samples: int | None) -> None:
    """Read all GPUs every `interval` seconds, show and log them, until `samples` readings or Ctrl-C.

    On a terminal one table is redrawn; otherwise each GPU and reading is one line.
    """
    from rich.live import Live

    from finetune.memory.tables import live_table

    number, due = 0, time.monotonic()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        while samples is None or number < samples:
            if number:
                due = max(due + interval, time.monotonic())  # a late reading is not made up for
                time.sleep(min(max(0.0, due - time.monotonic()), MAX_SLEEP_SECONDS))
            gpus, now = driver.gpus(), datetime.now().astimezone().isoformat(timespec="milliseconds")
            if log is not None:
                log.add(gpus, now)
            if live is not None:
                live.update(live_table(gpus, now), refresh=True)
            else:
                for gpu in gpus:
                    used = "lost" if gpu.status == "lost" else f"{gpu.memory_used_gb} of {gpu.memory_total_gb} GB"
                    load = "" if gpu.utilization_percent is None else f", {gpu.utilization_percent} %"
                    line = f"{now}  {gpu.index} {gpu.name}: {used}{load}"
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
            number += 1


def draw(records: list[dict[str, Any]], path: str | Path) -> Path:
    """Write a PNG of memory and load of every GPU over time, with gaps where it was lost; UserError without records."""
    if not records:
        raise UserError("nothing to draw: the log holds no reading")
    with new_figure(9, 5.5) as figure:
        memory, load = figure.subplots(2, 1, sharex=True)
        for index in sorted({r["index"] for r in records}):
            of_gpu = [r for r in records if r["index"] == index]
            times = [datetime.fromisoformat(r["time"]).astimezone() for r in of_gpu]

            def values(column: str, rows: list[dict[str, Any]] = of_gpu) -> list[float]:
                return [float("nan") if r[column] is None else r[column] for r in rows]

            name = f"{index}: {of_gpu[-1]['name']}"
            (line,) = memory.plot(times, values("memory_used_gb"), label=name, drawstyle="steps-post")
            totals = [r["memory_total_gb"] for r in of_gpu if r["memory_total_gb"] is not None]
            if totals:
                memory.axhline(totals[-1], color=line.get_color(), linestyle=":", linewidth=1)
            load.plot(times, values("utilization_percent"), color=line.get_color(), drawstyle="steps-post")
            lost = [t for t, r in zip(times, of_gpu, strict=True) if r["status"] == "lost"]
            memory.plot(lost, [0] * len(lost), "x", color=line.get_color(), label=f"{index} lost" if lost else None)
        memory.set_ylabel("memory in use, GB (dotted: total)")
        load.set_ylabel("load, %")
        memory.set_ylim(bottom=0)
        load.set_ylim(0, 105)
        memory.legend(loc="upper left")
        figure.autofmt_xdate()
        content = picture(figure, dpi=120)
    return write_bytes_atomic(path, content)
