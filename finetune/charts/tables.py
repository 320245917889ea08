"""The summary of many runs: a table for people and a CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.charts.curves import duration
from finetune.charts.plots import short_number
from finetune.charts.run_labels import Comparison
from finetune.files import write_text_atomic
from finetune.progress import printable
from finetune.terminal_tables import fit, least_width, shown_width

# Column of the summary: its title and how its values are written, here and in curves_page.html (see FORMATTERS).
SHOWN_COLUMNS = {
    "status": ("status", "text"), "steps": ("steps", "count"), "final_loss": ("final", "loss"),
    "last_tenth_loss": ("last tenth", "loss"),
    "min_loss": ("min", "loss"), "best_eval_loss": ("best eval", "loss"), "best_eval_step": ("at step", "count"),
    "tokens": ("tokens", "short"), "seconds": ("time", "time"), "tokens_per_second": ("tokens/s", "rate"),
    "peak_memory_gb": ("peak GB", "gigabytes"), "trainable_parameters": ("trainable", "short"),
    "base_tool_name_accuracy": ("tool name base", "share"),
    "finetuned_tool_name_accuracy": ("tool name tuned", "share"),
    "base_parameter_accuracy": ("parameter base", "share"),
    "finetuned_parameter_accuracy": ("parameter tuned", "share"),
}  # fmt: skip
# In a terminal too narrow for all of them.
OMITTED_FIRST = (
    "trainable_parameters", "tokens", "peak_memory_gb", "best_eval_step", "tokens_per_second", "min_loss", "seconds",
    "base_parameter_accuracy", "base_tool_name_accuracy", "steps", "status",
)  # fmt: skip
FORMATTERS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": "{:,}".format,
    "loss": lambda value: f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}",
    "short": short_number,
    "time": duration,
    "rate": "{:,.0f}".format,
    "gigabytes": "{:.2f}".format,
    "share": "{:.3f}".format,
}


def print_table(table: list[dict[str, Any]]) -> None:
    """Print the summary; columns without any value are omitted, in a narrow terminal also some of the others."""
    width = shown_width()
    cells = {
        key: [SHOWN_COLUMNS[key][0], *(_cell(row.get(key), SHOWN_COLUMNS[key][1]) for row in table)]
        for key in SHOWN_COLUMNS if any(row.get(key) is not None for row in table)
    }  # fmt: skip
    others = {key: [key, *(row[key] for row in table)] for key in ("run", "notes") if any(row[key] for row in table)}
    omitted = []
    for key in OMITTED_FIRST:
        needed = [least_width(others[name]) for name in others] + [max(map(len, values)) for values in cells.values()]
        if sum(needed) + 2 * len(needed) <= width:
            break
        if key in cells:
            del cells[key]
            omitted.append(SHOWN_COLUMNS[key][0])
    view = Table(box=None, padding=(0, 1), header_style="bold")
    view.add_column("run", overflow="fold")
    for key, (title, *_) in cells.items():
        view.add_column(title, justify="left" if key == "status" else "right", no_wrap=True)
    if "notes" in others:
        view.add_column("notes", overflow="fold", style="yellow")
    for index, row in enumerate(table, start=1):
        notes = [escape(row["notes"])] if "notes" in others else []
        view.add_row(escape(row["run"]), *(escape(values[index]) for values in cells.values()), *notes)
    console = Console(width=width, highlight=False)
    console.print(fit(view, width))
    if omitted:
        console.print(f"not shown: {', '.join(omitted)}; -s FILE.csv writes all columns", style="dim", soft_wrap=True)


def _cell(value: Any, kind: str) -> str:
    try:
        return "" if value is None or value != value else FORMATTERS[kind](value)
    except OverflowError:  # a number of hundreds of digits in another's config
        return "too large"


def csv_text(value: Any) -> Any:
    """A printable cell of a CSV; text that a spreadsheet would read as a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(("=", "+", "-", "@", "\t", "\r")) + printable(value)


def write_summary(path: Path, comparison: Comparison, table: list[dict[str, Any]]) -> None:
    """The whole table as CSV, with one column for each flag that differs; numbers are not rounded."""
    flags = [flag for flag in comparison.differing if flag not in table[0]]
    names = list(dict.fromkeys(key for row in table for key in row if key not in ("folder", "notes")))
    header = [csv_text(name) for name in (names[0], *flags, *names[1:], "folder", "notes")]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, header, restval="", lineterminator="\n")
    writer.writeheader()
    for run, row in zip(comparison.runs, table, strict=True):
        cells = {**{flag: run.flags.get(flag) for flag in flags}, **row}
        writer.writerow({csv_text(name): csv_text(value) for name, value in cells.items()})
    write_text_atomic(path, buffer.getvalue())
