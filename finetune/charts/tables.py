"""The summary of many runs: a table for people and a CSV for programs."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.charts import curves
from finetune.charts.plots import short_number
from finetune.charts.run_labels import Comparison
from finetune.files import write_text_atomic


def print_table(table: list[dict[str, Any]]) -> None:
    """The summary for people; what no run has measured gets no column."""

    def cell(form):
        return lambda value: "" if value is None or value != value else form(value)

    loss = cell(lambda value: f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}")
    count = cell("{:,}".format)
    columns = {
        "status": ("status", cell(str)), "steps": ("steps", count), "final_loss": ("final", loss),
        "min_loss": ("min", loss), "best_eval_loss": ("best eval", loss), "best_eval_step": ("at step", count),
        "tokens": ("tokens", cell(short_number)), "seconds": ("time", cell(curves.duration)),
        "tokens_per_second": ("tokens/s", cell("{:,.0f}".format)), "peak_memory_gb": ("peak GB", cell("{:.2f}".format)),
        "trainable_parameters": ("trainable", cell(short_number)),
    }  # fmt: skip
    columns |= {
        f"{which}_{score}": (f"{score.removesuffix('_accuracy').replace('_', ' ')} {short}", cell("{:.3f}".format))
        for score in curves.SCORES
        for which, short in (("base", "base"), ("finetuned", "tuned"))
    }
    wide = None if sys.stdout.isatty() else 220
    console = Console(width=wide, highlight=False)
    view = Table(box=None, padding=(0, 1), header_style="bold")
    view.add_column("run", overflow="fold")
    shown = [key for key in columns if any(row.get(key) is not None for row in table)]
    for key in shown:
        view.add_column(columns[key][0], justify="left" if key == "status" else "right", no_wrap=True)
    if any(row["notes"] for row in table):
        view.add_column("notes", overflow="fold", style="yellow")
    for row in table:
        cells = [escape(row["run"]), *[columns[key][1](row.get(key)) for key in shown]]
        view.add_row(*cells, *([escape(row["notes"])] if row["notes"] else []))
    console.print(view)


def write_summary(path: Path, comparison: Comparison, table: list[dict[str, Any]]) -> None:
    """The whole table as CSV, with one column for each flag that differs; numbers are not rounded."""
    flags = [f for f in comparison.differing if f not in table[0]]
    names = list(dict.fromkeys(key for row in table for key in row if key not in ("folder", "notes")))
    header = [names[0], *flags, *names[1:], "folder", "notes"]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, header, restval="", lineterminator="\n")
    writer.writeheader()
    for run, row in zip(comparison.runs, table, strict=True):
        writer.writerow({**{flag: run.flags.get(flag) for flag in flags}, **row})
    write_text_atomic(path, buffer.getvalue())
