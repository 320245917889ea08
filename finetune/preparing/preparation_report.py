"""What `prepare` did, as one screen in the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from finetune.preparing.dataset_card import percentile, reason_kind, shared_requests, tool_balance
from finetune.preparing.preparation import Prepared

SHOWN = 12


def print_prepared(result: Prepared, folder: Path) -> None:
    """Column mapping, what was changed, rejected with an example row each, warnings, splits, tools."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def block(title: str, entries) -> None:
        if entries:
            console.print(f"[bold]{title}[/bold]")
            for text, number in entries:
                console.print(f"  {number:>7,}  {escape(text)}")

    block("columns read", result.loaded.mappings.most_common(SHOWN))
    block("changed while normalising", result.loaded.notes.most_common(SHOWN))
    kinds = Counter(reason_kind(row.reason) for row in result.rejected)
    examples = {
        reason_kind(row.reason): f"{row.source}, row {row.row}: {row.reason}" for row in reversed(result.rejected)
    }
    block("rejected, with the first row of each kind", [(examples[kind], n) for kind, n in kinds.most_common(SHOWN)])
    warnings = sorted(result.warnings.items(), key=lambda item: -len(item[1]))
    block("kept, but worth a look", [(f"{kind} (first: {rows[0]})", len(rows)) for kind, rows in warnings])
    if result.turns_removed:
        console.print(f"oldest turns removed from over-long rows: {result.turns_removed:,}")
    if result.encoding_report and result.encoding_report["escaped"]:
        console.print(
            f"control strings inside contents, neutralised when trained: {result.encoding_report['escaped']:,}"
        )
    table = Table("split", "rows", f"median {result.unit}", "95 %", "longest")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, lengths in result.lengths.items():
        shown = (len(lengths), percentile(lengths, 0.5), percentile(lengths, 0.95), max(lengths, default=0))
        table.add_row(name, *(f"{number:,}" for number in shown))
    console.print(table)
    balance = tool_balance(result)
    shown = ", ".join(f"{tool} {counts.total():,}" for tool, counts in list(balance.items())[:SHOWN])
    console.print(f"{len(balance):,} tools: {escape(shown)}{' …' if len(balance) > SHOWN else ''}")
    console.print(
        f"{result.loaded.counts['read']:,} read = {result.kept:,} kept + {len(result.rejected):,} rejected; "
        f"{result.near_duplicates:,} near-duplicates kept together; requests in more than one split: "
        f"{shared_requests(result):,}"
    )
    where = f", {folder / 'rejected.jsonl'}" if result.rejected else ""
    console.print(escape(f"written: {folder} (train, validation, test .jsonl, dataset_card.md){where}"))
