"""Long conversations: what earlier turns share is computed once, and the result is that of computing everything."""

from __future__ import annotations

import random

import pytest

from finetune.encoding.encode import encode_conversations
from finetune.encoding.options import EncodingOptions
from formats import encode, get_format
from formats.as_text import TEXT_MARK
from formats.base import Format
from formats.escape import MARK, escape_conversation
from formats.losses import MAX_PROBED_MESSAGES, lost_in_prompt
from formats.tokens import Tokens
from tests import parts
from tests.formats.cases import calls, result, row, says, system, tool, user
from tests.formats.checks import assert_exact
from tests.formats.fuzz import FRAGMENTS


def chat(turns: int, *first: dict) -> dict:
    return row(*first, *(message for n in range(turns) for message in (user(f"question {n}"), says(f"answer {n}"))))


@pytest.mark.parametrize("vocabulary", ["smollm2", "qwen3", "llama3", "mistral-v3", "mistral-tekken"])
def test_growing_text_has_the_tokens_of_the_text(vocabulary):
    """Also where a piece of a control token is completed by what is added, and where the text does not grow."""
    tokenizer, chance = parts.tokenizer(vocabulary), random.Random(0)
    tokens, text = Tokens(tokenizer), ""
    pieces = [*FRAGMENTS, "<|im_", "end|>", "start|>user\n", "<|eot", "_id|>", "[IN", "ST]", "<", "|"]
    for step in range(100):
        text = text[: chance.randrange(len(text))] if step % 40 == 39 else text + chance.choice(pieces)
        made = tokens.tokenized(text)
        assert made.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        if step % 10:
            continue
        alone = Tokens(tokenizer).tokenized(text)
        assert [made.start(n) for n in range(len(made.ids))] == [alone.start(n) for n in range(len(alone.ids))]
        assert sorted(made.unspelled) == sorted(alone.unspelled)


def test_continued_prompt_is_not_changed():
    tokenizer = parts.tokenizer("smollm2")
    tokens = Tokens(tokenizer)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nab"
    ids = tokens.tokenized(prompt).ids
    tokens.continued(prompt, "cdefgh<|im_end|>", ids)
    assert tokens.tokenized(prompt + " more").ids == tokenizer(prompt + " more", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("name", "vocabulary"), [("chatml", "smollm2"), ("qwen", "qwen3"), ("mistral", "mistral-v3")])
def test_many_turns_are_exact(name, vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format(name, tokenizer)
    made = chat(MAX_PROBED_MESSAGES // 2 + 5)
    assert_exact(made, encode(made, tokenizer, fmt), tokenizer, fmt)


def dropping(condition: str) -> Format:
    """A template that drops the text of messages for which the condition holds."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if not (" + condition + ") %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Format("dropping", template, ("<|im_end|>",))


@pytest.mark.parametrize("turns", [2, 40, 80])
def test_text_lost_in_a_late_turn_is_named(turns):
    made = chat(turns)
    number = len(made["messages"]) - 1
    made["messages"][number - 1]["content"] = "unique words"
    tokenizer = parts.tokenizer("smollm2")
    fmt = dropping("m.content == 'unique words'")
    assert encode(made, tokenizer, fmt).reason == f"message {number} (user): the template drops its text"


def test_loss_of_a_repeated_text_is_found_by_the_probe():
    """Every content is found in the prompt, since another message has the same; the probe's words are not."""
    made = row(*[message for _ in range(50) for message in (user("yes"), says("yes"))])
    made["messages"].insert(98, system("yes"))
    fmt, tokenizer = dropping("m.role == 'system'"), parts.tokenizer("smollm2")
    assert encode(made, tokenizer, fmt).reason == "message 99 (system): the template drops its text"


def test_checked_messages_are_not_checked_again():
    tokenizer, fmt = parts.tokenizer("smollm2"), get_format("chatml")
    messages = [user("one"), says("two"), user("three")]
    prompt = "one two three"
    assert lost_in_prompt(messages, [], prompt, fmt, tokenizer, ("one two", 2)) is None
    assert "message 3" in lost_in_prompt(messages, [], "one two", fmt, tokenizer, ("one two", 2))
    assert "message 2" in lost_in_prompt(messages, [], "one three", fmt, tokenizer, ("one two", 2))


def test_long_probe_keeps_calls_and_results():
    """The probed part begins with a user message, so that results stay behind their calls."""
    turns = [
        message
        for n in range(30)
        for message in (user("x"), calls(("f", {"a": n}), first=n), result("1", n), says("y"))
    ]
    made = row(system("s"), *turns, tools=(tool("f", a={"type": "integer"}),))
    tokenizer = parts.tokenizer("qwen3")
    assert encode(made, tokenizer, get_format("qwen", tokenizer)).status in ("ok", "split")


def test_encoding_stops_behind_the_limit():
    tokenizer, made = parts.tokenizer("qwen3"), chat(30)
    fmt = get_format("qwen", tokenizer)  # each answer is a sequence of its own
    everything = encode(made, tokenizer, fmt)
    lengths = [len(sequence.input_ids) for sequence in everything.sequences]
    limit = lengths[9]
    stopped = encode(made, tokenizer, fmt, max_tokens=limit)
    kept = [s.input_ids for s in stopped.sequences if len(s.input_ids) <= limit]
    assert kept == [s.input_ids for s in everything.sequences if len(s.input_ids) <= limit]
    assert len(stopped.sequences) == len(kept) + 1 < len(everything.sequences)


@pytest.mark.parametrize("overlong", ["drop", "trim_turns"])
def test_thousands_of_turns_end_at_the_limit(overlong):
    """Rendering every turn with all turns before it would take minutes."""
    tokenizer = parts.tokenizer("smollm2")
    rows = [chat(3_000), chat(2)]
    encoded = encode_conversations(
        rows, tokenizer, get_format("chatml"), EncodingOptions(max_seq_length=300, overlong=overlong), progress=False
    )
    if overlong == "drop":
        assert encoded.report["reasons"] == {"longer than max_seq_length": 1} and encoded.rows.tolist() == [1]
    else:
        assert encoded.rows.tolist() == [0, 1] and encoded.turns_removed[0] > 2_900


def test_escaping_many_control_tokens():
    """Overlapping ones too; each is marked once."""
    tokenizer, fmt = parts.tokenizer("smollm2"), get_format("chatml")
    text = "<|im_end|>" * 50_000 + "<|im_<|im_start|>start|>"
    (message,), _, found = escape_conversation([user(text)], [], tokenizer, fmt)
    assert message["content"].replace(MARK, "").replace(TEXT_MARK, "") == text and len(found) == 50_001
    assert message["content"][:4] in (f"<{mark}|i" for mark in (MARK, TEXT_MARK))
