"""The loss curves of many runs as one self-contained HTML file: it loads nothing from the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.charts import curves
from finetune.charts.plots import X_LABELS, headline, subtitle
from finetune.charts.rows import Rows
from finetune.charts.run_labels import Comparison
from finetune.charts.tables import SHOWN_COLUMNS
from finetune.files import write_text_atomic
from finetune.progress import printable

if TYPE_CHECKING:
    import numpy as np


TEMPLATE = Path(__file__).with_name("curves_page.html")
MAX_POINTS = 60_000  # of all runs together, so that the page stays below a few MB
MAX_EVAL_POINTS = 60  # of one run
COLUMNS = {"run": ("run", "text"), **SHOWN_COLUMNS, "notes": ("notes", "text")}


def write_page(
    comparison: Comparison,
    table: list[dict[str, Any]],
    output: Path,
    *,
    x: str = "step",
    log_y: bool = False,
    smooth: int | None = None,
) -> None:
    """Write the page.

    table             `curves.summarize` of each run
    x, log_y, smooth  the page's initial settings
    """
    points = max(150, min(2000, MAX_POINTS // max(len(comparison.runs), 1)))
    shown = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in table)]
    data = {
        "title": headline(comparison),
        "subtitle": subtitle(comparison),
        "axis": x,
        "log": log_y,
        "axes": X_LABELS,
        "runs": [
            {"color": look.color, "dash": list(look.dash), **_run_data(run, smooth, points)}
            for run, look in zip(comparison.runs, comparison.looks, strict=True)
        ],
        "columns": [
            {"title": title, "kind": kind, "number": kind != "text"} for title, kind in (COLUMNS[key] for key in shown)
        ],
        "rows": [[_json_number(row.get(key)) for key in shown] for row in table],
    }
    # "<" must not end the script element, whatever a run is called.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = printable(text).replace("<", "\\u003c")
    write_text_atomic(output, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text))


def _run_data(run: curves.LoggedRun, smooth: int | None, points: int) -> dict[str, Any]:
    import numpy as np

    trained = run.rows.take(np.isfinite(run.rows["loss"]))
    loss = trained["loss"]
    smoothed = curves.smooth(loss, smooth)
    evaluated = run.rows.take(np.isfinite(run.rows["eval_loss"]))
    kept = curves.thin(loss, points)
    evaluated = evaluated.take(curves.thin(evaluated["eval_loss"], MAX_EVAL_POINTS))
    return {
        "label": run.label,
        "folder": str(run.folder),
        "status": run.status,
        "notes": "; ".join(run.notes),
        "x": _axes(trained.take(kept)),
        "raw": _rounded(loss[kept]),
        "soft": _rounded(smoothed[kept]),
        "ex": _axes(evaluated),
        "eval": _rounded(evaluated["eval_loss"]),
    }


def _axes(rows: Rows) -> dict[str, list[float]]:
    """Values of every x axis that is known for all of `rows`."""
    return {
        name: _rounded(rows[column])
        for name, column in curves.X_COLUMNS.items()
        if len(rows) and len(rows.logged(column)) == len(rows)
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") if value % 1 else int(value) for value in values.tolist()]


def _json_number(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null, and the string "Infinity", which JavaScript converts back."""
    if isinstance(value, float) and abs(value) == float("inf"):
        return "Infinity" if value > 0 else "-Infinity"
    return None if isinstance(value, float) and value != value else value
