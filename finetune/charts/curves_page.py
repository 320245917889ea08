"""The loss curves of many runs as one HTML file that needs nothing else: no network, no library, no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.charts import curves
from finetune.charts.plots import X_LABELS, headline, subtitle
from finetune.charts.run_labels import Comparison
from finetune.files import write_text_atomic

TEMPLATE = Path(__file__).with_name("curves_page.html")
ALL_POINTS = 60_000  # points in the whole page, shared by its runs, so that it stays a few MB
# Column of the summary: its title and how the page writes its values.
COLUMNS = {
    "run": ("run", "text"), "status": ("status", "text"), "steps": ("steps", "count"), "final_loss": ("final", "loss"),
    "min_loss": ("min", "loss"), "best_eval_loss": ("best eval", "loss"), "best_eval_step": ("at step", "count"),
    "tokens": ("tokens", "short"), "seconds": ("time", "time"), "tokens_per_second": ("tokens/s", "short"),
    "peak_memory_gb": ("peak GB", "short"), "trainable_parameters": ("trainable", "short"),
    "base_tool_name_accuracy": ("name base", "short"), "finetuned_tool_name_accuracy": ("name tuned", "short"),
    "base_parameter_accuracy": ("args base", "short"), "finetuned_parameter_accuracy": ("args tuned", "short"),
    "notes": ("notes", "text"),
}  # fmt: skip


def write_page(
    comparison: Comparison,
    table: list[dict[str, Any]],
    output: Path,
    *,
    x: str = "step",
    log_y: bool = False,
    smooth: int | None = None,
) -> None:
    """Write the page. `table` holds `curves.summarize` of each run; x, log_y and smooth are where the page starts."""
    points = max(150, min(2000, ALL_POINTS // max(len(comparison.runs), 1)))
    shown = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in table)]
    data = {
        "title": headline(comparison),
        "subtitle": subtitle(comparison),
        "axis": x,
        "log": log_y,
        "axes": X_LABELS,
        "runs": [
            {"color": look.color, "dash": list(look.dash), **_run(run, smooth, points)}
            for run, look in zip(comparison.runs, comparison.looks, strict=True)
        ],
        "columns": [
            {"title": COLUMNS[key][0], "kind": COLUMNS[key][1], "number": COLUMNS[key][1] != "text"} for key in shown
        ],
        "rows": [[_number(row.get(key)) for key in shown] for row in table],
    }
    # "<" must not end the script element, whatever a run is called.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    write_text_atomic(output, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text))


def _run(run: curves.Run, smooth: int | None, points: int) -> dict[str, Any]:
    import numpy as np

    rows = run.rows
    trained = rows[np.isfinite(rows["loss"])]
    loss = trained["loss"].to_numpy()
    soft = curves.smooth(loss, smooth)
    keep = curves.thin(loss, points) if len(loss) else np.array([], dtype=int)
    evaluated = rows[np.isfinite(rows["eval_loss"])]
    marks = curves.thin(evaluated["eval_loss"].to_numpy(), 60) if len(evaluated) else np.array([], dtype=int)
    return {
        "label": run.label,
        "folder": str(run.folder),
        "status": run.status,
        "notes": "; ".join(run.notes),
        "x": _axes(trained.iloc[keep]),
        "raw": _list(loss[keep]),
        "soft": _list(soft[keep]),
        "ex": _axes(evaluated.iloc[marks]),
        "eval": _list(evaluated["eval_loss"].to_numpy()[marks]),
    }


def _axes(rows: Any) -> dict[str, list[float]]:
    """Values of every x axis that is known for all of `rows`."""
    return {
        name: _list(rows[column].to_numpy())
        for name, column in curves.X_COLUMNS.items()
        if len(rows) and rows[column].notna().all()
    }


def _list(values: Any) -> list[float]:
    return [float(f"{value:.6g}") if value % 1 else int(value) for value in values.tolist()]


def _number(value: Any) -> Any:
    """JSON has no nan and no inf; "Infinity" is what JavaScript makes one of again."""
    if isinstance(value, float) and abs(value) == float("inf"):
        return "Infinity" if value > 0 else "-Infinity"
    return None if isinstance(value, float) and value != value else value
