"""Rows that belong together: shared instructions are omitted, continued conversations stay in one split."""

from __future__ import annotations

import pytest

from finetune.errors import UserError
from finetune.files import write_jsonl
from finetune.preparing.preparation import PrepareOptions, prepare
from finetune.preparing.related_rows import continued_conversations, own_texts
from finetune.preparing.splits import near_duplicate_groups, split_off
from finetune.reading.conversations import load_conversations
from finetune.reading.normalize import normalize_row

INSTRUCTION = "you file parcels for the depot of sandhollow. shelves: one glass, two paper, three tins, four wool. "
REQUESTS = (
    "a jar with a red lid", "twelve sheets of blotting paper", "socks for a giant", "peaches in syrup, two of them",
    "an old newspaper, folded twice", "mittens without thumbs", "a window pane, cracked", "sardines from last year",
)  # fmt: skip


def row(*texts: str) -> dict:
    """A raw row of user and assistant texts in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.mark.parametrize("template", [INSTRUCTION + "{}", "{} " + INSTRUCTION, "parcel: {} " + INSTRUCTION])
def test_shared_instruction_does_not_join_rows(template):
    texts = [template.format(request) for request in (*REQUESTS, REQUESTS[1] + "!")]
    groups = near_duplicate_groups([normalize_row(row(text, "ok")) for text in texts])
    assert groups == [0, 1, 2, 3, 4, 5, 6, 7, 1]
    assert all("sandhollow" not in own for own in own_texts(texts))


def test_requests_that_differ_in_a_number_are_compared_complete():
    texts = [f"{INSTRUCTION} parcel {i}" for i in range(10)]
    assert own_texts(texts) == texts


def test_few_requests_share_nothing():
    texts = [INSTRUCTION + request for request in REQUESTS[:3]]
    assert own_texts(texts) == texts


def conversations() -> list[dict]:
    """Eight conversations in three rows each; every row repeats the rows before it."""
    names = ["Uma", "Vic", "Wes", "Xia", "Yan", "Zoe", "Kim", "Lou"]
    things = ["oboe", "tuba", "harp", "lute", "fife", "bell", "gong", "drum"]
    rows = []
    for i, (name, thing) in enumerate(zip(names, things, strict=True)):
        texts = [f"{name} rents the {thing} please", "Until when?", f"Day {i + 3}", f"Noted for {name}.", "Thanks", "!"]
        rows += [row(*texts[:2]), row(*texts[:4]), row(*texts)]
    return rows


def test_continued_conversations():
    rows = [normalize_row(one) for one in conversations()]
    assert continued_conversations(rows) == [3 * (i // 3) for i in range(24)]
    alone = [normalize_row(row("Hi", "Hello", "A?", "a")), normalize_row(row("Hi", "Hello", "B?", "b"))]
    assert continued_conversations(alone) == [0, 1]  # a greeting alone is not a conversation


@pytest.mark.parametrize("dedupe", [False, True])
def test_history_stays_in_one_split(tmp_path, dedupe):
    path = write_jsonl(tmp_path / "rows.jsonl", conversations())
    result = prepare([str(path)], PrepareOptions(split="60/20/20", dedupe=dedupe))
    firsts = [{c["messages"][0]["content"] for c in rows} for rows in result.splits.values()]
    assert result.kept == 24 and all(firsts) and sum(map(len, firsts)) == 8


def test_eval_fraction_splits_by_the_same_groups(tmp_path):
    loaded = load_conversations(write_jsonl(tmp_path / "rows.jsonl", conversations()))
    train, held_out = split_off(loaded, 0.25, seed=0)
    firsts = [{c["messages"][0]["content"] for c in one.conversations} for one in (train, held_out)]
    assert len(held_out.origins) == 6 and not firsts[0] & firsts[1]


def test_split_without_a_row_is_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row("a?", "a"), row("b?", "b")])
    assert prepare([str(path)], PrepareOptions(split="50/50/0")).empty_splits == []
    assert prepare([str(path)], PrepareOptions()).empty_splits != []


def test_split_off_refuses_one_group(tmp_path):
    loaded = load_conversations(write_jsonl(tmp_path / "rows.jsonl", conversations()[:3]))
    with pytest.raises(UserError, match="--eval_fraction"):
        split_off(loaded, 0.5, seed=0)
