"""Folders of the Hub and of `datasets`, and files whose name or layout is not what it seems."""

from __future__ import annotations

import json
import zipfile

import pyarrow as pa
import pytest
from pyarrow import ipc
from pyarrow import parquet as pq

from finetune.errors import UserError
from finetune.files import write_jsonl
from finetune.reading.conversations import load_conversations


def pairs(*texts: str) -> list[dict]:
    return [{"prompt": text, "completion": text.upper()} for text in texts]


def prompts(spec) -> str:
    return "".join(c["messages"][0]["content"] for c in load_conversations(spec).conversations)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_arrow(path, rows, new=ipc.new_stream):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)


def test_shards_of_a_hub_clone(tmp_path):
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", pairs("c"))
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", pairs("a", "b"))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pairs("d"))
    assert prompts(tmp_path) == "abc" and prompts(f"{tmp_path}@test") == "d"
    with pytest.raises(UserError, match="'dev', but for test, train; write folder@split"):
        prompts(f"{tmp_path}@dev")
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="train-00000-of-00002 of the split is missing"):
        prompts(tmp_path)


def test_configs_of_a_readme(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", pairs("a"))
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "y.jsonl", pairs("b"))
    configs = [
        {"config_name": "one", "data_files": [{"split": "train", "path": "x*.jsonl"}]},
        {"config_name": "two", "data_files": [{"split": "test", "path": ["more/*.jsonl"]}]},
    ]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n# Set\n", encoding="utf-8")
    assert prompts(f"{tmp_path}:one") == "a" and prompts(f"{tmp_path}:two@test") == "b"
    with pytest.raises(UserError, match=r"several configs \(one, two\)"):
        prompts(tmp_path)
    with pytest.raises(UserError, match="there is no config 'three'"):
        prompts(f"{tmp_path}:three")


def test_folders_that_datasets_saved(tmp_path):
    for name, text in (("train", "a"), ("test", "b")):
        write_arrow(tmp_path / name / "data-00000-of-00001.arrow", pairs(text))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / name / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    assert prompts(tmp_path) == "a" and prompts(f"{tmp_path}@test") == "b" and prompts(tmp_path / "test") == "b"
    with pytest.raises(UserError, match="no split 'dev', but train, test"):
        prompts(f"{tmp_path}@dev")


@pytest.mark.parametrize("new", [ipc.new_stream, ipc.new_file])
def test_arrow_files(tmp_path, new):
    write_arrow(tmp_path / "rows.arrow", pairs("a", "b"), new)
    assert prompts(tmp_path / "rows.arrow") == "ab"
    (tmp_path / "rows.arrow").rename(tmp_path / "rows.bin")
    assert prompts(tmp_path / "rows.bin") == "ab"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "prompt;completion\na;A, or so\nb;B\n"),
        ("r.csv", "prompt\tcompletion\na\tA\nb\tB\n"),
        ("r.csv", 'prompt,completion\na,"A; or so"\nb,B\n'),
        ("r.jsonl", json.dumps(pairs("a", "b"), indent=1)),
        ("r.jsonl", "\n".join(json.dumps(one, indent=1) for one in pairs("a", "b"))),
        ("r.weights", json.dumps(pairs("a", "b"))),
        ("r.log", "\n".join(map(json.dumps, pairs("a", "b")))),
    ],
)
def test_layouts_told_by_content(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts(tmp_path / name) == "ab"


def test_pretty_printed_rows_are_numbered_by_line(tmp_path):
    text = "\n".join(json.dumps(one, indent=1) for one in pairs("a", "b"))
    (tmp_path / "r.jsonl").write_text(text, encoding="utf-8")
    assert [row for _, row in load_conversations(tmp_path / "r.jsonl").origins] == [1, 5]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("r.doc", b"\xd0\xcf\x11\xe0....", "Excel"),
        ("r.bin", b"plain words", "its type is not known"),
        ("r.db", b"SQLite format 3\0", "--sql sqlite:///"),
        ("r.csv", b"what is rye?,a grain\nwhat is oat?,a grain\n", "add a header line"),
        ("r.log", b'{"steps": [{"role": "user", "content": "a"}]}', "--map steps=messages"),
    ],
)
def test_refused_files_name_the_remedy(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prompts(tmp_path / name)


def test_excel_workbook_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    with pytest.raises(UserError, match="Excel workbook; save its sheet as CSV"):
        prompts(tmp_path / "r.xlsx")


def test_headerless_csv_is_refused_once(tmp_path):
    (tmp_path / "r.csv").write_text("what is rye?,a grain\nwhat is oat?,a grain\n", encoding="utf-8")
    with pytest.raises(UserError, match="first line is taken as the header"):
        load_conversations(tmp_path / "r.csv", strict=False)
