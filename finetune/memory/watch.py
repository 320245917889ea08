"""Readings of the cards over time: a log that stays readable whenever the program dies, and its picture."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import write_bytes_atomic
from finetune.memory.devices import Card, Driver

COLUMNS = (
    "time", "index", "name", "status", "memory_used_gb", "memory_free_gb", "memory_total_gb", "utilization_percent",
    "temperature_c", "power_w",
)  # fmt: skip
NUMBERS = frozenset(COLUMNS) - {"time", "name", "status"}
SUFFIXES = (".json", ".jsonl", ".csv")
LONGEST_SLEEP = 1e9  # seconds; time.sleep refuses ten times as many


class CardLog:
    """Appends one record per card and reading to a .json (one array), .jsonl or .csv file.

    Every reading goes out in one write at the end of the file, so a process killed between two writes leaves a whole
    file, also of .json, whose closing bracket is written again each time. An earlier log of that name is continued.
    Raises UserError for another suffix, for a file that is not such a log and for a place that cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--output {path}: the name must end in {', '.join(SUFFIXES)}")
        self.kind = self.path.suffix.lower()
        if self.path.exists():
            self.records = len(read_log(self.path))
            self._drop_torn_end()
        else:
            self.records = 0
            write_bytes_atomic(self.path, self._start())

    def add(self, cards: Iterable[Card], moment: str) -> None:
        """Write one reading of all cards."""
        records = [record(card, moment) for card in cards]
        if not records:
            return
        if self.kind == ".csv":
            text = io.StringIO()
            csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(records)
            lines = text.getvalue()
        else:
            separator = ",\n" if self.kind == ".json" else "\n"
            lines = separator.join(json.dumps(r, ensure_ascii=False) for r in records)
            if self.kind == ".json":
                lines = (",\n" if self.records else "\n") + lines + "\n]\n"
            else:
                lines += "\n"
        data = lines.encode("utf-8")
        try:
            with self.path.open("r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                # Onto "\n]\n", or onto "]\n" behind the opening bracket.
                begin = end - (0 if self.kind != ".json" else 3 if self.records else 2)
                file.seek(begin)
                closing = file.read(end - begin)
                file.seek(begin)
                if file.write(data) < len(data):  # a disk that is nearly full takes a part, and says so next time
                    file.seek(begin)
                    file.write(closing)
                    file.truncate()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; the log ends here") from error
        self.records += len(records)

    def _start(self) -> bytes:
        return {".json": b"[]\n", ".jsonl": b"", ".csv": (",".join(COLUMNS) + "\n").encode()}[self.kind]

    def _drop_torn_end(self) -> None:
        """Write an earlier log anew if its last record is not whole (the machine lost power in a write)."""
        text = self.path.read_text(encoding="utf-8")
        whole = _as_text(read_log(self.path), self.kind)
        if text != whole:
            write_bytes_atomic(self.path, whole.encode("utf-8"))


def record(card: Card, moment: str) -> dict[str, Any]:
    values = {"time": moment, **card.as_dict()}
    return {column: values[column] for column in COLUMNS}


def _as_text(records: list[dict[str, Any]], kind: str) -> str:
    if kind == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    if kind == ".jsonl":
        return "".join(line + "\n" for line in lines)
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The whole records of a log; a record cut off at the end is left out. Raises UserError for any other file."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a device may go on for ever, and a pipe say nothing
        raise UserError(f"cannot read {path}: it is no file")
    try:
        text = path.read_text(encoding="utf-8").rstrip("\0")  # which some file systems leave when the power fails
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    whole_lines = text.rfind("\n") + 1
    complete, torn = text[:whole_lines], text[whole_lines:]
    if path.suffix.lower() == ".csv":
        try:
            header, *rows = list(csv.reader(io.StringIO(complete))) or [None]
        except csv.Error as error:
            raise UserError(f"cannot read {path}: {error}; choose another --output") from error
        if header != list(COLUMNS) and (header or not _begins(torn, ",".join(COLUMNS))):
            raise UserError(f"{path} is not a log of gpu_memory.py: its first line names other columns")
        return [_checked(path, number, row, _typed) for number, row in enumerate(rows, start=1) if row]
    not_a_log = UserError(f"{path} is not a log of gpu_memory.py; choose another --output")
    if path.suffix.lower() == ".json":
        if text.strip() and not text.startswith("["):
            raise not_a_log
        lines = [line.strip().rstrip(",") for line in text.splitlines()]
        lines = [line for line in lines if line not in ("[", "]", "[]", "")]
    else:
        lines = [*complete.splitlines(), *filter(None, [torn])]
    records = []
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) - 1 and _begins(line, '{"time": "'):
                break
            value = None
        if not isinstance(value, dict) or not set(COLUMNS) <= value.keys():
            raise not_a_log
        records.append(_checked(path, number + 1, value, dict))
    return records


def _begins(torn: str, start: str) -> bool:
    """Whether a torn end is what is left of a line that begins with `start`: what anybody else wrote is no torn end."""
    return torn.startswith(start) or start.startswith(torn)


def _checked(path: Path, number: int, row: Any, read: Callable[[Any], dict]) -> dict[str, Any]:
    """What `read` makes of a record; UserError where a value of it is of the wrong kind (somebody edited the log)."""
    try:
        one = read(row)
        if not 1970 <= datetime.fromisoformat(one["time"]).year < 3000:  # the chart's axis has an end
            raise ValueError(f"time is {one['time']!r}")
        str(one["name"]).encode()  # half of a surrogate pair cannot be written again
        for column, value in one.items():
            none = value is None and column != "index"
            if column in NUMBERS and not none and not (isinstance(value, int | float) and abs(value) < 1e300):
                raise ValueError(f"{column} is {value!r}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}, record {number}: {error}; mend that line or remove it") from error
    return one


def _typed(cells: list[str]) -> dict[str, Any]:
    """A CSV row with numbers for numbers and None for what was not known."""
    if len(cells) != len(COLUMNS):
        raise ValueError(f"it has {len(cells)} cells instead of {len(COLUMNS)}")
    whole = {"index", "utilization_percent", "temperature_c"}
    return {
        column: text if column not in NUMBERS else None if text == "" else int(text) if column in whole else float(text)
        for column, text in zip(COLUMNS, cells, strict=True)
    }


def watch(driver: Driver, log: CardLog | None, console: Any, *, interval: float, samples: int | None) -> None:
    """Read all cards every `interval` seconds, show and log them, until `samples` readings or Ctrl-C.

    A terminal gets one table that is drawn anew, a file one line per card and reading.
    """
    from rich.live import Live

    from finetune.memory.tables import live_table

    number, due = 0, time.monotonic()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        while samples is None or number < samples:
            if number:
                due = max(due + interval, time.monotonic())  # readings keep their pace, and none is made up for
                time.sleep(min(max(0.0, due - time.monotonic()), LONGEST_SLEEP))
            cards, now = driver.cards(), datetime.now().astimezone().isoformat(timespec="milliseconds")
            if log is not None:
                log.add(cards, now)
            if live is not None:
                live.update(live_table(cards, now), refresh=True)
            else:
                for card in cards:
                    used = "lost" if card.status == "lost" else f"{card.memory_used_gb} of {card.memory_total_gb} GB"
                    load = "" if card.utilization_percent is None else f", {card.utilization_percent} %"
                    line = f"{now}  {card.index} {card.name}: {used}{load}"
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
            number += 1


def draw(records: list[dict[str, Any]], path: str | Path) -> Path:
    """A PNG of memory and load of every card over time; a card's lost readings leave a gap. UserError without any."""
    if not records:
        raise UserError("nothing to draw: the log holds no reading yet")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, load) = plt.subplots(2, 1, sharex=True, figsize=(9, 5.5), layout="constrained")
    for index in sorted({r["index"] for r in records}):
        of_card = [r for r in records if r["index"] == index]
        times = [datetime.fromisoformat(r["time"]).astimezone() for r in of_card]

        def values(column, rows=of_card):
            return [float("nan") if r[column] is None else r[column] for r in rows]

        name = f"{index}: {of_card[-1]['name']}".replace("$", r"\$")  # or it is read as a formula
        (line,) = memory.plot(times, values("memory_used_gb"), label=name, drawstyle="steps-post")
        totals = [r["memory_total_gb"] for r in of_card if r["memory_total_gb"] is not None]
        if totals:
            memory.axhline(totals[-1], color=line.get_color(), linestyle=":", linewidth=1)
        load.plot(times, values("utilization_percent"), color=line.get_color(), drawstyle="steps-post")
        lost = [t for t, r in zip(times, of_card, strict=True) if r["status"] == "lost"]
        memory.plot(lost, [0] * len(lost), "x", color=line.get_color(), label=f"{index} lost" if lost else None)
    memory.set_ylabel("memory in use, GB (dotted: all)")
    load.set_ylabel("load, %")
    memory.set_ylim(bottom=0)
    load.set_ylim(0, 105)
    memory.legend(loc="upper left")
    figure.autofmt_xdate()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    return write_bytes_atomic(path, picture.getvalue())
