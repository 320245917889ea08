"""What a format omits or cannot read is said: omitted reasoning, unreadable calls, another template than the own."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from finetune.encoding.encode import encode_conversations
from finetune.encoding.options import EncodingOptions
from finetune.encoding.token_files import encode_file, encoded_rows
from finetune.preparing.audit import audit, print_audit
from finetune.preparing.preparation import PrepareOptions, prepare
from finetune.preparing.preparation_report import print_prepared
from finetune.settings import Settings
from finetune.training.run_table import print_run_table
from formats import choose_format
from tests.formats import own_templates as own
from tests.formats.cases import CLOCK, calls, row, says, user
from tests.formats.public_templates import tokenizer_with

PLACE = "the template has no place for its reasoning (qwen-xml's has one)"
PLAIN = row(user("When does the ferry leave?"), says("At six."))
REASONED = [
    row(user(f"Harbour {name}?"), says(f"It is open, {name}.", reasoning_content=f"{name} opens at five."))
    for name in ("Nord", "West")
]


@pytest.fixture
def tokenizer():
    return tokenizer_with(own.STYLES["JSON list"])


@pytest.fixture
def fmt(tokenizer):
    return choose_format(tokenizer)[0]


def test_encode_report_counts_rows_and_names_the_first(tokenizer, fmt, tmp_path):
    for from_cache in (False, True):
        encoded = encode_conversations(
            [PLAIN, *REASONED], tokenizer, fmt, num_proc=1, cache_dir=tmp_path, progress=False,
            origins=[("a.jsonl", 1), ("a.jsonl", 4), ("b.jsonl", 2)],
        )  # fmt: skip
        assert encoded.report["from_cache"] is from_cache
        assert encoded.report["warnings"] == [{"warning": PLACE, "rows": 2, "turns": 2, "first": "a.jsonl, row 4"}]
        assert encoded.warned == [(1, PLACE), (2, PLACE)]
        assert encoded.report["reasoning"] == "keep" and encoded.report["kept"] == 3


def test_turns_are_counted_beside_rows(tokenizer, fmt, tmp_path, caplog, capsys):
    """The second turn of a row is another one: 3 turns in 2 rows."""
    asked = says("Open.", reasoning_content="Since five."), user("And West?"), says("Open.", reasoning_content="Too.")
    rows = [row(user("Is Nord open?"), *asked), REASONED[1]]
    options = EncodingOptions(max_seq_length=512)
    encoded = encode_conversations(rows, tokenizer, fmt, options, num_proc=1, progress=False)
    assert [(one["turns"], one["rows"]) for one in encoded.report["warnings"]] == [(3, 2)]
    print_run_table(Settings(model="smollm2-135m"), encoded, None, fmt)
    assert f"3 turns in 2 rows: {PLACE} (first: row 1)" in capsys.readouterr().out
    source = tmp_path / "ferry.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        encode_file(source, tmp_path / "ids.jsonl", tokenizer, fmt)
    assert f"3 turns in 2 rows: {PLACE} (first: row 1)" in caplog.text
    print_audit(audit([("row 1", rows[0]), ("row 2", rows[1])], tokenizer, fmt), Console(width=300))
    print_prepared(prepare([str(source)], PrepareOptions(num_proc=1), tokenizer=tokenizer, fmt=fmt), tmp_path)
    assert capsys.readouterr().out.count("3 turns in 2 rows") == 2


@pytest.mark.parametrize("reasoning,kept", [("drop", 3), ("refuse", 1)])
def test_dropped_or_refused_reasoning_is_no_warning(tokenizer, fmt, reasoning, kept):
    report = encode_conversations(
        [PLAIN, *REASONED], tokenizer, fmt, EncodingOptions(reasoning=reasoning), num_proc=1, progress=False
    ).report
    assert (report["kept"], report["warnings"]) == (kept, [])
    refused = {f"refused: message 2 (assistant): {PLACE}": 2} if reasoning == "refuse" else {}
    assert report["reasons"] == refused


def test_prepare_audit_and_show_report_it(tokenizer, fmt, tmp_path, caplog):
    rows = [PLAIN, *REASONED]
    source = tmp_path / "ferry.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    result = prepare([str(source)], PrepareOptions(num_proc=1), tokenizer=tokenizer, fmt=fmt)
    assert result.kept == 3 and [len(names) for names in result.warnings.values()] == [2]
    assert result.warnings[PLACE][0].endswith("ferry.jsonl, row 2")
    found = audit([(f"row {number}", one) for number, one in enumerate(rows, 1)], tokenizer, fmt)
    assert found.passed and found.warnings == {PLACE: ["row 2", "row 3"]}
    shown = [entry["reason"] for entry in encoded_rows([str(source)], tokenizer, fmt, number=2)]
    assert shown == [None, f"warning: message 2 (assistant): {PLACE}"]
    with caplog.at_level(logging.WARNING):
        counts = encode_file(source, tmp_path / "ids.jsonl", tokenizer, fmt)
    assert counts == {"ok": 3} and f"2 rows: {PLACE} (first: row 2)" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["warnings" in line for line in lines] == [False, True, True]


def test_rows_with_unreadable_calls_are_refused():
    tokenizer = tokenizer_with(own.UNREADABLE)
    fmt = choose_format(tokenizer)[0]
    rows = [PLAIN, row(user("Time?"), calls(("clock", {"zone": "UTC"})), tools=(CLOCK,))]
    refused = encode_conversations(rows, tokenizer, fmt, num_proc=1, progress=False)
    assert refused.report["refused"] == 1 and "--allow_unreadable_calls" in refused.left_out[0][1]
    allowed = encode_conversations(
        rows, tokenizer, fmt, EncodingOptions(allow_unreadable_calls=True), num_proc=1, progress=False
    )
    assert (allowed.report["kept"], allowed.report["refused"]) == (2, 0)


def test_run_says_that_its_calls_cannot_be_read(caplog, tokenizer):
    from finetune.runs.find import Run

    with caplog.at_level(logging.WARNING):
        Run("model", None, None).format_for(tokenizer)
        assert caplog.text == ""
        Run("model", None, None).format_for(tokenizer_with(own.UNREADABLE))
    assert "calls of format native cannot be read back" in caplog.text


@pytest.mark.parametrize("name,said", [("chatml", True), ("qwen", False), ("auto", False)])
def test_training_says_how_a_named_format_differs(monkeypatch, caplog, name, said):
    import train_lora
    from tests import parts

    monkeypatch.setattr("finetune.models.loading.load_tokenizer", lambda *_: parts.tokenizer("qwen3"))
    for check in ("check_optimizer", "length_limit"):
        monkeypatch.setattr(f"finetune.training.feasible.{check}", lambda *_: None)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=None))
    monkeypatch.setattr("finetune.training.feasible.check_feasible", lambda *_: config)
    with caplog.at_level(logging.INFO):
        train_lora.load_format(Settings(format=name))
    assert ("differently from the tokenizer's own template" in caplog.text) is said
