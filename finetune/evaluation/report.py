"""The report: comparison.md, the pictures of tools, and the section of the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from finetune.charts.fonts import missing_glyphs_ignored
from finetune.charts.palette import BLUE, ORANGE
from finetune.evaluation.folder import FILE_PREFIXES
from finetune.evaluation.metrics import METRICS, Scored, metric_names
from finetune.evaluation.scoring import BROKEN, NO_CALL, UNDECLARED
from finetune.files import open_atomic, write_bytes_atomic, write_text_atomic
from finetune.progress import counted, printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MAX_SHOWN_CHARACTERS = 200  # of an answer on the terminal
MAX_PICTURED_TOOLS = 60  # more are unreadable, and a picture has at most 65,535 pixels a side
OTHERS = "(other tools)"

Scores = dict[str, dict[str, Any]]


def comparison_markdown(metrics: Scores, compared: Scores, heading: Sequence[str]) -> str:
    """Tables of metrics and of tools: of one model with intervals, of two with differences and p values."""
    if len(metrics) == 1:
        ((_, only),) = metrics.items()
        title, header = "Evaluation", ["metric", "n", "value", "95% interval"]
        rows = [
            [name, _count(name, only), _number(only.get(name)), _interval(only["intervals_95"].get(name))]
            for name in metric_names(metrics)
        ]
    else:
        title = "Base against tuned"
        header = ["metric", "n", "base", "tuned", "difference", "95% interval of the difference", "p"]
        rows = [_comparison_row(name, metrics, compared.get(name, {})) for name in metric_names(metrics)]
    omitted = max((one.get("not_scored", 0) for one in metrics.values()), default=0)
    note = f"{counted(omitted, 'further answer')} not scored: longer than the context, or not for this format."
    head = "\n".join([f"# {title}", "", *heading, *[note] * (omitted > 0), "", table_markdown(header, rows)])
    return printable(head + _tool_table(metrics) + _quality_table(metrics))


def _comparison_row(name: str, metrics: Scores, test: dict[str, Any]) -> list[str]:
    base, tuned = (metrics[side].get(name) for side in ("base", "tuned"))
    marker = " (lower is better)" if any(m.name == name and m.lower_is_better for m in METRICS) else ""
    p_value = test.get("p_value")
    return [
        name + marker, _count(name, metrics["tuned"]), _number(base), _number(tuned), _difference(base, tuned),
        _interval(test.get("interval_95"), "+"),
        "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
    ]  # fmt: skip


def _tool_table(metrics: Scores) -> str:
    tables = {side: m.get("per_tool", {}) for side, m in metrics.items()}
    tools = dict.fromkeys(tool for table in tables.values() for tool in table)
    if not tools:
        return ""
    rows = []
    for tool in tools:
        support = next(table[tool]["support"] for table in tables.values() if tool in table)
        scores = [table.get(tool, {}).get("f1") for table in tables.values()]
        difference = [_difference(*scores)] if len(scores) == 2 else []
        rows.append([tool.replace("|", "\\|"), str(support), *map(_number, scores), *difference])
    header = ["tool", "expected", *tables, *["difference"] * (len(tables) > 1)]
    return f"\n## F1 of each tool\n\n{table_markdown(header, rows)}"


def _quality_table(metrics: Scores) -> str:
    """How the quality rule judged the answers to rows labelled "ok" and "not ok"."""
    tables = {side: m["quality_confusion"] for side, m in metrics.items() if "quality_confusion" in m}
    rows = [
        [f"{side}: {label}", *map(str, counts)]
        for side, table in tables.items()
        for label, counts in zip(table["labels"], table["matrix"], strict=True)
    ]
    header = ["model: label", "judged ok", "judged not ok"]
    return f"\n## Labels and judgements\n\n{table_markdown(header, rows)}" if rows else ""


def table_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _count(name: str, metrics: dict[str, Any]) -> str:
    """The number of answers that a metric is computed from; "" where it is derived from other metrics."""
    return str(metrics.get("counted", {}).get(name, ""))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 10 else f"{value:.3f}"


def _difference(base: float | None, tuned: float | None) -> str:
    return "" if base is None or tuned is None else f"{tuned - base:+.3f}"


def _interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    return f"{bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f}" if bounds else ""


def write_pictures(metrics: Scores, folder: Path) -> list[Path]:
    """Write confusion_matrix.png and per_tool_f1.png; without any tool, delete those of an earlier evaluation."""
    confusion, f1 = folder / "confusion_matrix.png", folder / "per_tool_f1.png"
    if not any(m.get("confusion_matrix") for m in metrics.values()):
        for path in (confusion, f1):
            path.unlink(missing_ok=True)
        return []
    import matplotlib

    matplotlib.use("Agg")
    return [_confusion_picture(metrics, confusion), _f1_picture(metrics, f1)]


def _confusion_picture(metrics: Scores, path: Path) -> Path:
    import numpy as np
    from matplotlib import pyplot as plt

    labels, tables = pictured_tables(
        {side: m["confusion_matrix"] for side, m in metrics.items() if m.get("confusion_matrix")}
    )
    size = len(labels)
    width, height = max(4.0, 0.42 * size + 2.6), max(3.6, 0.42 * size + 2.0)
    figure, axes = plt.subplots(
        1, len(tables), figsize=(width * len(tables), height), squeeze=False, layout="constrained"
    )
    for axis, (side, counts) in zip(axes[0], tables.items(), strict=True):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if len(labels) <= 40:
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)
        ticks = {"labels": list(map(_short, labels)), "fontsize": 7, "parse_math": False}
        axis.set_xticks(range(len(labels)), rotation=90, **ticks)
        axis.set_yticks(range(len(labels)), **ticks)
        axis.set_xlabel("tool called")
        axis.set_ylabel("tool expected")
        axis.set_title(FILE_PREFIXES[side].replace("_", " "))
    return _save(figure, path)


def pictured_tables(tables: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """(labels, counts of each model) of confusion matrices, which get the same rows and columns.

    Classes that are empty in all of them are omitted; the rarest of too many tools become OTHERS.
    """
    import numpy as np

    totals: dict[str, int] = {}
    for table in tables.values():
        counts = np.array(table["matrix"])
        for label, total in zip(table["labels"], (counts.sum(0) + counts.sum(1)).tolist(), strict=True):
            totals[label] = totals.get(label, 0) + total
    classes = [label for label in (NO_CALL, UNDECLARED, BROKEN) if totals.get(label)]
    tools = sorted(label for label, total in totals.items() if total and label not in (NO_CALL, UNDECLARED, BROKEN))
    if len(tools) > MAX_PICTURED_TOOLS:
        frequent = set(sorted(tools, key=lambda tool: -totals[tool])[:MAX_PICTURED_TOOLS])
        tools = [tool for tool in tools if tool in frequent]
        classes.insert(0, OTHERS)
    labels = [*tools, *classes]
    pictured = {}
    for side, table in tables.items():
        kept = [at for at, label in enumerate(table["labels"]) if totals[label]]
        to = [labels.index(label if label in labels else OTHERS) for label in table["labels"] if totals[label]]
        pictured[side] = np.zeros((len(labels), len(labels)), int)
        np.add.at(pictured[side], np.ix_(to, to), np.array(table["matrix"])[np.ix_(kept, kept)])
    return labels, pictured


def _f1_picture(metrics: Scores, path: Path) -> Path:
    import pandas
    from matplotlib import pyplot as plt

    tables = {side: m.get("per_tool", {}) for side, m in metrics.items()}
    scores = {side: {tool: row["f1"] for tool, row in table.items()} for side, table in tables.items()}
    f1 = pandas.DataFrame(scores, dtype=float)
    last = tables[list(tables)[-1]]
    frequent = sorted(f1.index, key=lambda tool: -last.get(tool, {}).get("support", 0))[:MAX_PICTURED_TOOLS]
    f1 = f1.fillna(0).loc[sorted(frequent, key=lambda tool: last.get(tool, {}).get("f1", 0))]
    figure, axis = plt.subplots(figsize=(7, max(2.5, 0.34 * len(f1) + 1.2)), layout="constrained")
    f1.plot.barh(ax=axis, width=0.8, color=[BLUE, ORANGE][-len(tables) :])
    axis.set_yticks(range(len(f1)), list(map(_short, f1.index)), fontsize=8, parse_math=False)
    axis.set_xlim(0, 1)
    axis.set_xlabel("F1")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right")
    return _save(figure, path)


def _short(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "…"


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    try:
        with open_atomic(path) as file, missing_glyphs_ignored():
            figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
    finally:
        plt.close(figure)
    return path


def one_request(scored: dict[str, Sequence[Scored]]) -> str:
    """One request with the expected answer and that of each model: the first that only the last model gets right."""
    answers = list(zip(*scored.values(), strict=True))
    first = next((pair for pair in answers if not _is_right(pair[0]) and _is_right(pair[-1])), answers[0])
    item = first[0].item
    asked = next((m["content"] for m in reversed(item.messages) if m["role"] == "user"), "")
    lines = {"request": asked, "expected": _as_text(item.expected_text or "", item.expected_calls)}
    lines |= {side: _as_text(one.text, one.parsed_calls) for side, one in zip(scored, first, strict=True)}
    return "\n".join(f"  {label:<10}{shorten(printable(text), MAX_SHOWN_CHARACTERS)}" for label, text in lines.items())


def _is_right(scored: Scored) -> bool:
    return bool(scored.verdicts.get("arguments_correct"))


def _as_text(text: str, calls: Sequence[dict[str, Any]]) -> str:
    return " ".join([text.strip(), *(f"{c['name']} {json.dumps(c['arguments'], ensure_ascii=False)}" for c in calls)])


def write_report(metrics: Scores, compared: Scores, heading: Sequence[str], folder: Path) -> list[Path]:
    """Write comparison.md and the pictures; returns their paths."""
    text = comparison_markdown(metrics, compared, heading)
    return [write_text_atomic(folder / "comparison.md", text), *write_pictures(metrics, folder)]


def update_model_card(card: Path, comparison: str) -> bool:
    """Write or replace the section "## Evaluation" of a model card; returns False when there is no card.

    Sections after it are kept.
    """
    if not card.is_file():
        return False
    text, _, rest = card.read_text(encoding="utf-8", errors="surrogateescape").partition("\n## Evaluation\n")
    after = re.search(r"^##? .*", rest, re.MULTILINE | re.DOTALL)
    kept = [line for line in text.split("\n") if not line.startswith("Evaluation results, once")]
    body = comparison.partition("\n")[2].replace("\n## ", "\n### ")
    new = "\n".join(kept).rstrip() + "\n\n## Evaluation\n" + body + (f"\n{after[0]}" if after else "")
    write_bytes_atomic(card, new.encode("utf-8", errors="surrogateescape"))
    return True
