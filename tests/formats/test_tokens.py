"""Cutting a text before it is tokenised, and writing JSON once, change no id and no character."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from formats import rendering
from formats.rendering import CachedTools, render_template
from formats.tokens import Piece, Tokenized, Tokens, may_overlap
from tests import parts
from tests.formats.cases import CLOCK, MAIL, WEATHER, user

NAMES = st.text("<|>ab", min_size=1, max_size=5)


def overlap(one: str, two: str) -> bool:
    shorter = min(len(one), len(two))
    return one in two or two in one or any(one[-n:] == two[:n] or two[-n:] == one[:n] for n in range(1, shorter))


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, max_size=8, unique=True))
def test_overlapping_tokens_are_found(texts):
    assert may_overlap(texts) >= {one for one in texts for two in texts if one != two and overlap(one, two)}


def test_ordinary_control_tokens_do_not_overlap():
    assert may_overlap(["<|im_start|>", "<|im_end|>", "<|im|>", "[INST]", "[/INST]", "<s>", "</s>"]) == set()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5), st.integers(0, 30))
def test_token_positions_equal_one_flat_list(steps, character):
    made, flat, offset = Tokenized(), [], 0
    for gaps in steps:
        starts = [sum(gaps[:n]) for n in range(len(gaps))]
        made.add(offset, Piece([7] * len(starts), starts, []))
        flat += [offset + start for start in starts]
        offset += sum(gaps) + 1
    assert made.before(character) == sum(start < character for start in flat)
    assert [made.start(number) for number in range(len(made.ids))] == flat


def test_pieces_give_the_ids_of_the_complete_text():
    tokenizer = parts.tokenizer("qwen2.5")
    tokens = Tokens(tokenizer)
    text = "<|im_start|>user\n a<|im_end|><|im_end|>\n\n<|im_start|>한글<|im_<|im_end|>end|>"
    assert tokens.tokenized(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(tokens.pieces(text)) == text and len(tokens.pieces(text)) == 5


def test_cached_tools_keep_their_json():
    tokenizer = parts.tokenizer("qwen2.5")
    template = (
        "{% for t in tools %}{{ t | tojson }}{{ t.function | tojson(indent=2) }}{% endfor %}{{ messages[0].content }}"
    )
    tools = [CLOCK, MAIL, WEATHER]

    def rendered(tools: list[dict]) -> set[str]:
        count = rendering.COMPARED_RENDERINGS + 2
        return {render_template(tokenizer, template, [user("x")], tools, False) for _ in range(count)}

    wanted = "".join(
        json.dumps(t, ensure_ascii=False) + json.dumps(t["function"], ensure_ascii=False, indent=2) for t in tools
    )
    assert rendered(tools) == {wanted + "x"}
    cached = CachedTools(tools, json.dumps(tools))
    assert cached == tools and rendered(cached) == {wanted + "x"}
    assert list(cached[1].written.values()) == [json.dumps(MAIL, ensure_ascii=False)]
    assert '"changed"' in rendered([{**CLOCK, "type": "changed"}]).pop()


def test_different_rendering_falls_back(monkeypatch):
    """A template that our environment renders differently is left to `apply_chat_template`."""
    tokenizer = parts.tokenizer("qwen2.5")
    template = "{{ messages | tojson }}{# other #}"
    monkeypatch.setitem(rendering.sandboxed_environment().filters, "tojson", lambda value: "wrong")
    count = rendering.COMPARED_RENDERINGS + 2
    texts = {render_template(tokenizer, template, [user("x")], None, False) for _ in range(count)}
    assert texts == {tokenizer.apply_chat_template([user("x")], chat_template=template, tokenize=False)}
    generation = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert render_template(tokenizer, generation, [user("x")], None, False) == "x"
