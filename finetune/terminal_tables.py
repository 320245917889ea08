"""Tables in a terminal of any width: cells wrap between words, and no flag, name or number is split inside."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHORT_CELL = 8
MAX_WORD = 44  # a longer word, such as a path, may be split


def fit(table: Table, width: int) -> Table:
    """Set the widths of columns so that the table fits `width`, where that is possible without splitting a word."""
    from rich.text import Text

    longest, natural = [], []
    for column in table.columns:
        texts = [cell if isinstance(cell, Text) else Text.from_markup(str(cell)) for cell in column._cells]
        plain = [*(text.plain for text in texts), *([str(column.header)] if table.show_header else [])]
        longest.append(least_width(plain) or 1)
        natural.append(max((len(line) for text in plain for line in text.splitlines()), default=1))
    around = width - table._extra_width - 2 * table.padding[1] * len(table.columns)
    if sum(natural) > around:
        spare = max(0, around - sum(longest))
        wished = [max(0, full - least) for full, least in zip(natural, longest, strict=True)]
        for column, least, more in zip(table.columns, longest, wished, strict=True):
            column.width = least + spare * more // max(sum(wished), 1)
            column.no_wrap = False
    return table


def least_width(cells: Sequence[str]) -> int:
    """The columns that these cells need when they wrap between words; short ones, such as "16 GB", do not wrap."""
    parts = [part for cell in cells for part in ([cell] if len(cell) <= SHORT_CELL else cell.split())]
    return max((min(len(part), MAX_WORD) for part in parts), default=0)


def shown_width() -> int:
    """Columns of the terminal; a log or a pipe gets 220."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else 220


def print_markdown(text: str, console: Console | None = None) -> None:
    """Print Markdown; tables by `fit`, because rich's own Markdown splits the names of metrics in narrow terminals."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    for block in re.split(r"\n(?=\|)(?<!\|\n)|(?<=\|)\n(?!\|)", text):
        if not block.startswith("|"):
            console.print(Markdown(block))
            continue
        header, _, *rows = (re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.strip().splitlines())
        table = Table(box=None, padding=(0, 1), header_style="bold")
        for index, title in enumerate(header):
            table.add_column(title.strip(), justify="right" if index else "left")
        for row in rows:
            table.add_row(*(escape(cell.strip().replace("\\|", "|")) for cell in row))
        console.print(fit(table, console.width))
