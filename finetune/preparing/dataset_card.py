"""The page that goes with a prepared data set: counts, lengths, balance of tools, what was changed and rejected."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

from finetune.charts.fonts import missing_glyphs_ignored
from finetune.charts.palette import BLUE, GREEN, ORANGE
from finetune.preparing.checks import called_tool
from finetune.preparing.preparation import Options, Prepared
from finetune.preparing.splits import SPLITS, request_text

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
SHOWN_TOOLS = 40


def percentile(values: list[int], share: float) -> int:
    """The smallest value with at least `share` of all values at or below it (nearest rank); 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)] if ordered else 0


def tool_balance(result: Prepared) -> dict[str, Counter]:
    """Tool called first -> rows per split, the most frequent tool first."""
    table: dict[str, Counter] = {}
    for split, conversations in result.splits.items():
        for conversation in conversations:
            table.setdefault(called_tool(conversation), Counter())[split] += 1
    return dict(sorted(table.items(), key=lambda item: (-item[1].total(), item[0])))


def shared_requests(result: Prepared) -> int:
    """Requests that stand in more than one split, counted on the finished splits: 0, or the split is leaking."""
    texts = [{request_text(c) for c in conversations} for conversations in result.splits.values()]
    return sum(map(len, texts)) - len(set().union(*texts))


def reason_kind(reason: str) -> str:
    """A reason without its row, message and value, for counting like with like."""
    reason = re.sub(r"(the same as|nearly the same as) .*", r"\1 another row", reason)
    reason = re.sub(r"messages? \d+( and \d+)?:? ?", "", reason)
    return re.sub(r"\d+", "N", reason)[:160]


def card(result: Prepared, options: Options, command: str) -> str:
    """The dataset card in Markdown; its front matter lets the folder be loaded from the Hub with its splits."""
    counts = result.loaded.counts
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    lines += [f"  - split: {name}\n    path: {name}.jsonl" for name in SPLITS if result.splits[name]]
    lines += ["---", "", "# Dataset card", "", f"Made by `{command}`.", "", "## Rows", ""]
    lines += _table(["", "rows"], [["read", counts["read"]], ["kept", result.kept], ["rejected", len(result.rejected)]])
    lines += [
        "",
        *_table(["source", "read", "used"], [[_cell(s), n["read"], n["used"]] for s, n in counts["sources"].items()]),
    ]
    lines += ["", f"## Splits (seed {options.seed}, asked for {options.split})", ""]
    lines += _table(
        ["split", "rows", f"median {result.unit}", "95 %", "longest"],
        [
            [name, len(rows), percentile(rows, 0.5), percentile(rows, 0.95), max(rows, default=0)]
            for name, rows in result.lengths.items()
        ],
    )
    lines += [
        "",
        f"Rows in groups of near-duplicates that were kept together: {result.near_duplicates} besides the first "
        f"of each group. Requests that stand in more than one split: {shared_requests(result)}.",
        "",
        f"![Lengths in {result.unit}](lengths.png)",
        "",
        "## Tools",
        "",
        "By the tool that a row calls first.",
        "",
    ]
    balance = tool_balance(result)
    lines += _table(
        ["tool", *SPLITS], [[f"`{_cell(tool)}`", *(split[name] for name in SPLITS)] for tool, split in balance.items()]
    )
    lines += ["", "![Rows per tool](tools.png)", "", "## How columns were read", ""]
    lines += [f"- {_cell(text)} ({number} rows)" for text, number in result.loaded.mappings.most_common()]
    lines += _section("What normalising changed", result.loaded.notes)
    if result.turns_removed:
        lines += ["", f"Oldest turns removed from over-long rows: {result.turns_removed}."]
    lines += _section(
        "Why rows were rejected (each row with its reason: rejected.jsonl)",
        Counter(reason_kind(row.reason) for row in result.rejected),
    )
    lines += _section("Kept, but worth a look", {kind: len(rows) for kind, rows in result.warnings.items()})
    return "\n".join(lines) + "\n"


def _section(title: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ["", f"## {title}", "", *_table(["", "times"], [[_cell(text), number] for text, number in rows])]


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def draw_lengths(result: Prepared, limit: int | None) -> bytes:
    """PNG: histogram of row lengths, splits stacked; a line marks the length limit."""
    figure, axes = _figure(8, 3.6)
    names = [name for name in SPLITS if result.lengths[name]]
    axes.hist(
        [result.lengths[name] for name in names],
        bins=40,
        stacked=True,
        label=names,
        color=[COLOURS[name] for name in names],
    )
    if limit and max(max(result.lengths[name]) for name in names) > limit / 3:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"max_seq_length {limit}")
    axes.set_xlabel(f"{result.unit} per row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)
    return _png(figure)


def draw_tools(result: Prepared) -> bytes:
    """PNG: rows per tool and split as bars; where there are too many tools, the rarest are drawn as one bar."""
    balance = list(tool_balance(result).items())
    if len(balance) > SHOWN_TOOLS:
        rest = sum((counts for _, counts in balance[SHOWN_TOOLS:]), Counter())
        balance = [*balance[:SHOWN_TOOLS], (f"{len(balance) - SHOWN_TOOLS} other tools", rest)]
    figure, axes = _figure(8, 1.2 + 0.28 * len(balance))
    labels, left = [tool for tool, _ in balance], [0] * len(balance)
    for name in SPLITS:
        values = [counts[name] for _, counts in balance]
        axes.barh(range(len(balance)), values, left=left, color=COLOURS[name], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(balance)), [_label(name) for name in labels], parse_math=False)  # a name may hold "$"
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.legend(frameon=False)
    return _png(figure)


def _label(name: str) -> str:
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= 60 else f"{name[:59]}…"


def _figure(width: float, height: float):
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    # A Korean or Chinese font where the machine has one, so that tool names are no boxes.
    wanted = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic")
    have = {font.name for font in font_manager.fontManager.ttflist}
    import matplotlib

    matplotlib.rcParams["font.family"] = [*(name for name in wanted if name in have), "DejaVu Sans"]
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    with missing_glyphs_ignored():
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
