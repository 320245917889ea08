"""Files, folders, the Hub and mixtures of them: every row is read once; number types and nulls are preserved."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.errors import UserError
from finetune.files import json_line, write_jsonl
from finetune.reading.conversations import load_conversations, normalize_row, read_rows
from finetune.reading.row_files import Unreadable
from finetune.reading.sources import parse_spec
from tests.rows import LAMP, chat

ROW = chat({"role": "assistant", "content": "안녕 \u2028 ok"}, tools=json.dumps([LAMP]))


def write(path, text: str):
    """Write a text file, compressed if its name ends in .gz; returns the path."""
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "url", ["postgresql://u:hush@host/db", "https://u:hush@host/rows.jsonl", "s3://k:hush@bucket/r*2", "hf://x:hush@y"]
)
def test_url_is_refused_without_showing_its_password(url):
    with pytest.raises(UserError, match="URLs cannot be read") as caught:
        parse_spec(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "r.jsonl",
        "r.jsonl.gz",
        "r.json",
        "r.json.gz",
        "one.json",
        "lines.json",
        "data.json",
        "r.parquet",
        "r.csv",
        "r.csv.gz",
    ],
)
def test_each_file_type_gives_the_same_conversation(tmp_path, name):
    path = tmp_path / name
    dumped = json.dumps(ROW, ensure_ascii=False)
    if name == "r.parquet":
        pq.write_table(pa.Table.from_pylist([ROW, ROW]), path)
    elif ".csv" in name:
        cells = {"messages": json.dumps(ROW["messages"], ensure_ascii=False), "tools": ROW["tools"]}
        plain = tmp_path / "plain.csv"
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(cells))
            writer.writeheader()
            writer.writerows([cells, cells])
        write(path, plain.read_bytes().decode("utf-8"))
    else:
        text = {
            "r.json": f"[{dumped},\n{dumped}]",
            "one.json": json.dumps(ROW, indent=2),
            "data.json": json.dumps({"data": [ROW, ROW]}),
        }.get(name.removesuffix(".gz"), f"\ufeff{dumped}\r\n\n{dumped}\n")
        write(path, text)
    result = load_conversations(path)
    assert result.conversations == [normalize_row(ROW)] * (1 if name == "one.json" else 2)


def test_single_json_row_with_a_list_column(tmp_path):
    for value in ([], ["few"]):
        path = write(tmp_path / "one.json", json.dumps({"prompt": "q", "completion": "c", "examples": value}))
        assert len(load_conversations(path).conversations) == 1


def test_rows_that_are_not_json_keep_their_number(tmp_path):
    path = tmp_path / "r.jsonl"
    good = json.dumps(ROW).encode()
    path.write_bytes(
        b"\n".join([good, b"{oops", b"\xff\xfe", b"[1]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000, good])
    )
    rows = list(read_rows(path))
    assert [number for _, number, _ in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    reasons = [raw.reason for _, _, raw in rows[1:-1]]
    for reason, expected in zip(
        reasons,
        ["is not JSON", "is not UTF-8", "is a JSON array", "duplicate key", "NaN", "nested too deeply"],
        strict=True,
    ):
        assert expected in reason
    result = load_conversations(path, strict=False)
    assert (len(result.conversations), len(result.rejected), result.counts["read"]) == (2, 6, 8)
    with pytest.raises(UserError, match=r"r\.jsonl, row 2: is not JSON.*prepare_data\.py"):
        load_conversations(path)


def test_arrow_padding_is_removed(tmp_path):
    rows = [
        chat(
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": {"x": 1}}}]},
            tools=[LAMP],
        ),
        chat(
            {"role": "assistant", "content": "no call", "tool_calls": []},
            tools=[
                {
                    "name": "g",
                    "parameters": {"type": "object", "properties": {"q": {"enum": ["a", None], "type": "string"}}},
                }
            ],
        ),
        chat(
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"c": True}}]}, tools=[LAMP]
        ),
    ]
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert "null" in json.dumps(pq.read_table(path).to_pylist()[1])  # Arrow did pad
    padded = load_conversations(path).conversations
    plain = [normalize_row(row) for row in rows]
    assert padded == plain
    assert "null" not in json.dumps([padded[0], padded[2]])


def test_null_in_json_text_of_parquet_is_kept(tmp_path):
    row = chat({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"b": null, "a": 1}'}]})
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    (conversation,) = load_conversations(path).conversations
    assert json.dumps(conversation["messages"][1]["tool_calls"][0]["function"]["arguments"]) == '{"b": null, "a": 1}'


def test_json_columns_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = write_jsonl(
        tmp_path / "r.jsonl",
        [
            chat({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"z": 1, "a": None}}]}),
            chat({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "x"}}]}),
        ],
    )
    dataset = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache"))
    dataset.to_parquet(str(tmp_path / "r.parquet"))
    assert load_conversations(tmp_path / "r.parquet").conversations == load_conversations(source).conversations


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl.gz", b"no gzip", "gzip file is damaged"),
        ("r.parquet", b"no parquet", "not a Parquet file"),
        ("r.jsonl", b'{\n "prompt": "q",\n "completion": \n}\n', "an object goes over several lines"),
        ("r.json", b"{]", "is not JSON"),
        ("r.json", b"3", "holds a JSON number"),
        ("r.csv", b"a,a\n1,2\n", "name each column once"),
        ("r.csv", b"", "name each column once"),
        ("r.csv", b"a,b\n\xff,2\n", "not UTF-8"),
        ("r.csv", b'prompt,completion\na,"b\nc,d\n', "line 3 is not valid CSV"),  # the open quote would swallow a row
        ("r.csv", b'prompt,completion\n"a"b,c\n', "line 2 is not valid CSV"),
        ("r.csv", b"a,b\r1,2\r", "is not valid CSV"),
        ("r.csv", "prompt\tcompletion\n".encode("utf-16"), "not UTF-8"),
        ("r.json", b"", "is not JSON"),
        ("r.json", b'{"train": [{"prompt": "q"}], "test": [{"prompt": "q"}]}', "several lists of objects"),
        ("r.json", "[]".encode("utf-16"), "not UTF-8"),
        ("r.jsonl", '{"prompt": "q"}\n'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("r.txt", b"x", "its type is not known"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_conversations(tmp_path / name)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table([["q"], ["a"], ["b"]], names=["prompt", "completion", "completion"]), "duplicate column name"),
        (pa.table({"prompt": pa.array([2**62], pa.timestamp("us"))}), "values that cannot be read"),
    ],
)
def test_inexact_parquet_is_refused(tmp_path, table, message):
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(UserError, match=message):
        load_conversations(tmp_path / "r.parquet", strict=False)


def test_line_ends_and_byte_order_marks(tmp_path):
    """Byte order marks, Windows line ends, a last line without an end, empty lines, quotes inside cells."""
    rows = [("a", "one"), ('say "b"', "two\nlines")]
    expected = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in rows]
    files = {
        "bom.jsonl": b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        "crlf.jsonl": ("\r\n\r\n".join(lines) + "\r\n").encode(),
        "bom.json": b"\xef\xbb\xbf[" + ",".join(lines).encode() + b"]",
        "bom.csv": b'\xef\xbb\xbfprompt,completion\r\na,one\r\n\r\n"say ""b""","two\nlines"',
        "tabs.tsv": b'prompt\tcompletion\na\tone\n"say ""b"""\t"two\nlines"\n',
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert [row["messages"] for row in load_conversations(tmp_path / name).conversations] == expected, name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with a name")
def test_pipe_and_device_are_refused(tmp_path):
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "device.jsonl"):
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            load_conversations(tmp_path / name)


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "./nowhere", "C:\\data\\rows.jsonl", "nowhere", "a/b.parquet@train"])
def test_missing_file_is_named(spec):
    with pytest.raises(UserError, match="there is no such file"):
        load_conversations(spec)


def test_hub_specs_are_parsed():
    spec = parse_spec("org/na.me-1:con_fig@train[:10]*0.25")
    assert (spec.hub, spec.config, spec.split, spec.weight) == ("org/na.me-1", "con_fig", "train[:10]", 0.25)
    assert parse_spec("org/name").hub == "org/name"


def test_hub_dataset_that_cannot_be_loaded_is_one_line(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"org/name@train: .*ConnectionError: no network\)"):
        load_conversations("org/name@train")


def test_hub_rows_lose_their_padding(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [
        chat({"role": "assistant", "content": "a", "tool_calls": None}),
        chat({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"q": 1}}]}),
    ]
    table = pa.Table.from_pylist([{"messages": row["messages"]} for row in rows])
    asked = []

    def local(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset(table)

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert load_conversations("org/name:conf").conversations == [normalize_row(row) for row in rows]
    assert asked == [(("org/name", "conf"), {"split": "train"})]


def test_folders_of_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    write_jsonl(tmp_path / "validation.jsonl", [ROW, ROW])
    assert len(load_conversations(tmp_path).conversations) == 1
    assert len(load_conversations(f"{tmp_path}@validation").conversations) == 2
    with pytest.raises(UserError, match="no file for the split 'test'"):
        load_conversations(f"{tmp_path}@test")


def numbered(tmp_path, name: str, number: int):
    """A file of rows whose prompts are numbered."""
    rows = [{"prompt": f"{name} {i}", "completion": "x"} for i in range(number)]
    return write_jsonl(tmp_path / f"{name}.jsonl", rows)


def prompts(result) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in result.conversations]


def test_weights_repeat_and_sample(tmp_path):
    a, b = numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 4)
    result = load_conversations([f"{a}*0.5", f"{b}*2.25"], seed=3)
    got = prompts(result)
    assert got == prompts(load_conversations([f"{a}*0.5", f"{b}*2.25"], seed=3))
    assert len(set(got[:5])) == 5 and got[:5] == sorted(got[:5])
    assert Counter(got[5:]).most_common(1)[0][1] == 3 and len(got) == 5 + 9
    assert (result.counts["read"], result.counts["kept"], result.counts["repeated"], result.counts["left_out"]) == (
        14,
        14,
        5,
        5,
    )
    with pytest.raises(UserError, match="must be > 0 and <= 1000"):
        load_conversations(f"{a}*0")


def test_small_weight_keeps_one_row(tmp_path):
    few, many = numbered(tmp_path, "a", 4), numbered(tmp_path, "b", 200)
    assert [prompt[0] for prompt in prompts(load_conversations([f"{few}*0.01", f"{many}*0.01"]))] == ["a", "b", "b"]
    (tmp_path / "none.jsonl").write_text("")
    assert prompts(load_conversations([f"{few}*0.01", f"{tmp_path / 'none.jsonl'}*0.01"]))[0][0] == "a"


def test_unwritable_cache_names_the_remedy(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="choose a writable folder with SANDWICH_CACHE"):
        load_conversations(numbered(tmp_path, "a", 4), cache_dir=tmp_path / "cache" / "rows")


def test_sample_depends_on_seed_and_not_on_folder(tmp_path):
    sources = [numbered(tmp_path / name, "a", 100) for name in ("here", "there")]
    drawn = [prompts(load_conversations(f"{sources[0]}*0.5", seed=seed)) for seed in (3, 4)]
    assert drawn[0] != drawn[1]
    assert prompts(load_conversations(f"{sources[1]}*0.5", seed=3)) == drawn[0]
    both = prompts(load_conversations([f"{source}*0.5" for source in sources], seed=3))
    assert both[:50] == drawn[0] and both[50:] != drawn[0]


def test_limit_per_source_and_fingerprint(tmp_path):
    a, b = numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 4)
    result = load_conversations([a, b], limit=3)
    assert prompts(result) == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2"]
    assert result.fingerprint != load_conversations([b, a], limit=3).fingerprint
    assert result.fingerprint == load_conversations([a, b], limit=3).fingerprint


def test_json_line_escapes_lone_surrogates():
    assert json_line({"a": "가"}) == '{"a": "가"}\n'
    assert json_line({"a": "가\ud800"}) == '{"a": "가\\ud800"}\n'


def test_json_line_writes_nan_and_infinity_as_text():
    nan, inf = float("nan"), float("inf")
    assert json_line({"a": [nan, {"b": -inf}], "c": 1.5}) == '{"a": ["nan", {"b": "-inf"}], "c": 1.5}\n'


def test_broken_parquet_cell_rejects_only_its_row(tmp_path):
    good, bad = [("a", 1), ("b", 2)], [("a", 1), ("a", 2)]
    cells = pa.array([good, bad, good], type=pa.map_(pa.string(), pa.int64()))
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"x": 1}', '{"x": 1}', "{x}"]))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"cells": cells, "text": texts}), path)
    rows = [row for _, _, row in read_rows(path)]
    assert rows[0]["cells"] == {"a": 1, "b": 2}
    assert [isinstance(row, Unreadable) for row in rows[1:]] == [True, True]
    assert "duplicate key" in rows[1].reason and "cannot be read" in rows[2].reason
