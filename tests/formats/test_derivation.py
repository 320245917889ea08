"""Grammar, ends of turn and choice of formats that are derived from a tokenizer's own template."""

from __future__ import annotations

import pytest

from finetune.encoding.token_files import load_format
from formats import IGNORE_INDEX, FormatError, choose_format, encode, get_format
from formats.comparison import compare, own_difference
from tests.formats import own_templates as own
from tests.formats.cases import CLOCK, WEATHER, calls, result, row, says, tool, user
from tests.formats.checks import assert_exact, spans
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


def test_several_templates_are_used_as_published():
    tokenizer = own_tokenizer("several templates")
    tokenizer.chat_template["default"] = f"{own.OPEN}note\nNo tools.{own.END}\n" + own.template("")
    fmt, _ = choose_format(tokenizer)
    for made in (row(user("hi"), says("hello")), answers("")["steps"]):
        served = tokenizer.apply_chat_template(made["messages"], tools=made["tools"] or None, tokenize=False)
        assert encode(made, tokenizer, fmt).sequences[0].text == served
        assert ("No tools." in served) == (not made["tools"])


def test_closing_token_inside_a_turn_is_no_end():
    fmt = get_format("native", tokenizer_with(own.INNER))
    assert fmt.end_of_turn == (own.END,)
    assert fmt.parse("<|text|>Hello.<|/text|>" + own.END).content == "Hello."


@pytest.mark.parametrize(
    "name,ends,unwritten",
    [
        ("ROLE_ENDS", ("<|user|>", "<|observation|>"), ("<|user|>", "<|observation|>")),
        ("BETWEEN_ENDS", (own.END,), (f"\n{own.END}", f"\n{own.END}")),
    ],
)
def test_ends_of_past_turns_end_every_turn(name, ends, unwritten):
    """The last turn has no end in the text that the template renders; it is trained with that of a past one."""
    tokenizer = tokenizer_with(getattr(own, name))
    fmt, _ = choose_format(tokenizer)
    assert (fmt.end_of_turn, fmt.unwritten_ends) == (ends, unwritten)
    for label, made in answers("").items():
        encoded = encode(made, tokenizer, fmt)
        assert encoded.status == "ok", (label, encoded.reason)
        assert_exact(made, encoded, tokenizer, fmt)
    made = row(user("a"), calls(("clock", {})), result("12"), says("Noon."), user("b"), says("c"), tools=(CLOCK,))
    (sequence,) = encode(made, tokenizer, fmt).sequences
    trained = [tokenizer.decode(sequence.input_ids[a:b]) for a, b in spans(sequence.labels)]
    assert trained == [f"<c>clock {{}}</c>{unwritten[1]}", f"Noon.{unwritten[0]}", f"c{unwritten[0]}"]


def test_end_inside_a_turn_is_refused():
    """A template that closes the answer before only in front of the next one."""
    early = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|done|>{{ 'more<|done|>' if m.content == 'two' }}"
    tokenizer = tokenizer_with(
        early + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|assistant|> #}"
    )
    fmt = get_format("native", tokenizer)
    encoded = encode(row(user("a"), says("two")), tokenizer, fmt)
    assert encoded.status == "refused" and "end of turn before it or inside it" in encoded.reason
    joined = tokenizer_with("{% for m in messages %}{{ m.content }}<|done|>{% endfor %}")
    encoded = encode(row(user("a"), says("b"), says("c")), joined, get_format("native", joined))
    assert encoded.status == "refused" and "nothing between it and the answer before it" in encoded.reason


@pytest.mark.parametrize("opening,closing", [("<think>", "</think>"), ("<muse>", "</muse>")])
def test_reasoning_that_the_prompt_opens(opening, closing):
    """A template that always thinks drops the reasoning of every answer; it is trained behind the prompt."""
    text = own.ALWAYS_THINKS.replace("<think>", opening).replace("</think>", closing)
    tokenizer = tokenizer_with(text)
    fmt, _ = choose_format(tokenizer)
    assert fmt.opened_reasoning == (f"{opening}\n", f"\n{closing}\n\n")
    made = row(user("go"), calls(("clock", {}), reasoning_content="Look."), result("12"), says("Noon."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert (encoded.status, encoded.warnings) == ("split", []), encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
    trained = [tokenizer.decode(s.input_ids[a:b]) for s in encoded.sequences for a, b in spans(s.labels)]
    assert trained == [f"Look.\n{closing}\n\n<c>clock {{}}</c>{own.END}", f"\n{closing}\n\nNoon.{own.END}"]
    assert [fmt.parse(text).reasoning_content for text in trained] == ["Look.", ""]
    assert fmt.parse(trained[0]).tool_calls == [{"name": "clock", "arguments": {}}]


def test_reasoning_under_another_name():
    """gpt-oss reads `thinking`, writes a text beside calls in the same place, and today's date into its prompt."""
    tokenizer = load("gptoss", "bytes")
    fmt, _ = choose_format(tokenizer)
    tags = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
    assert fmt.reasoning_tags == tags
    first = row(user("go"), calls(("clock", {}), reasoning_content="Look."), tools=(CLOCK,))
    beside = row(user("go"), calls(("clock", {}), text="Look."), tools=(CLOCK,))
    last = row(user("go"), says("Noon.", reasoning_content="Read it."))
    for made, reasoning, content in ((first, "Look.", ""), (beside, "Look.", ""), (last, "Read it.", "Noon.")):
        encoded = encode(made, tokenizer, fmt)
        assert (encoded.status, encoded.warnings) == ("ok", []), encoded.reason
        assert_exact(made, encoded, tokenizer, fmt)
        (sequence,) = encoded.sequences
        assert "Current date: 2024-07-26" in sequence.text
        ((start, end),) = spans(sequence.labels)
        parsed = fmt.parse(tokenizer.decode(sequence.input_ids[start:end]), made["tools"])
        assert (parsed.reasoning_content, parsed.content, parsed.errors) == (reasoning, content, [])
    # Once an answer follows, the template drops the thinking of the calls before it; the prompt of the answer has it.
    steps = row(*first["messages"], result("12"), *last["messages"][1:], user("ok"), says("Bye."), tools=(CLOCK,))
    encoded = encode(steps, tokenizer, fmt)
    assert (encoded.status, encoded.warnings) == ("split", []), encoded.reason
    assert_exact(steps, encoded, tokenizer, fmt)
    assert all(text in encoded.sequences[0].text for text in ("Look.", "Read it.", "Noon."))


def test_own_layout_without_tools_is_kept():
    """Phi-4 has ChatML's tokens and lays its turns out differently."""
    turn = "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    tokenizer = tokenizer_with(f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}")
    fmt, why = choose_format(tokenizer)
    assert fmt.name == "native-tools" and "no place for tools" in why
    assert compare(fmt, tokenizer).difference is None
    made = row(user("go"), calls(("clock", {})), result("12"), says("Noon."), tools=(CLOCK,))
    assert_exact(made, encode(made, tokenizer, fmt), tokenizer, fmt)


def test_thinking_stays_on_where_off_breaks_turns():
    """MiniCPM5's prompt without thinking opens and closes reasoning that its answers do not have."""
    switched = "add_generation_prompt and enable_thinking is defined and not enable_thinking"
    prompt = "{% if " + switched + " %}<think></think>{% endif %}"
    fmt = get_format("native", tokenizer_with(own.STYLES["JSON list"] + prompt))
    assert "enable_thinking" not in fmt.template_kwargs and fmt.thinking is None


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
    assert kept.warnings == ["message 2 (assistant): the template has no place for its reasoning (qwen-xml's has one)"]
    assert (dropped.status, dropped.warnings) == ("ok", [])
    refused = encode(made, tokenizer, fmt, reasoning="refuse")
    assert (refused.status, refused.reason) == ("refused", kept.warnings[0])
    with pytest.raises(FormatError, match="keep, drop or refuse"):
        encode(made, tokenizer, fmt, reasoning="lose")


def test_reasoning_between_other_tags():
    tokenizer = tokenizer_with(own.REASONED)
    fmt = get_format("native", tokenizer)
    assert fmt.reasoning_tags == ("<|why|>", "<|/why|>")
    made = row(user("go"), calls(("clock", {}), ("clock", {}), reasoning_content="Look."), result("1"), result("2", 1),
               says("Noon.", reasoning_content="Read it."), user("ok"), says("<think>\nso\n</think>\n\nBye."),
               user("bye"), says("Plain."), tools=(CLOCK,))  # fmt: skip
    encoded = encode(made, tokenizer, fmt)
    assert (encoded.status, encoded.warnings) == ("ok", []), encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
    (sequence,) = encoded.sequences
    texts = [tokenizer.decode(sequence.input_ids[a:b]) for a, b in spans(sequence.labels)]
    assert [fmt.parse(text).reasoning_content for text in texts] == ["Look.", "Read it.", "so", None]
    masked = encode(made, tokenizer, fmt, train_reasoning="off").sequences[0]
    assert tokenizer.decode([i for i in masked.labels if i != IGNORE_INDEX]).count("<|/why|>") == 2


def test_order_of_arguments_is_free():
    """Gemma 4's template sorts them."""
    sort = own.STYLES["JSON list"].replace("f.arguments | tojson", "f.arguments | tojson(sort_keys=true)")
    tokenizer = tokenizer_with(sort)
    made = row(user("go"), calls(("job", {"b": 1, "a": {"d": "7", "c": 2}})), tools=(tool("job"),))
    assert encode(made, tokenizer, choose_format(tokenizer)[0]).status == "ok"


def test_reasoning_is_masked():
    tokenizer = load("qwen3")
    fmt = choose_format(tokenizer)[0]
    made = row(user("2+2?"), says("4", reasoning_content="add them"))
    on, off = (encode(made, tokenizer, fmt, train_reasoning=value).sequences[0] for value in ("on", "off"))
    assert on.input_ids == off.input_ids
    texts = [[tokenizer.decode(s.input_ids[a:b]) for a, b in spans(s.labels)] for s in (on, off)]
    assert texts == [["<think>\nadd them\n</think>\n\n4<|im_end|>"], ["\n</think>\n\n4<|im_end|>"]]
    plain = row(user("2+2?"), says("4"))
    assert encode(plain, tokenizer, fmt, train_reasoning="off") == encode(plain, tokenizer, fmt)
    with pytest.raises(FormatError, match="on or off"):
        encode(made, tokenizer, fmt, train_reasoning="no")


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
    assert chatml.startswith("renders ") and "own template" in chatml
    assert compare(get_format("chatml", tokenizer), tokenizer).difference in chatml
    assert load_format("chatml", tokenizer)[1] == f"asked for; it {chatml}"
    assert load_format("qwen", tokenizer)[1] == load_format("chatml", None)[1] == "asked for"


PUBLIC = {
    "gemma4_v5": ("native", ("<turn|>", "<|tool_response>")),
    "gptoss": ("native", ("<|return|>", "<|call|>")),
    "lfm2_v2": ("native", ("<|im_end|>",)),
    "llama3_1": ("llama3", ("<|eot_id|>",)),
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
