"""--where, columns that mark the split, and the checks of the rows of a run."""

from __future__ import annotations

import pytest

import prepare_data
from finetune.errors import UserError
from finetune.files import write_jsonl
from finetune.reading.conversations import load_conversations
from finetune.reading.row_filter import parse_where
from finetune.training.row_checks import check_rows
from tests.rows import ANSWER, LAMP, chat, lamp_call, read


def marked(tmp_path, column="part"):
    rows = [
        {column: part, "n": i, "prompt": f"lamp {i}", "completion": "ok"}
        for i, part in enumerate(["train", "train", "dev", "train"])
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_marked_splits_are_refused_and_chosen(tmp_path):
    path = marked(tmp_path)
    with pytest.raises(UserError, match=r"column 'part' marks .* \(3 train, 1 dev\); .*--where part=train"):
        load_conversations(path, refuse_marked_splits=True)
    chosen = load_conversations(path, where=parse_where(["part=train"]), refuse_marked_splits=True)
    assert [row for _, row in chosen.origins] == [1, 2, 4]
    assert sum(n for note, n in chosen.notes.items() if "--where" in note) == 1
    both = load_conversations(path, where=parse_where(["part=train", "part=dev"]), refuse_marked_splits=True)
    assert len(both.conversations) == 4
    assert len(load_conversations(path, where=parse_where(["part=train", "n=3"])).conversations) == 1
    assert len(load_conversations(path).conversations) == 4  # show, encode and audit read all rows


@pytest.mark.parametrize(
    ("where", "message"),
    [("part", "COLUMN=VALUE"), ("kind=x", "no row has a column 'kind'"), ("part=Train", "no row has this value")],
)
def test_where_that_chooses_nothing_is_refused(tmp_path, where, message):
    with pytest.raises(UserError, match=message):
        load_conversations(marked(tmp_path), where=parse_where([where]))


def test_other_columns_are_no_marks(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in ("train", "test", "bus")]
    assert load_conversations(write_jsonl(tmp_path / "r.jsonl", rows), refuse_marked_splits=True).counts["kept"] == 3


def test_prepare_with_where(tmp_path):
    assert prepare_data.main([str(marked(tmp_path)), "--output", str(tmp_path / "o"), "--where", "part=train"]) == 0
    assert sum(len(read(tmp_path / "o" / f"{name}.jsonl")) for name in ("train", "validation", "test")) == 3
    assert prepare_data.main([str(marked(tmp_path)), "--output", str(tmp_path / "p")]) == 2


RESULT = {"role": "tool", "content": "on"}
TWICE = lamp_call({"room": "a"})
TWICE["tool_calls"] = [call | {"id": name} for call in TWICE["tool_calls"] for name in ("p", "q")]


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ((lamp_call({"room": "a"}),), None, r"row 2: .*declared: none.*--tools FILE"),
        ((lamp_call({"room": "a"}, "dim"),), [LAMP], r"row 2: .*calls dim"),
        ((lamp_call({"room": "a"}), RESULT, RESULT, ANSWER), [LAMP], "2 results for 1 call"),
        ((TWICE, *[RESULT | {"tool_call_id": "p"}] * 2, ANSWER), [LAMP], "a second result for the call 'p'"),
    ],
)
def test_wrong_calls_and_results_stop_a_run(tmp_path, messages, tools, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(ANSWER), chat(*messages, tools=tools)])
    with pytest.raises(UserError, match=message):
        check_rows(load_conversations(path), tmp_path / "cache")


def test_warnings_of_a_run_are_counted_and_cached(tmp_path, caplog):
    row = chat(lamp_call({"room": "a"}), {"role": "user", "content": "?"}, ANSWER, tools=[LAMP])
    loaded = load_conversations(write_jsonl(tmp_path / "rows.jsonl", [row]))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", logger="sandwich"):
            check_rows(loaded, tmp_path / "cache")
        assert [record.getMessage() for record in caplog.records] == [
            "kept with a warning: call without a result (1 row)"
        ]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_rows_left_still_writes_the_reasons(tmp_path, capsys):
    rows = [chat(lamp_call({"room": str(i)}, f"tool_{i}")) for i in range(3)] + [chat()]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare_data.main([str(path), "--output", str(tmp_path / "o")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no rows left of 4 read: 3 with calls of undeclared tools (first:" in line
    assert "1 without an answer to train" in line and "--tools FILE" in line
    rejected = read(tmp_path / "o" / "rejected.jsonl")
    assert [one["row"] for one in rejected] == [1, 2, 3, 4]
    assert [one["kind"] for one in rejected[:1]] == ["with calls of undeclared tools"]
    assert [one.name for one in (tmp_path / "o").iterdir()] == ["rejected.jsonl"]


def test_column_that_may_hold_the_tools_is_named(tmp_path, capsys):
    rows = [chat(lamp_call({"room": "a"})) | {"my_tool_list": [LAMP], "id": 1}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"--tools FILE, or in a column named tools \(not read: my_tool_list\)"):
        check_rows(load_conversations(path), tmp_path / "cache")
    assert prepare_data.main([str(path), "--output", str(tmp_path / "o")]) == 2
    assert "--map my_tool_list=tools" in capsys.readouterr().err
    inner = chat(lamp_call({"room": "a"})) | {"info": {"oai_tools": [LAMP]}, "function": "set_lamp"}
    assert prepare_data.main([str(write_jsonl(path, [inner])), "--output", str(tmp_path / "o"), "--overwrite"]) == 2
    assert "--map info.oai_tools=tools" in capsys.readouterr().err
    command = [str(path), "--map", "info.oai_tools=tools", "--output", str(tmp_path / "o"), "--overwrite"]
    assert prepare_data.main(command) == 0
    assert "| `set_lamp` | 1 | 0 | 0 |" in (tmp_path / "o" / "dataset_card.md").read_text(encoding="utf-8")
    write_jsonl(path, [inner, chat({"role": "assistant", "content": "No."})])
    assert prepare_data.main([str(path), "--output", str(tmp_path / "o"), "--overwrite"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "calls of undeclared tools: give the tools with --tools FILE, or map" in shown


def test_rows_with_a_bad_answer_are_left_out(tmp_path):
    """`label: false` (KTO): counted and left out, also where the first bad row would stop a run."""
    rows = [
        {"prompt": "Capital of Peru?", "completion": "Lima.", "label": True},
        {"prompt": "Capital of Chile?", "completion": "Lima.", "label": False},
        {"prompt": "Capital of Cuba?", "completion": "Oslo.", "kto_tag": False},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_conversations([str(path)], strict=True)
    assert [c["messages"][-1]["content"] for c in loaded.conversations] == ["Lima."]
    assert (loaded.counts["read"], loaded.counts["kept"], loaded.counts["rejected"]) == (3, 1, 2)
    assert loaded.notes["rows not read: their answer is marked as a bad one (--include_rejected reads them)"] == 2
    every = load_conversations([str(path)], strict=True, include_rejected=True)
    assert (every.counts["kept"], len(every.rejected)) == (3, 0)
    rejected = load_conversations([str(path)], strict=False).rejected
    assert ["label is false" in one.reason or "kto_tag is false" in one.reason for one in rejected] == [True, True]
