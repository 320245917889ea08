"""The published table is what the code does, and nothing in it is wrong."""

from __future__ import annotations

from pathlib import Path

from tests.formats.table import table

PAGE = Path(__file__).parents[2] / "docs" / "formats_table.md"


def test_table_is_current_and_no_row_is_wrong():
    page, wrong = table()
    assert wrong == 0
    assert PAGE.read_text(encoding="utf-8") == page, "run: python -m tests.formats.table > docs/formats_table.md"
