"""encode and parse: one exact line per row, whatever the row holds, without torch; and the help of every verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import prepare_data
from finetune.files import write_jsonl
from finetune.reading.conversations import normalize_row
from formats import IGNORE_INDEX, encode
from tests.rows import ANSWER, GOOD, LAMP, chat, lamp_call, read

ROOT = Path(__file__).resolve().parent.parent
REFUSED = {
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, "assistant"),
    "list arguments": (chat(lamp_call([1]), tools=[LAMP]), "not an object"),
    "no messages": ({"id": 3}, "has no messages"),
}


def test_encode_writes_one_exact_line_per_row(tmp_path, tokenizer, tokenizer_dir, fmt):
    lines = [json.dumps(row, ensure_ascii=False) for row in GOOD.values()]
    lines[2:2] = ["{no json", json.dumps([1])]
    lines += [json.dumps(row) for row, _ in REFUSED.values()]
    source, target = tmp_path / "rows.jsonl", tmp_path / "new folder" / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, ROOT / "prepare_data.py", "encode", "--tokenizer", tokenizer_dir, "--format", "chatml"]
    done = subprocess.run(
        [*command, source, target], capture_output=True, check=False, text=True, encoding="utf-8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = read(target)
    assert [row["row"] for row in rows] == list(range(1, len(lines) + 1))
    assert all(list(row) == ["row", "status", "reason", "sequences"] for row in rows)
    assert "is not JSON" in rows[2]["reason"] and "not an object" in rows[3]["reason"]
    for row, (_, reason) in zip(rows[-len(REFUSED) :], REFUSED.values(), strict=True):
        assert (row["status"], row["sequences"]) == ("refused", []) and reason in row["reason"]
    encoded = rows[:2] + rows[4 : 4 + len(GOOD) - 2]
    for row, raw in zip(encoded, GOOD.values(), strict=True):
        expected = encode(normalize_row(raw), tokenizer, fmt)
        assert row["status"] == "ok" and row["reason"] is None
        assert row["sequences"] == [
            {"text": s.text, "input_ids": s.input_ids, "labels": s.labels} for s in expected.sequences
        ]
        for sequence in row["sequences"]:
            if "PWNED" in sequence["text"]:  # its control tokens are ordinary text, which the tokenizer cannot know
                continue
            assert tokenizer(sequence["text"], add_special_tokens=False)["input_ids"] == sequence["input_ids"]
    assert "PWNED" not in trained_text(encoded[3]["sequences"][0], tokenizer)
    assert trained_text(encoded[0]["sequences"][0], tokenizer) == (
        '<tool_call>\n{"name":"set_lamp","arguments":{"room":"hall","level":7}}\n</tool_call><|im_end|>'
    )


def trained_text(sequence: dict, tokenizer) -> str:
    return tokenizer.decode(
        [i for i, label in zip(sequence["input_ids"], sequence["labels"], strict=True) if label != IGNORE_INDEX]
    )


def test_encode_needs_no_torch(tmp_path, tokenizer_dir):
    """The same command in a Python that cannot import torch."""
    source = write_jsonl(tmp_path / "rows.jsonl", GOOD.values())
    blocked = (
        "import sys, importlib.abc\n"
        "class NoTorch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import prepare_data; status = prepare_data.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)\n"
    )
    command = ["encode", "--tokenizer", tokenizer_dir, "--format", "chatml", source, tmp_path / "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *command], capture_output=True, check=False, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in read(tmp_path / "out.jsonl")] == ["ok"] * len(GOOD)


def test_encode_refuses_what_training_refuses(tmp_path, tokenizer_dir):
    result = {"role": "tool", "content": "1"}
    source = write_jsonl(tmp_path / "rows.jsonl", [chat(lamp_call({"room": "a"})), chat(result, ANSWER)])
    command = ["encode", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source), str(tmp_path / "out.jsonl")]
    assert prepare_data.main(command) == 0
    first, second = read(tmp_path / "out.jsonl")
    assert first["status"] == second["status"] == "refused"
    assert "calls set_lamp, which is not declared" in first["reason"] and "--tools FILE" in first["reason"]
    assert "nothing was called" in second["reason"]


def test_encode_flags(tmp_path, tokenizer_dir, tokenizer):
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD["two turns"], GOOD["hostile user"]])
    target = tmp_path / "out.jsonl"
    command = ["encode", "--tokenizer", tokenizer_dir, "--format", "chatml", str(source), str(target)]
    assert prepare_data.main([*command, "--train_on", "last", "--control_tokens", "error"]) == 0
    first, second = read(target)
    assert trained_text(first["sequences"][0], tokenizer) == "Done.<|im_end|>"
    assert second["status"] == "refused" and "<|im_" in second["reason"]


def test_only_own_output_is_replaced(tmp_path, capsys):
    source, target = write_jsonl(tmp_path / "t.jsonl", [{"text": "hello"}]), tmp_path / "out.jsonl"
    command = ["parse", "--format", "chatml", str(source), str(target)]
    assert prepare_data.main(command) == prepare_data.main(command) == 0
    write_jsonl(target, [GOOD["pair"]])
    assert prepare_data.main(command) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert read(target) == [GOOD["pair"]]
    assert prepare_data.main([*command, "--overwrite"]) == 0
    assert [row["content"] for row in read(target)] == ["hello"]


def test_parse_writes_one_line_per_row(tmp_path, capsys):
    texts = [
        {"text": 'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": {"b": [1, 2.50]}}}\n</tool_call><|im_end|>'},
        {"text": '<tool_call>\n{"name": "f", "arguments": {"a": '},
        {"other": 1},
        {"text": "hello"},
    ]
    source, target = write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / "out.jsonl"
    source.write_text(source.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")
    assert prepare_data.main(["parse", "--format", "chatml", str(source), str(target)]) == 0
    assert capsys.readouterr().out.startswith("5 texts read, 3 with errors, 1 call ")
    rows = read(target)
    assert all(list(row) == ["content", "tool_calls", "errors"] for row in rows)
    assert rows[0] == {
        "content": "Sure.",
        "tool_calls": [{"name": "f", "arguments": {"a": {"b": [1, 2.5]}}}],
        "errors": [],
    }
    assert rows[1]["errors"] and rows[1]["tool_calls"] == []
    assert "row 3" in rows[2]["errors"][0] and "row 5" in rows[4]["errors"][0]
    assert rows[3] == {"content": "hello", "tool_calls": [], "errors": []}


def test_parse_refuses_its_source_and_deep_arguments(tmp_path, capsys):
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 990 + "]" * 990 + "}}</tool_call>"
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text}])
    before = source.read_bytes()
    assert prepare_data.main(["parse", "--format", "chatml", str(source), str(source)]) == 2
    assert "is the file that is read" in capsys.readouterr().err and source.read_bytes() == before
    assert prepare_data.main(["parse", "--format", "chatml", str(source), str(tmp_path)]) == 2
    assert "choose another file" in capsys.readouterr().err
    assert prepare_data.main(["parse", "--format", "chatml", str(source), str(tmp_path / "out.jsonl")]) == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["tool_calls"] == [] and "deep" in row["errors"][0] and row["content"] == text
