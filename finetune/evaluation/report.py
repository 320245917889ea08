"""Base beside tuned: comparison.md for reading, two pictures for looking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.charts.fonts import missing_glyphs_ignored
from finetune.charts.palette import BLUE, ORANGE
from finetune.evaluation.folder import NAMES
from finetune.evaluation.metrics import LOWER_IS_BETTER, RATIOS
from finetune.evaluation.scoring import BROKEN, NO_CALL, UNDECLARED
from finetune.files import open_atomic, write_bytes_atomic, write_text_atomic

# Beside the ratios, in this order.
PLAIN = (
    "argument_f1", "macro_precision", "macro_recall", "macro_f1",
    "weighted_precision", "weighted_recall", "weighted_f1",
    "quality_precision", "quality_recall", "quality_f1",
    "latency_p50_s", "latency_p95_s", "tokens_per_second",
)  # fmt: skip
MOST = 60  # tools in a picture: nobody can read more, and a picture has at most 65,535 pixels a side
OTHERS = "(other tools)"


def metric_names(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Names of all numbers that any of the models has, ratios first."""
    bfcl = sorted({n for m in metrics.values() for n in m if n.startswith("bfcl_")} - set(RATIOS))
    return [name for name in (*RATIOS, *bfcl, *PLAIN) if any(m.get(name) is not None for m in metrics.values())]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 10 else f"{value:.3f}"


def comparison_markdown(
    metrics: dict[str, dict[str, Any]], compared: dict[str, dict[str, Any]], heading: Sequence[str]
) -> str:
    """The table metric, base, tuned, difference; with intervals and p values where the metric has them."""
    lines = ["# Base against tuned" if len(metrics) > 1 else "# Evaluation", "", *heading, ""]
    if len(metrics) == 1:
        ((_, only),) = metrics.items()
        lines += ["| metric | value | 95% interval |", "| --- | ---: | ---: |"]
        for name in metric_names(metrics):
            lines.append(f"| {name} | {_number(only.get(name))} | {_interval(only['intervals_95'].get(name))} |")
        return "\n".join(lines) + "\n" + _tool_table(metrics)
    lines += [
        "| metric | base | tuned | difference | 95% interval of the difference | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in metric_names(metrics):
        base, tuned = (metrics[side].get(name) for side in ("base", "tuned"))
        test = compared.get(name, {})
        difference = "" if base is None or tuned is None else f"{tuned - base:+.3f}"
        p_value = test.get("p_value")
        shown = "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
        marker = " (lower is better)" if name in LOWER_IS_BETTER else ""
        lines.append(
            f"| {name}{marker} | {_number(base)} | {_number(tuned)} | {difference} | "
            f"{_interval(test.get('interval_95'), '+')} | {shown} |"
        )
    return "\n".join(lines) + "\n" + _tool_table(metrics)


def _interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    return f"{bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f}" if bounds else ""


def _tool_table(metrics: dict[str, dict[str, Any]]) -> str:
    tables = {side: m.get("per_tool", {}) for side, m in metrics.items()}
    tools = list(dict.fromkeys(tool for table in tables.values() for tool in table))
    if not tools:
        return ""
    sides = list(tables)
    columns = ["tool", "expected", *sides, *["difference"] * (len(sides) > 1)]
    lines = ["", "## F1 of each tool", "", f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for tool in tools:
        support = next(table[tool]["support"] for table in tables.values() if tool in table)
        scores = [table.get(tool, {}).get("f1") for table in tables.values()]
        cells = [_number(score) for score in scores]
        if len(scores) == 2 and None not in scores:
            cells.append(f"{scores[1] - scores[0]:+.3f}")
        lines.append(f"| {tool.replace('|', chr(92) + '|')} | {support} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_pictures(metrics: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """confusion_matrix.png and per_tool_f1.png; without any tool [], and those of an earlier run are removed."""
    confusion, f1 = folder / "confusion_matrix.png", folder / "per_tool_f1.png"
    if not any(m.get("confusion_matrix") for m in metrics.values()):
        for path in (confusion, f1):
            path.unlink(missing_ok=True)
        return []
    import matplotlib

    matplotlib.use("Agg")
    return [_confusion_picture(metrics, confusion), _f1_picture(metrics, f1)]


def _confusion_picture(metrics: dict[str, dict[str, Any]], path: Path) -> Path:
    import numpy as np
    from matplotlib import pyplot as plt

    tables = {side: _shown(m["confusion_matrix"]) for side, m in metrics.items() if m.get("confusion_matrix")}
    size = max(len(labels) for labels, _ in tables.values())
    width = max(4.0, 0.42 * size + 2.6)
    height = max(3.6, 0.42 * size + 2.0)
    size_inches = (width * len(tables), height)
    figure, axes = plt.subplots(1, len(tables), figsize=size_inches, squeeze=False, layout="constrained")
    for axis, (side, (labels, counts)) in zip(axes[0], tables.items(), strict=True):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if len(labels) <= 40:
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(
            range(len(labels)), [_short(label) for label in labels], rotation=90, fontsize=7, parse_math=False
        )
        axis.set_yticks(range(len(labels)), [_short(label) for label in labels], fontsize=7, parse_math=False)
        axis.set_xlabel("tool called")
        axis.set_ylabel("tool expected")
        axis.set_title(NAMES.get(side, side).replace("_", " "))
    return _save(figure, path)


def _shown(table: dict[str, Any]) -> tuple[list[str], Any]:
    """(labels, counts) of a confusion matrix: what was never counted is left out, the rarest of many tools are one."""
    import numpy as np

    labels, counts = table["labels"], np.array(table["matrix"])
    totals = dict(zip(labels, (counts.sum(0) + counts.sum(1)).tolist(), strict=True))
    classes = [label for label in (NO_CALL, UNDECLARED, BROKEN) if totals.get(label)]
    tools = [label for label in labels if totals[label] and label not in classes]
    if len(tools) > MOST:
        often = set(sorted(tools, key=lambda tool: -totals[tool])[:MOST])
        tools = [tool for tool in tools if tool in often]
        classes.insert(0, OTHERS)
    shown = [*tools, *classes]
    place = {label: at for at, label in enumerate(shown)}
    merged = np.zeros((len(shown), len(shown)), counts.dtype)
    kept = [at for at, label in enumerate(labels) if totals[label]]
    to = [place.get(labels[at], place.get(OTHERS)) for at in kept]
    np.add.at(merged, np.ix_(to, to), counts[np.ix_(kept, kept)])
    return shown, merged


def _f1_picture(metrics: dict[str, dict[str, Any]], path: Path) -> Path:
    import numpy as np
    from matplotlib import pyplot as plt

    tools = list(dict.fromkeys(tool for m in metrics.values() for tool in m.get("per_tool", {})))
    last = metrics[list(metrics)[-1]].get("per_tool", {})
    tools = sorted(tools, key=lambda tool: -last.get(tool, {}).get("support", 0))[:MOST]
    tools.sort(key=lambda tool: last.get(tool, {}).get("f1", 0))
    height = 0.8 / len(metrics)
    figure, axis = plt.subplots(figsize=(7, max(2.5, 0.34 * len(tools) + 1.2)), layout="constrained")
    colors = dict(zip(metrics, (BLUE, ORANGE) if len(metrics) > 1 else (ORANGE,), strict=False))
    for at, (side, m) in enumerate(metrics.items()):
        values = [m.get("per_tool", {}).get(tool, {}).get("f1", 0.0) for tool in tools]
        axis.barh(np.arange(len(tools)) + (at - (len(metrics) - 1) / 2) * height, values, height, label=side,
                  color=colors[side])  # fmt: skip
    axis.set_yticks(range(len(tools)), [_short(tool) for tool in tools], fontsize=8, parse_math=False)
    axis.set_xlim(0, 1)
    axis.set_xlabel("F1")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    return _save(figure, path)


def _short(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "…"


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    try:
        with open_atomic(path) as file, missing_glyphs_ignored():
            figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
    finally:
        plt.close(figure)
    return path


def write_report(
    metrics: dict[str, dict[str, Any]], compared: dict[str, dict[str, Any]], heading: Sequence[str], folder: Path
) -> list[Path]:
    """comparison.md and the pictures; returns what was written."""
    text = comparison_markdown(metrics, compared, heading)
    return [write_text_atomic(folder / "comparison.md", text), *write_pictures(metrics, folder)]


def update_model_card(card: Path, comparison: str) -> bool:
    """Put the comparison under "## Evaluation" at the end of a model card, in place of an earlier one.

    Sections that somebody wrote behind an earlier one stay. False when there is no card to write into.
    """
    if not card.is_file():
        return False
    text, _, rest = card.read_text(encoding="utf-8", errors="surrogateescape").partition("\n## Evaluation\n")
    behind = re.search(r"^##? .*", rest, re.MULTILINE | re.DOTALL)
    kept = [line for line in text.split("\n") if not line.startswith("Evaluation results, once")]
    body = comparison.partition("\n")[2].replace("\n## ", "\n### ")
    new = "\n".join(kept).rstrip() + "\n\n## Evaluation\n" + body + (f"\n{behind[0]}" if behind else "")
    write_bytes_atomic(card, new.encode("utf-8", errors="surrogateescape"))
    return True
