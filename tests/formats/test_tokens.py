"""Cutting a text before it is tokenised, and writing JSON once, change no id and no character."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from formats import rendering
from formats.rendering import JsonOnce, KnownTools, render_template
from formats.tokens import Piece, Tokenized, Tokens, _entangled
from tests import parts
from tests.formats.cases import CLOCK, MAIL, WEATHER, user

NAMES = st.text("<|>ab", min_size=1, max_size=5)


def overlap(one: str, two: str) -> bool:
    shorter = min(len(one), len(two))
    return one in two or two in one or any(one[-n:] == two[:n] or two[-n:] == one[:n] for n in range(1, shorter))


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, max_size=8, unique=True))
def test_tokens_that_can_overlap_another_one_are_found(texts):
    pairs = {one for one in texts for two in texts if one != two and overlap(one, two)}
    assert _entangled(texts) == pairs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=5), st.integers(0, 30))
def test_places_of_tokens_are_those_of_one_long_list(steps, character):
    made, flat, offset = Tokenized(""), [], 0
    for gaps in steps:
        starts = [sum(gaps[:n]) for n in range(len(gaps))]
        made.add(offset, Piece([7] * len(starts), starts, []))
        flat += [offset + start for start in starts]
        offset += sum(gaps) + 1
    assert made.before(character) == sum(start < character for start in flat)
    assert [made.start(number) for number in range(len(made.ids))] == flat


def test_pieces_give_the_ids_of_the_whole_text():
    tokenizer = parts.tokenizer("qwen2.5")
    tokens = Tokens(tokenizer)
    text = "<|im_start|>user\n a<|im_end|><|im_end|>\n\n<|im_start|>한글<|im_<|im_end|>end|>"
    assert tokens.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(tokens._pieces(text)) == text and len(tokens._pieces(text)) == 5


def test_json_is_written_once_and_as_before_and_afresh_outside():
    tokenizer = parts.tokenizer("qwen2.5")
    template = "{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}{{ messages[0]['content'] }}"
    tools = [CLOCK, MAIL, WEATHER]

    def rendered() -> str:
        return render_template(tokenizer, template, [user("x")], tools, False)

    wanted = "".join(json.dumps(t, ensure_ascii=False) + json.dumps(t, ensure_ascii=False, indent=2) for t in tools)
    assert {rendered() for _ in range(rendering.PROOFS + 2)} == {wanted + "x"}
    with JsonOnce(tools):
        assert rendered() == rendered() == wanted + "x"
    tools = KnownTools(tools, json.dumps(tools))
    for _ in range(2):  # the second conversation with the same tools takes what the first one wrote
        with JsonOnce(tools):
            assert rendered() == wanted + "x"
        assert {text for text, _ in tools.written.values()} >= {json.dumps(MAIL, ensure_ascii=False)}
    tools = [{**CLOCK, "type": "changed"}]
    assert '"changed"' in rendered()


def test_a_template_that_renders_otherwise_here_is_left_to_the_tokenizer(monkeypatch):
    tokenizer = parts.tokenizer("qwen2.5")
    template = "{{ messages | tojson }}{# other #}"
    monkeypatch.setattr(rendering, "_tojson", lambda value: "wrong")
    texts = {render_template(tokenizer, template, [user("x")], None, False) for _ in range(rendering.PROOFS + 2)}
    assert texts == {tokenizer.apply_chat_template([user("x")], chat_template=template, tokenize=False)}
    generation = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert render_template(tokenizer, generation, [user("x")], None, False) == "x"
