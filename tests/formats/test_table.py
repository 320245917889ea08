"""The published tables are what the code does, and nothing in them is wrong."""

from __future__ import annotations

import pytest

from tests.formats import public_table
from tests.formats.table import table


def page() -> tuple[str, str]:
    """(the page up to the published templates, the rest)."""
    text = public_table.PAGE.read_text(encoding="utf-8")
    start = text.index(f"\n{public_table.TITLE}") if public_table.TITLE in text else len(text)
    return text[:start], text[start + 1 :]


def test_table_is_current_and_no_row_is_wrong():
    text, wrong = table()
    assert not wrong
    made = "run: python -m tests.formats.table > docs/formats_table.md; python -m tests.formats.public_table"
    assert page()[0] == text, made


@pytest.mark.parametrize("name", ["gemma4_v5", "gptoss", "lfm2_v2", "qwen3_6"])
def test_published_template_trains_nothing_wrong(name):
    line, wrong = public_table.line(name)
    assert wrong == 0, line
