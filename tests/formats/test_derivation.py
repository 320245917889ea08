"""Grammar, ends of turn and choice of formats that are derived from a tokenizer's own template."""

from __future__ import annotations

import pytest

from formats import FormatError, choose_format, encode, get_format
from formats.comparison import compare, own_difference
from tests.formats import own_templates as own
from tests.formats.cases import CLOCK, WEATHER, calls, result, row, says, tool, user
from tests.formats.checks import assert_exact
from tests.formats.public_templates import load, tokenizer_with

HARD = 'say "hi" it\'s {x} [y] (z) a,b: \\ one\ntwo 한국 😀 007 </x> null'
KEYS = {"s": "string", "i": "integer", "n": "number", "b": "boolean", "l": "array", "o": "object"}
JOB = tool("job.run-2", **{key: {"type": kind} for key, kind in KEYS.items()})
TYPED = {"s": "7", "i": -7, "n": 1e-07, "b": True, "l": ["7", 7, None, [], {}], "o": {"e": {"f": "}"}, "g": "true"}}


def answers(name: str) -> dict[str, dict]:
    one = {"zone": "UTC"}
    function = "job_run" if name == "python list" else "job.run-2"
    job = tool(function, **{key: {"type": kind} for key, kind in KEYS.items()})
    return {
        "typed": row(user("go"), calls((function, TYPED)), tools=(job,)),
        "hard text": row(user("go"), calls(("clock", {"zone": HARD})), tools=(CLOCK,)),
        "nothing": row(user("go"), calls(("clock", {})), tools=(CLOCK,)),
        "empty text": row(user("go"), calls(("clock", {"zone": ""})), tools=(CLOCK,)),
        "parallel": row(user("go"), calls(("clock", one), ("weather_at", {"place": "Graz"}), ("clock", {})),
                        tools=(CLOCK, WEATHER)),
        "beside text": row(user("go"), calls(("clock", one), text="Let me look."), tools=(CLOCK,)),
        "steps": row(user("go"), calls(("clock", one)), result("12"), says("Noon."), tools=(CLOCK,)),
    }  # fmt: skip


def own_tokenizer(style: str):
    text = own.STYLES[style]
    tokenizer = tokenizer_with(text)
    if style != "several templates":
        return tokenizer
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": own.template("", before=""), "tool_use": text}
    return tokenizer


@pytest.mark.parametrize("style", own.STYLES)
def test_calls_of_own_templates_read_back(style):
    tokenizer = own_tokenizer(style)
    fmt, why = choose_format(tokenizer)
    assert fmt.name == "native" and fmt.read_calls is not None, why
    assert fmt.end_of_turn == ((own.END, own.CALL_END) if style == "different ends" else (own.END,))
    for label, made in answers(style).items():
        encoded = encode(made, tokenizer, fmt)
        assert encoded.status == "ok", (label, encoded.reason)
        assert_exact(made, encoded, tokenizer, fmt)


def test_closing_token_inside_a_turn_is_no_end():
    fmt = get_format("native", tokenizer_with(own.INNER))
    assert fmt.end_of_turn == (own.END,)
    assert fmt.parse("<|text|>Hello.<|/text|>" + own.END).content == "Hello."


def test_template_without_an_end_is_refused():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    with pytest.raises(FormatError, match="ends an answer with no token"):
        get_format("native", tokenizer_with(plain))
    with pytest.raises(FormatError, match="cannot render an answer"):
        get_format("native", tokenizer_with("{{ raise_exception('no') }}<|done|>"))


def test_unreadable_calls_are_refused_unless_allowed():
    tokenizer = tokenizer_with(own.UNREADABLE)
    fmt = choose_format(tokenizer)[0]
    assert fmt.read_calls is None and "cannot be read back" in fmt.unreadable_calls
    made = row(user("go"), calls(("clock", {"zone": "UTC"})), result("12"), says("Noon."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status == "refused" and "--allow_unreadable_calls" in encoded.reason
    assert encode(made, tokenizer, fmt, allow_unreadable_calls=True).status == "ok"
    assert encode(made, tokenizer, fmt, train_on="last").status == "ok"  # the call is not trained
    made["messages"][1]["train"] = False
    assert encode(made, tokenizer, fmt).status == "ok"


def test_reasoning_is_kept_dropped_or_refused():
    tokenizer = own_tokenizer("JSON list")
    fmt = choose_format(tokenizer)[0]
    made = row(user("go"), says("Noon.", reasoning_content="The sun is high."), user("and?"), says("Still noon."))
    kept, dropped = encode(made, tokenizer, fmt), encode(made, tokenizer, fmt, reasoning="drop")
    assert kept.warnings == ["message 2 (assistant): the template has no place for its reasoning"]
    assert (dropped.status, dropped.warnings) == ("ok", [])
    refused = encode(made, tokenizer, fmt, reasoning="refuse")
    assert (refused.status, refused.reason) == ("refused", kept.warnings[0])
    with pytest.raises(FormatError, match="keep, drop or refuse"):
        encode(made, tokenizer, fmt, reasoning="lose")


def test_reasoning_in_the_text_is_dropped():
    tokenizer = load("qwen3")
    fmt = choose_format(tokenizer)[0]
    made = row(user("2+2?"), says("<think>\nadd\n</think>\n\n4"))
    assert "add" in tokenizer.decode(encode(made, tokenizer, fmt, reasoning="refuse").sequences[0].input_ids)
    assert "add" not in tokenizer.decode(encode(made, tokenizer, fmt, reasoning="drop").sequences[0].input_ids)


def test_difference_from_the_own_template_is_named():
    tokenizer = load("qwen3")
    assert own_difference(get_format("qwen", tokenizer), tokenizer) is None
    assert own_difference(get_format("native", tokenizer), tokenizer) is None
    chatml = own_difference(get_format("chatml", tokenizer), tokenizer)
    assert chatml.startswith("format chatml renders ") and "own template" in chatml
    assert compare(get_format("chatml", tokenizer), tokenizer).difference in chatml


PUBLIC = {
    "gemma4_v5": ("native", ("<turn|>", "<|tool_response>")),
    "gptoss": ("native", ("<|return|>", "<|call|>")),
    "lfm2_v2": ("native", ("<|im_end|>",)),
    "llama3_1": ("native", ("<|eot_id|>",)),
    "qwen2_5": ("qwen", ("<|im_end|>",)),
    "qwen3_6": ("qwen-xml", ("<|im_end|>",)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_templates(name):
    tokenizer = load(name)
    fmt, _ = choose_format(tokenizer)
    assert (fmt.name, fmt.end_of_turn, fmt.has_tools) == (*PUBLIC[name], True)
    assert fmt.read_calls is not None
    made = row(user("go"), calls(("clock", {"zone": "UTC"})), result("12"), says("Noon."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status in ("ok", "split"), encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
