"""What holds for every test."""

from __future__ import annotations

import pytest

from tests import parts


@pytest.fixture(autouse=True)
def shared_tokenizers_stay_as_they_are():
    """A test that changes a shared tokenizer would fail another one, in another file, in some orders only."""
    yield
    assert not parts.changed_tokenizers(), "this test, or what it calls, changes a tokenizer that tests share"
