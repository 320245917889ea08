"""Terminal summary of what `prepare` did."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune.encoding.rows import in_rows
from finetune.preparing.dataset_card import length_summary, shared_requests, tool_balance
from finetune.preparing.preparation import Prepared, count_kinds
from finetune.progress import counted

MAX_TEXT = 1000  # characters of a line, which may hold a name of any length
MAX_SHOWN = 12  # lines of a list, names of tools


def print_prepared(result: Prepared, folder: Path) -> None:
    """Print column mappings, changes, rejected rows with an example of each kind, warnings, splits and tools."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def print_counts(title: str, counts: Iterable[tuple[str, int]]) -> None:
        for index, (text, number) in enumerate(counts):
            if index == 0:
                console.print(f"[bold]{title}[/bold]")
            console.print(f"  {number:>7,}  {escape(text[:MAX_TEXT])}")

    print_counts("columns read", result.loaded.mappings.most_common(MAX_SHOWN))
    print_counts("changed while normalising", result.loaded.notes.most_common(MAX_SHOWN))
    kinds = count_kinds(result.rejected)
    rejected = [(f"{kind}, first: {row.source}, row {row.row}: {row.reason}", n) for kind, n, row in kinds[:MAX_SHOWN]]
    print_counts("rejected, with the first row of each kind", rejected)
    if result.remedy:
        console.print(f"  calls of undeclared tools: {escape(result.remedy)}")
    warnings = sorted(result.warnings.items(), key=lambda item: -len(item[1]))
    print_counts(
        "kept with a warning",
        [(f"{kind} ({in_rows(rows)}, first: {rows[0]})", len(set(rows))) for kind, rows in warnings],
    )
    if result.turns_removed:
        console.print(f"oldest turns removed from over-long rows: {result.turns_removed:,}")
    if result.encoding_report and (escaped := result.encoding_report["escaped"]):
        console.print(f"control tokens inside contents, escaped for training: {escaped:,}")
    table = Table("split", "rows", f"median {result.unit}", "95 %", "longest")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *numbers in length_summary(result):
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    for name in result.empty_splits:
        console.print(f"the split {name} gets no row; add rows, or give it a larger share (--split)")
    balance = tool_balance(result)
    tools = ", ".join(f"{tool} {counts.total():,}" for tool, counts in list(balance.items())[:MAX_SHOWN])
    console.print(f"{counted(len(balance), 'tool')}: {escape(tools)}{' …' if len(balance) > MAX_SHOWN else ''}")
    console.print(
        f"{result.loaded.counts['read']:,} read = {result.kept:,} kept + {len(result.rejected):,} rejected; "
        f"{counted(result.near_duplicates, 'near-duplicate')} kept together; "
        f"requests in more than one split: {shared_requests(result):,}"
    )
    where = f", {folder / 'rejected.jsonl'}" if result.rejected else ""
    console.print(escape(f"written: {folder} (train, validation, test .jsonl, dataset_card.md){where}"))
