"""The dataset card and its charts: counts, lengths, balance of tools, what was changed and rejected."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.charts.fonts import font_family, missing_glyphs_ignored
from finetune.charts.palette import BLUE, GREEN, ORANGE
from finetune.models.hub import public_name
from finetune.preparing.checks import all_calls, called_tool
from finetune.preparing.preparation import Prepared, PrepareOptions, count_kinds
from finetune.preparing.splits import SPLITS, request_text
from finetune.progress import counted, printable

COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
MAX_TOOL_BARS = 40
MAX_TOOLS_IN_CARD = 30
MAX_LABEL_LENGTH = 60


def length_summary(result: Prepared) -> list[tuple[str, int, int, int, int]]:
    """(split, rows, median length, 95th percentile, longest) of each split; zeros for an empty one."""
    return [
        (name, len(lengths), percentile(lengths, 50), percentile(lengths, 95), max(lengths, default=0))
        for name, lengths in result.lengths.items()
    ]


def percentile(values: list[int], percent: int) -> int:
    """The smallest value with at least `percent` per cent of all values at or below it (nearest rank); 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else 0


def tool_balance(result: Prepared) -> dict[str, Counter]:
    """Tool called first -> rows per split, the most frequent tool first."""
    return _by_tool(result, lambda conversation: [called_tool(conversation)])


def _by_tool(result: Prepared, tools_of: Callable[[dict], list[str]]) -> dict[str, Counter]:
    table: dict[str, Counter] = {}
    for split, conversations in result.splits.items():
        for tool in (tool for conversation in conversations for tool in tools_of(conversation)):
            table.setdefault(tool, Counter())[split] += 1
    return dict(sorted(table.items(), key=lambda item: (-item[1].total(), item[0])))


def _most_frequent(table: dict[str, Counter], most: int) -> list[tuple[str, Counter]]:
    """The first entries of a table; if there are more than `most`, the others are one entry."""
    entries = list(table.items())
    rest = entries[most:]
    others = [(counted(len(rest), "other tool"), sum((counts for _, counts in rest), Counter()))] if rest else []
    return entries[:most] + others


def quality_counts(result: Prepared) -> list[tuple[str | int, ...]]:
    """(what, rows per split) of what decides quality: rows with and without calls, parallel calls, turns."""
    table: dict[str, Counter] = {}
    for split, conversations in result.splits.items():
        for conversation in conversations:
            roles = Counter(message["role"] for message in conversation["messages"])
            calls = [len(message.get("tool_calls", ())) for message in conversation["messages"]]
            for name, number in (
                ("with a call", any(calls)),
                ("without a call", not any(calls)),
                ("with tools, but without a call", bool(conversation["tools"]) and not any(calls)),
                ("with parallel calls (several in one turn)", max(calls) > 1),
                ("with several user turns", roles["user"] > 1),
                ("(assistant turns in all rows)", roles["assistant"]),
                ("(calls in all rows)", sum(calls)),
            ):
                table.setdefault(name, Counter())[split] += number
    return [(name, *(counts[split] for split in SPLITS)) for name, counts in table.items()]


def tool_calls(result: Prepared) -> list[tuple[str, Counter]]:
    """The most frequent tools with their calls per split; the others are one line."""
    table = _by_tool(result, lambda conversation: [call["function"]["name"] for call in all_calls(conversation)])
    return _most_frequent({f"`{_cell(tool)}`": counts for tool, counts in table.items()}, MAX_TOOLS_IN_CARD)


def shared_requests(result: Prepared) -> int:
    """Requests that are in more than one split, which must be 0 or the split leaks; counted on the finished splits."""
    texts = [{request_text(c) for c in conversations} for conversations in result.splits.values()]
    return sum(map(len, texts)) - len(set().union(*texts))


def card(result: Prepared, options: PrepareOptions, command: str) -> str:
    """The dataset card in Markdown; its front matter lets the folder be loaded from the Hub with its splits."""
    import jinja2
    import yaml

    sources = result.loaded.counts["sources"]
    files = [{"split": name, "path": f"{name}.jsonl"} for name in SPLITS if result.splits[name]]
    template = jinja2.Template(Path(__file__).with_name("dataset_card.md.jinja").read_text(encoding="utf-8"))
    front_matter = {"configs": [{"config_name": "default", "data_files": files}]}
    filled = template.render(
        card_data=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True).rstrip(),
        result=result,
        options=options,
        command=" ".join(command.split()),
        sources=[(_cell(public_name(name)), numbers["read"], numbers["used"]) for name, numbers in sources.items()],
        lengths=length_summary(result),
        shared_requests=shared_requests(result),
        splits=list(SPLITS),
        tools=[(tool, *(counts[name] for name in SPLITS)) for tool, counts in tool_calls(result)],
        quality=quality_counts(result),
        mappings=[(_cell(_public(text)), number) for text, number in result.loaded.mappings.most_common()],
        notes=_count_rows(result.loaded.notes),
        reasons=[
            (f"{_cell(kind)}, first: {_cell(public_name(row.source))}, row {row.row}", number)
            for kind, number, row in count_kinds(result.rejected)
        ],
        warnings=_count_rows({kind: len(set(rows)) for kind, rows in result.warnings.items()}),
    )
    return f"{filled}\n"


def _count_rows(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(_cell(text), number) for text, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _public(text: str) -> str:
    """`SOURCE: columns` without the folders of the source."""
    source, colon, columns = text.partition(": ")
    return f"{public_name(source)}{colon}{columns}"


def _cell(text: str) -> str:
    return " ".join(printable(text).split()).replace("|", "\\|").replace("<", "&lt;")


def draw_lengths(result: Prepared, limit: int | None) -> bytes:
    """PNG: histogram of row lengths, splits stacked; a line marks the length limit."""
    figure, axes = _figure(8, 3.6)
    names = [name for name in SPLITS if result.lengths[name]]
    values = [result.lengths[name] for name in names]
    axes.hist(values, bins=40, stacked=True, label=names, color=[COLOURS[name] for name in names])
    if limit and max(map(max, values)) > limit / 3:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"max_seq_length {limit}")
    axes.set_xlabel(f"{result.unit} per row")
    axes.set_ylabel("rows")
    return _png(figure, axes)


def draw_tools(result: Prepared) -> bytes:
    """PNG: rows per tool and split as bars; the rarest of too many tools share one bar."""
    balance = _most_frequent(tool_balance(result), MAX_TOOL_BARS)
    labels = [_label(tool) for tool, _ in balance]
    figure, axes = _figure(8, 1.2 + 0.28 * len(balance), "".join(labels))
    left = [0] * len(balance)
    for name in SPLITS:
        values = [counts[name] for _, counts in balance]
        axes.barh(range(len(balance)), values, left=left, color=COLOURS[name], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(balance)), labels, parse_math=False)  # a name may hold "$"
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    return _png(figure, axes)


def _label(name: str) -> str:
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= MAX_LABEL_LENGTH else f"{name[: MAX_LABEL_LENGTH - 1]}…"


def _figure(width: float, height: float, text: str = ""):
    """(figure, axes) with a font that has the letters of a text."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.family"] = font_family(text)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure, axes) -> bytes:
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    with missing_glyphs_ignored():
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
