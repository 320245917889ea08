"""What reading gives: conversations, rejected rows, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.reading.row_files import Unreadable

UNREAD_TOOLS = "tools in a column that is not read: "  # begins the note about a row without tools
SourceRow = tuple[str, int, Any]  # source, row number, raw row


@dataclass(frozen=True)
class Rejected:
    """A rejected row: its source and number, the reason, and its content as it was read."""

    source: str
    row: int
    reason: str
    raw: Any
    kind: str = ""  # a short text for counting, if the check that rejected it has one

    def as_json(self) -> dict[str, Any]:
        raw = self.raw.text if isinstance(self.raw, Unreadable) else self.raw
        return {"source": self.source, "row": self.row, "reason": self.reason, "raw": raw}


@dataclass
class LoadResult:
    """What `load_conversations` returns.

    conversations  canonical conversations, in the order of the sources and of their rows
    origins        (source, row number) of each of them
    rejected       rejected rows (none when strict)
    counts         {"read", "kept", "rejected", "repeated", "left_out", "sources": {…}}; kept + rejected = read; a
                   weight adds "repeated" rows to the kept ones or drops "left_out" of them
    mappings       how columns were read: description -> number of rows
    notes          what normalising changed: description -> number of times
    fingerprint    SHA-256 over the conversations, order included
    """

    conversations: Sequence[dict[str, Any]] = field(default_factory=list)
    origins: list[tuple[str, int]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    mappings: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    fingerprint: str = ""

    def unread_tool_columns(self) -> list[str]:
        """Columns, or parts of them, that were not read and hold tools."""
        return [note.removeprefix(UNREAD_TOOLS) for note in self.notes if note.startswith(UNREAD_TOOLS)]
