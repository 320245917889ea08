"""Bulk encoding: exactly what formats.encode says for each row, every row accounted for, the cache never wrong."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import threading
import time

import numpy as np
import psutil
import pytest

from finetune.encoding import cache as encoding_cache
from finetune.encoding import encode as encoding
from finetune.encoding import rows as row_encoding
from finetune.encoding.encode import encode_conversations
from finetune.encoding.options import EncodingOptions
from finetune.encoding.rows import turn_starts, without_oldest_turns
from finetune.errors import UserError
from finetune.models.limits import LengthLimit
from finetune.preparing.checks import check_conversation
from finetune.reading.conversations import load_conversations, normalize_row
from finetune.reading.normalize import conversations_fingerprint
from finetune.settings import Settings
from finetune.training.data import RunData
from formats import IGNORE_INDEX, FormatError, encode, get_format
from formats.choosing import alternatives
from tests import parts
from tests.rows import LAMP
from tests.scripts import ROOT

FMT = get_format("chatml")


def conversation(*texts: str, system: str | None = "Be brief.", tools=(LAMP,)) -> dict:
    """user, assistant, user, assistant … with the given texts."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return normalize_row({"messages": messages, "tools": list(tools)})


def called(room: str) -> dict:
    call = {"type": "function", "function": {"name": "set_lamp", "arguments": {"room": room, "level": 7}}}
    messages = [
        {"role": "user", "content": f"Dim the {room}"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": '{"ok": true}'},
        {"role": "assistant", "content": "Done."},
    ]
    return normalize_row({"messages": messages, "tools": [LAMP]})


ROWS = [called("hall"), conversation("hi", "hello"), called("부엌"), conversation("a", "b", "c", "d")]


def same(a, b) -> bool:
    return [list(a.sequences), a.rows.tolist(), a.left_out] == [list(b.sequences), b.rows.tolist(), b.left_out]


def test_sequences_are_those_of_formats(tokenizer):
    encoded = encode_conversations(ROWS, tokenizer, FMT, progress=False)
    expected = [encode(row, tokenizer, FMT).sequences for row in ROWS]
    assert list(encoded.sequences) == [(s.input_ids, s.labels) for row in expected for s in row]
    assert encoded.rows.tolist() == [i for i, row in enumerate(expected) for _ in row]
    assert encoded.sequences[-1] == encoded.sequences[len(encoded.sequences) - 1]
    assert encoded.sequences[1:3] == [encoded.sequences[1], encoded.sequences[2]]
    with pytest.raises(IndexError):
        encoded.sequences[len(encoded.sequences)]


def test_report_adds_up(tokenizer):
    rows = [*ROWS, conversation("only a question")]
    report = encode_conversations(rows, tokenizer, FMT, progress=False).report
    assert (report["rows"], report["kept"], report["refused"], report["dropped"]) == (5, 4, 1, 0)
    sequences = [s for row in ROWS for s in encode(row, tokenizer, FMT).sequences]
    assert report["tokens"] == sum(len(s.input_ids) for s in sequences) == sum(report["tokens_by_role"].values())
    trained = sum(label != IGNORE_INDEX for s in sequences for label in s.labels)
    assert report["trained_tokens_by_role"] == {"assistant": trained}
    assert report["longest"] == max(len(s.input_ids) for s in sequences)
    assert sum(report["reasons"].values()) == 1
    assert report["left_out"] == [{"row": "row 5", "reason": next(iter(report["reasons"]))}]
    json.dumps(report)


def test_several_processes_equal_one(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 3)
    rows = [called(f"room {i}") for i in range(10)] + [conversation("no answer")]
    alone = encode_conversations(rows, tokenizer, FMT, num_proc=1, progress=False)
    together = encode_conversations(rows, tokenizer, FMT, num_proc=2, progress=False)
    assert same(alone, together)
    assert {**alone.report, "seconds": 0} == {**together.report, "seconds": 0}


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_worker_loses_no_rows(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 3)
    rows = [called(f"room {i}") for i in range(10)]
    alone = encode_conversations(rows, tokenizer, FMT, num_proc=1, progress=False)
    before = set(psutil.Process().children())

    def kill():
        while not (workers := [one for one in psutil.Process().children() if "spawn_main" in str(one.cmdline())]):
            time.sleep(0.01)
        (set(workers) - before).pop().kill()

    killer = threading.Thread(target=kill)
    killer.start()
    together = encode_conversations(rows, tokenizer, FMT, num_proc=2, progress=False)
    killer.join()
    assert "died" in caplog.text and same(alone, together)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
@pytest.mark.parametrize("when", ["before its start", "behind its start"])
def test_worker_that_starts_while_another_dies(when, tokenizer, monkeypatch, caplog):
    """The pool either cannot start it, or forgets it: nobody would end it, and this process would wait at its exit."""
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 3)
    before, tried = set(multiprocessing.active_children()), []
    start = multiprocessing.context.SpawnProcess.start

    def start_late(process):
        tried.append(process)
        if when == "behind its start" or len(tried) == 1:
            start(process)
        if len(tried) == 2:
            tried[0].kill()
            time.sleep(1)
            if when == "before its start":
                start(process)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_late)
    rows = [called(f"room {i}") for i in range(10)]
    together = encode_conversations(rows, tokenizer, FMT, num_proc=2, progress=False)
    assert "died" in caplog.text and len(tried) == 2 and len(together.rows) == len(rows)
    for process in set(multiprocessing.active_children()) - before:
        process.join(5)
    assert set(multiprocessing.active_children()) == before


# over-long rows


def length(row, tokenizer) -> int:
    return max(len(s.input_ids) for s in encode(row, tokenizer, FMT).sequences)


LONG = conversation(*[f"{word} " * 40 for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")])


def test_drop_omits_and_names_long_rows(tokenizer):
    limit = length(LONG, tokenizer) - 1
    encoded = encode_conversations(
        [ROWS[0], LONG],
        tokenizer,
        FMT,
        EncodingOptions(max_seq_length=limit),
        progress=False,
        origins=[("a.jsonl", 3), ("b.jsonl", 9)],
    )
    assert encoded.rows.tolist() == [0]
    assert encoded.left_out == [(1, f"longer than max_seq_length: {limit + 1} > {limit} tokens")]
    assert encoded.report["left_out"][0]["row"] == "b.jsonl, row 9"
    assert (encoded.report["kept"], encoded.report["dropped"], encoded.report["longest"]) == (1, 1, limit + 1)


def test_a_row_of_exactly_the_limit_is_kept(tokenizer):
    encoded = encode_conversations(
        [LONG], tokenizer, FMT, EncodingOptions(max_seq_length=length(LONG, tokenizer)), progress=False
    )
    assert encoded.report["kept"] == 1


def test_error_stops_with_file_and_row(tokenizer):
    with pytest.raises(UserError, match=r"b\.jsonl, row 9: longer than max_seq_length"):
        encode_conversations(
            [LONG],
            tokenizer,
            FMT,
            EncodingOptions(max_seq_length=50, overlong="error"),
            progress=False,
            origins=[("b.jsonl", 9)],
        )


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_trim_turns_removes_as_few_turns_as_needed(tokenizer, turns):
    kept = without_oldest_turns(LONG, turns)
    limit = length(kept, tokenizer)
    encoded = encode_conversations(
        [ROWS[1], LONG], tokenizer, FMT, EncodingOptions(max_seq_length=limit, overlong="trim_turns"), progress=False
    )
    (expected,) = encode(kept, tokenizer, FMT).sequences
    assert encoded.sequences[1] == (expected.input_ids, expected.labels)
    assert encoded.turns_removed == {1: turns}
    assert (encoded.report["trimmed"], encoded.report["turns_removed"], encoded.report["dropped"]) == (1, turns, 0)


def test_too_long_last_turn_drops_the_row(tokenizer):
    encoded = encode_conversations(
        [LONG], tokenizer, FMT, EncodingOptions(max_seq_length=60, overlong="trim_turns"), progress=False
    )
    assert len(encoded.sequences) == 0 and encoded.report["dropped"] == 1 and encoded.turns_removed == {}


def roles(*names: str) -> list[dict]:
    return [{"role": name, "content": "x"} for name in names]


@pytest.mark.parametrize(
    ("names", "starts"),
    [
        (["system", "user", "assistant", "user", "assistant"], [1, 3]),
        (["assistant", "user", "assistant", "user", "assistant"], [0, 3]),
        (["user", "user", "assistant", "tool", "assistant", "user", "assistant"], [0, 5]),
        (["system", "system", "user", "assistant"], [2]),
        (["user", "assistant", "system", "user", "assistant"], [0, 3]),
        (["system"], [1]),
    ],
)
def test_turn_starts(names, starts):
    assert turn_starts(roles(*names)) == starts


def test_trimming_keeps_system_messages_and_tools():
    trimmed = without_oldest_turns(LONG, 3)
    assert [m["role"] for m in trimmed["messages"]] == ["system", "user", "assistant"]
    assert trimmed["messages"][1:] == LONG["messages"][-2:] and trimmed["tools"] == LONG["tools"]


def test_silent_answer_is_refused_as_in_preparation(tokenizer):
    thinks = {"role": "assistant", "content": "", "reasoning_content": "Nothing to say."}
    rows = [
        ROWS[0], conversation("hello?", ""), conversation("hello?", "", "still there?", "Yes."),
        normalize_row({"messages": [{"role": "user", "content": "hello?"}, thinks]}),
    ]  # fmt: skip
    origins = [("a.jsonl", number) for number in range(1, len(rows) + 1)]
    report = encode_conversations(rows, tokenizer, FMT, progress=False, origins=origins).report
    assert (report["rows"], report["kept"], report["refused"]) == (4, 1, 3)
    assert [entry["row"] for entry in report["left_out"]] == ["a.jsonl, row 2", "a.jsonl, row 3", "a.jsonl, row 4"]
    for row, entry in zip(rows[1:], report["left_out"], strict=True):
        assert entry["reason"] == f"refused: {check_conversation(row)[0].text}"
        assert "the assistant says and calls nothing" in entry["reason"]


# cache


def test_second_run_comes_from_the_cache(tokenizer, tmp_path, monkeypatch):
    rows = [*ROWS, conversation("no answer"), LONG]
    options = EncodingOptions(max_seq_length=400, overlong="trim_turns")
    flags = {"cache_dir": tmp_path, "progress": False}
    first = encode_conversations(rows, tokenizer, FMT, options, **flags)
    monkeypatch.setattr(encoding, "encode_chunk", None)  # a second computation would fail
    second = encode_conversations(rows, tokenizer, FMT, options, **flags)
    assert same(first, second) and second.turns_removed == first.turns_removed
    assert (first.report["from_cache"], second.report["from_cache"]) == (False, True)
    assert {**first.report, "from_cache": 0} == {**second.report, "from_cache": 0}


def test_cached_result_needs_no_conversations(tokenizer, tmp_path):
    """Rows are named by the file of this run, not of the one that filled the cache."""
    rows = [*ROWS, conversation("no answer")]
    flags = {"cache_dir": tmp_path, "progress": False, "fingerprint": conversations_fingerprint(rows)}
    named = {"origins": [("one.jsonl", number) for number in range(1, len(rows) + 1)]}
    first = encode_conversations(rows, tokenizer, FMT, **flags, **named)
    assert first.report["left_out"][0]["row"] == f"one.jsonl, row {len(rows)}"
    elsewhere = {"origins": [("two.jsonl", number + 10) for number in range(1, len(rows) + 1)]}
    second = encode_conversations(None, tokenizer, FMT, **flags, **elsewhere)
    assert same(first, second) and second.report["from_cache"]
    assert second.report["left_out"][0]["row"] == f"two.jsonl, row {len(rows) + 10}"
    assert second.report["longest_row"].startswith("two.jsonl, row 1")


def test_cache_key_covers_what_changes_a_token(tokenizer, tmp_path):
    def path(rows=ROWS, fmt=FMT, tok=tokenizer, **changes):
        flags = {"max_seq_length": 100, "train_on": "all", "control_tokens": "escape", "overlong": "drop"} | changes
        return encoding_cache.cache_path(tmp_path, conversations_fingerprint(rows), tok, fmt, EncodingOptions(**flags))

    other_tokenizer = copy.deepcopy(tokenizer)
    other_tokenizer.add_tokens(["<extra>"])
    reordered = json.loads(json.dumps(ROWS))
    arguments = reordered[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    reordered[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] = dict(reversed(arguments.items()))
    paths = [
        path(),
        path(ROWS[::-1]),
        path(reordered),
        path(fmt=FMT.with_kwargs(x=1)),
        path(fmt=get_format("qwen", tokenizer)),
        path(tok=other_tokenizer),
        path(max_seq_length=101),
        path(train_on="last"),
        path(control_tokens="allow"),
        path(overlong="trim_turns"),
    ]
    assert len(set(paths)) == len(paths)
    before = path()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # settings of a call are not of the vocabulary
    assert path() == before


@pytest.mark.parametrize("damage", ["empty", "half", "text", "bit", "lengths"])
def test_damaged_cache_is_rebuilt(tokenizer, tmp_path, damage):
    good = encode_conversations(ROWS, tokenizer, FMT, cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.glob("*.npz")
    data = path.read_bytes()
    if damage == "lengths":
        with np.load(path) as stored:
            arrays = dict(stored)
        np.savez(path, **arrays | {"trained": arrays["trained"][:-1]})
    else:
        flipped = data[:200] + bytes([data[200] ^ 1]) + data[201:]
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "text": b"hello", "bit": flipped}[damage])
    again = encode_conversations(ROWS, tokenizer, FMT, cache_dir=tmp_path, progress=False)
    assert same(good, again) and not again.report["from_cache"]
    assert encode_conversations(ROWS, tokenizer, FMT, cache_dir=tmp_path, progress=False).report["from_cache"]


def test_unwritable_cache_is_a_user_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        encode_conversations(ROWS, tokenizer, FMT, cache_dir=tmp_path / "file", progress=False)


def test_labels_that_differ_from_ids_raise(tokenizer, monkeypatch):
    honest = row_encoding.encode_answers

    def wrong(*args):
        encoded = honest(*args)
        encoded.sequences[0].labels[-1] = 5
        return encoded

    monkeypatch.setattr(row_encoding, "encode_answers", wrong)
    with pytest.raises(AssertionError, match="do not match"):
        encode_conversations(ROWS, tokenizer, FMT, progress=False)


def test_refused_rows_name_a_format_with_a_place_for_them(caplog):
    """A tokenizer of Llama 3 without a template: `llama3` has one call a turn, and no text beside it."""
    tokenizer = parts.fresh_tokenizer("llama3")
    tokenizer.chat_template = None
    fmt = get_format("auto", tokenizer)
    samples = sorted((ROOT / "data" / "samples").glob("korean_*.jsonl"))
    data = RunData(load_conversations(samples))
    data.encode(tokenizer, fmt, Settings(), LengthLimit(9000, None))
    assert fmt.name == "llama3" and data.rows.report["refused"] >= 14
    (said,) = (record.getMessage() for record in caplog.records if "--format" in record.getMessage())
    other = get_format(said.partition("--format ")[2].split()[0], tokenizer)
    assert encode_conversations(data.train.conversations, tokenizer, other).report["refused"] == 0


def test_alternatives_of_a_broken_template():
    """The user has chosen a format by name because `auto` raises."""
    tokenizer = parts.fresh_tokenizer("llama3")
    tokenizer.chat_template = "{{ messages | no_such_filter }}"
    with pytest.raises(FormatError):
        get_format("auto", tokenizer)
    assert "kanana" in [other.name for other in alternatives(get_format("llama3", tokenizer), tokenizer)]
