"""The published tables are what the code does, nothing in them is wrong, and ids and labels are those recorded."""

from __future__ import annotations

import json

from tests.formats import public_table, recorded
from tests.formats.table import PAGE, table

HOW = "run: python -m tests.formats.table; python -m tests.formats.public_table"


def test_table_is_current_and_no_row_is_wrong():
    text, wrong, digests = table()
    assert not wrong
    assert public_table.sections(PAGE.read_text(encoding="utf-8"))[0] == text, HOW
    known = json.loads(recorded.FILE.read_text(encoding="utf-8"))
    for name, rows in {**digests, recorded.GRANITE: recorded.granite()}.items():
        changed = [label for label, value in rows.items() if known[name][label] != value]
        assert not changed, f"{name}: other ids or labels than recorded; if this is meant: {recorded.__doc__}"


def test_published_templates_train_nothing_wrong():
    text, outcomes = public_table.trl_section()
    assert not {name: one.reasons for name, one in outcomes.items() if one.wrong}
    assert public_table.sections(PAGE.read_text(encoding="utf-8"))[1] == text, HOW
