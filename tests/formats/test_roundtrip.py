"""parse(render(calls)) == calls over generated arguments, for every format that has calls."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.base import render_messages
from formats.escape import escape_conversation
from tests.formats.cases import calls, tool, user
from tests.formats.pairs import PAIRS

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["007", "1e3", "true", "null", "", " x ", "}{", '"', "\\", "]", "</x>", "서울", "😀", "\n"]),
)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
IDENTIFIER = st.sampled_from(["city", "날짜", "a", "_x", "Assign"])
NAME = st.sampled_from(["find", "예약하기", "math.add"])
TYPED = [
    pair
    for pair in {pair.format: pair for pair in reversed(PAIRS)}.values()
    if pair.format not in ("plain", "native", "qwen-xml")
]


def rendered(pair, made):
    """(text of the answer, calls as rendered)."""
    tokenizer, fmt = pair.load()
    pairs = made[:1] if pair.format == "llama3" else made
    answer = {**calls(*pairs)}
    messages, _, _ = escape_conversation([user("x"), answer], [], tokenizer, fmt)
    prompt = render_messages(messages[:1], [], fmt, tokenizer, add_generation_prompt=True)
    text = render_messages(messages, [], fmt, tokenizer)
    assert text.startswith(prompt)
    return fmt, text[len(prompt) :], [call["function"] for call in messages[1]["tool_calls"]]


@pytest.mark.parametrize("pair", [pair for pair in TYPED if pair.format != "mistral"], ids=lambda pair: pair.format)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=st.lists(st.tuples(NAME, st.dictionaries(IDENTIFIER, JSON, max_size=3)), min_size=1, max_size=3))
def test_calls_parse_back(pair, made):
    fmt, text, wanted = rendered(pair, made)
    parsed = fmt.parse(text)
    assert parsed.errors == []
    assert repr(parsed.tool_calls) == repr(wanted)
    assert parsed.content == ""


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(IDENTIFIER, JSON, max_size=3))
def test_untyped_values_parse_back_with_the_schema(arguments):
    pair = next(pair for pair in PAIRS if pair.template == "qwen3_6" and pair.format == "qwen-xml")
    fmt, text, wanted = rendered(pair, [("find", arguments)])
    kinds = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    schema = tool("find", **{key: {"type": kinds[type(value)]} for key, value in wanted[0]["arguments"].items()})
    parsed = fmt.parse(text, [schema])
    assert repr(parsed.tool_calls) == repr(wanted)
