"""What holds for every test."""

from __future__ import annotations

import signal

import pytest

from formats import get_format
from tests import parts
from tests.training_runs import conversation, write_rows, write_tiny_model

# Files whose tests take longest. Two workers take a file each; begun last, one of these would leave a worker idle.
LONG = ("test_sweep_lora.py", "test_train_lora.py", "test_export_lora.py", "test_evaluate_lora.py", "test_chat_lora.py",
        "test_data_parallel.py")  # fmt: skip


def pytest_configure():
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would every script they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def shared_tokenizers_stay_as_they_are():
    """A test that changes a shared tokenizer would fail another one, in another file, in some orders only."""
    yield
    assert not parts.changed_tokenizers(), "this test, or what it calls, changes a tokenizer that tests share"


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file of twelve conversations, each with one tool call."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", [conversation(i) for i in range(12)])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny model with random weights."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's."""
    return parts.tokenizer("smollm2")


@pytest.fixture(scope="session")
def fmt(tokenizer):
    return get_format("chatml", tokenizer)


@pytest.fixture(scope="session")
def tokenizer_dir() -> str:
    return str(parts.smollm2_dir())
