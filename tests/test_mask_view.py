"""show marks exactly the trained tokens; audit counts them and fails on every kind of wrong mask."""

from __future__ import annotations

import pytest

import prepare_data
from finetune.files import write_jsonl
from finetune.reading.conversations import normalize_row
from formats import IGNORE_INDEX, encode
from tests.rows import GOOD


def test_show_marks_exactly_the_trained_tokens(tmp_path, tokenizer_dir, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD["two turns"], {"id": 1}, GOOD["round trip"]])
    command = ["show", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source)]
    assert prepare_data.main([*command, "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("⟦Done.<|im_end|>⟧") == 2 and "row 2: refused: has no messages" in " ".join(shown.split())
    assert "row 3" not in shown
    page = tmp_path / "page.html"
    assert prepare_data.main([*command, "--first", "3", "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<mark ") == 2 and "부엌" in html and "&lt;|im_end|&gt;</mark>" in html
    assert "http" not in html.replace("http-equiv", "")  # self-contained


def test_audit_passes_on_good_rows_and_counts(tmp_path, tokenizer_dir, tokenizer, fmt, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", GOOD.values())
    assert prepare_data.main(["audit", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source)]) == 0
    shown = capsys.readouterr().out
    trained = sum(
        label != IGNORE_INDEX
        for raw in GOOD.values()
        for s in encode(normalize_row(raw), tokenizer, fmt).sequences
        for label in s.labels
    )
    assert f"{trained:,} " in shown and "passed" in shown
    assert "9 trained turns of 9 assistant turns" in " ".join(shown.split())


def test_audit_counts_rows_that_cannot_be_read(tmp_path, tokenizer_dir, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD["pair"], {"id": 1}])
    assert prepare_data.main(["audit", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 rows" in shown and "refused 1: has no messages" in shown


def remove_last_label(labels: list[int], ids: list[int]) -> None:
    labels[max(i for i, label in enumerate(labels) if label != IGNORE_INDEX)] = IGNORE_INDEX


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda labels, ids: labels.__setitem__(0, ids[0]), "a trained token of the"),
        (lambda labels, ids: labels.__setitem__(-2, 7), "a label that is not its token"),
        (lambda labels, ids: labels.__setitem__(slice(None), [IGNORE_INDEX] * len(ids)), "without any trained token"),
        (remove_last_label, "without its end-of-turn"),
    ],
)
def test_audit_fails_on_each_kind_of_wrong_mask(tmp_path, tokenizer_dir, monkeypatch, capsys, damage, message):
    def wrong(*args, **kwargs):
        encoded = encode(*args, **kwargs)
        damage(encoded.sequences[0].labels, encoded.sequences[0].input_ids)
        return encoded

    monkeypatch.setattr("finetune.encoding.rows.encode", wrong)
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD["two turns"]])
    assert prepare_data.main(["audit", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source)]) == 1
    assert message in " ".join(capsys.readouterr().out.split())
