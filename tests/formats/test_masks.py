"""Ids and labels on real tokenizers: parity with the server at every trained turn, and nothing else trained."""

from __future__ import annotations

import copy

import pytest

from formats import IGNORE_INDEX, FormatError, encode, encode_prompt, get_format
from formats.base import clean_messages
from tests import parts
from tests.formats.cases import CLOCK, ROWS, WEATHER, calls, result, row, says, system, user
from tests.formats.checks import assert_exact, spans
from tests.formats.pairs import PAIRS
from tests.formats.public_templates import tokenizer_with


def test_ids_and_labels_of_llama3_function():
    tokenizer = parts.tokenizer("llama3")
    tool = {"type": "function", "function": {"name": "get_weather", "description": "날씨 조회"}}
    made = row(user("오늘 날씨 알려줘"), calls(("get_weather", {"location": "서울"})), tools=(tool,))
    sequence = encode(made, tokenizer, get_format("llama3-function")).sequences[0]
    assert sequence.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You have access to the following functions:\n"
        "Use the function 'get_weather' to '날씨 조회'\n"
        '{"name": "get_weather", "description": "날씨 조회"}<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\n오늘 날씨 알려줘<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '<function=get_weather>{"location": "서울"}</function><|eot_id|>'
    )
    assert sequence.input_ids[:2] == [128000, 128006] and sequence.input_ids[-1] == 128009
    ((start, end),) = spans(sequence.labels)
    assert end == len(sequence.labels)
    assert (
        sequence.labels[start:]
        == tokenizer('<function=get_weather>{"location": "서울"}</function><|eot_id|>', add_special_tokens=False)[
            "input_ids"
        ]
    )
    assert sequence.input_ids[start - 2 : start] == [128007, 271]


def test_newline_after_a_turn_is_kept_untrained():
    tokenizer = parts.tokenizer("qwen2.5")
    sequence = encode(ROWS["plain"], tokenizer, get_format("qwen", tokenizer)).sequences[0]
    assert sequence.input_ids[-2:] == [151645, 198] and sequence.labels[-2:] == [151645, IGNORE_INDEX]
    assert sequence.text == tokenizer.apply_chat_template(ROWS["plain"]["messages"], tokenize=False)


def test_leading_newline_of_an_answer_splits():
    """A newline that merges with the header's would shift the mask, so the row is split instead."""
    tokenizer = parts.tokenizer("qwen2.5")
    encoded = encode(ROWS["newline_first"], tokenizer, get_format("qwen", tokenizer))
    assert (encoded.status, len(encoded.sequences)) == ("split", 2)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for sequence in encoded.sequences:
        ((start, _),) = spans(sequence.labels)
        assert sequence.input_ids[start - 1 : start] == newline


def test_train_on_last_and_train_false():
    tokenizer = parts.tokenizer("llama3")
    fmt = get_format("llama3-function")
    last = encode(ROWS["turns"], tokenizer, fmt, train_on="last")
    ((start, end),) = spans(last.sequences[0].labels)
    assert tokenizer.decode(last.sequences[0].input_ids[start:end]) == "Third, and the last.<|eot_id|>"
    everything = encode(ROWS["turns"], tokenizer, fmt)
    assert everything.sequences[0].input_ids == last.sequences[0].input_ids
    assert len(spans(everything.sequences[0].labels)) == 3
    right = encode(ROWS["untrained_turn"], tokenizer, fmt).sequences[0]
    ((start, end),) = spans(right.labels)
    assert tokenizer.decode(right.input_ids[start:end]) == "right<|eot_id|>"
    nothing = row(user("a"), says("b", train=False))
    assert encode(nothing, tokenizer, fmt).status == "refused"
    with pytest.raises(FormatError, match="train_on"):
        encode(nothing, tokenizer, fmt, train_on="first")


def test_later_turns_are_kept_untrained():
    tokenizer = parts.tokenizer("llama3")
    sequence = encode(ROWS["ends_with_user"], tokenizer, get_format("llama3-function")).sequences[0]
    assert sequence.text.endswith("user<|end_header_id|>\n\nc<|eot_id|>")
    assert sequence.labels[-1] == IGNORE_INDEX


def test_reasoning_turn_is_trained_with_thinking():
    tokenizer = parts.tokenizer("qwen3")
    encoded = encode(ROWS["think_in_content"], tokenizer, get_format("qwen", tokenizer))
    texts = [
        tokenizer.decode(sequence.input_ids[start:end])
        for sequence in encoded.sequences
        for start, end in spans(sequence.labels)
    ]
    assert texts == ["<think>\nadd\n</think>\n\n4<|im_end|>", "6<|im_end|>"]


def test_dropped_result_refuses_the_row():
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}{% if m.role != 'tool' %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = parts.fresh_tokenizer("qwen2.5", template)
    fmt = get_format("native", tokenizer)
    made = row(user("12:00?"), calls(("clock", {"zone": "UTC"})), result("12:00"), says("Noon."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt, allow_unreadable_calls=True)
    # "12:00" is in the question too, so looking for the text alone would not notice.
    assert (encoded.status, encoded.reason) == ("refused", "message 3 (tool): the template drops its text")


@pytest.mark.parametrize(
    "name,vocabulary", [("llama3", "llama3"), ("llama3-pythonic", "llama3"), ("mistral", "mistral-v3")]
)
def test_control_characters_in_json_results_are_kept(name, vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format(name, tokenizer)
    shell = result("\x1b[31mfailed\x1b[0m\x07")
    made = row(user("t?"), calls(("clock", {"zone": "UTC"})), shell, says("It failed."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status != "refused", encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)


def test_encode_prompt_equals_the_server():
    tokenizer = parts.tokenizer("qwen2.5")
    fmt = get_format("qwen", tokenizer)
    messages = ROWS["steps"]["messages"][:4]
    served = tokenizer.apply_chat_template(
        messages, tools=ROWS["steps"]["tools"], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(messages, ROWS["steps"]["tools"], tokenizer, fmt) == served
    smollm2 = parts.tokenizer("smollm2")
    with pytest.raises(FormatError, match="tools"):
        encode_prompt([user("hi")], [WEATHER], smollm2, get_format("native", smollm2))


@pytest.mark.parametrize("vocabulary", ["mistral-v3", "mistral-v7"])
def test_roles_do_not_depend_on_earlier_call_ids(vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format("mistral", tokenizer)
    for first in (1, 2):
        called = calls(("clock", {"zone": "UTC"}), first=first)
        made = row(user("t?"), called, result('{"v": 1}', first), says("One."), tools=(CLOCK,))
        for sequence in encode(made, tokenizer, fmt).sequences:
            pairs = zip(sequence.roles, sequence.labels, strict=True)
            assert {role for role, label in pairs if label != IGNORE_INDEX} == {"assistant"}


@pytest.mark.parametrize("vocabulary", ["mistral-v3", "mistral-v7", "mistral-tekken"])
def test_native_mistral_replaces_call_ids(vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format("native", tokenizer)
    made = row(user("t?"), calls(("clock", {"zone": "UTC"})), result('{"v": 1}'), says("One."), tools=(CLOCK,))
    made["messages"][1]["tool_calls"][0]["id"] = made["messages"][2]["tool_call_id"] = "call_0123456789abcdef"
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status != "refused", encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
    with pytest.raises(Exception, match="9"):  # what the template says of the ids as they came
        tokenizer.apply_chat_template(made["messages"], tools=made["tools"])
    ids = {call["id"] for m in clean_messages(made["messages"], fmt) for call in m.get("tool_calls", [])}
    assert len(ids) == 1 and all(name in encoded.sequences[-1].text for name in ids)


@pytest.mark.parametrize(
    "keys", [{}, {"tool_call_id": "call_a"}, {"tool_call_id": "callidaaa"}, {"tool_call_id": "unknown"}]
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_results_take_the_ids_of_their_calls(keys, order):
    """Two calls with one id or none; results that give names (as `function` messages do) in either order."""
    called = calls(("clock", {}), ("weather_at", {}))
    for call in called["tool_calls"]:
        call.pop("id")
        call |= {"id": keys["tool_call_id"]} if keys and keys["tool_call_id"] != "unknown" else {}
    names = [("clock", "weather_at")[number] for number in order]
    results = [{"role": "tool", "content": name, "name": name, **keys} for name in names]
    _, answer, *results = get_format("mistral-v3").prepare([user("both"), called, *results])
    ids = {call["function"]["name"]: call["id"] for call in answer["tool_calls"]}
    if keys.get("tool_call_id") == "call_a":  # the same id twice: in order
        assert [m["tool_call_id"] for m in results] == list(ids.values()) and len(set(ids.values())) == 2
    else:
        assert [m["tool_call_id"] for m in results] == [ids[m["name"]] for m in results]


def test_native_keeps_call_ids_where_any_is_allowed():
    assert get_format("native", parts.tokenizer("qwen2.5")).prepare is None


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_silent_answer_does_not_shift_roles(pair):
    """Some templates leave such a turn out, others write its frame."""
    tokenizer, fmt = pair.load()
    silent = {"role": "assistant", "content": "", "train": False}
    asked = (calls(("clock", {"zone": "UTC"})), result('{"v": 1}'), says("One."))
    made = row(user("Hello"), says("Hi."), user("Go on"), silent, user("And?"), *asked, tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    if encoded.status == "refused":
        assert encoded.reason
        return
    assert_exact(made, encoded, tokenizer, fmt)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_white_space_content_does_not_hide_roles(pair):
    """Some templates take it for none and write no system turn, others keep it or cut it."""
    tokenizer, fmt = pair.load()
    asked = (calls(("clock", {"zone": "UTC"})), result('{"v": 1}'), says("One."))
    made = row(system("  "), user("t?"), *asked, user(" \n"), says("Well."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    if encoded.status == "refused":
        assert encoded.reason
        return
    assert_exact(made, encoded, tokenizer, fmt)


def test_roles_are_those_of_the_tokenizer():
    """Two tokenizers of one class with one template write different start tokens."""
    template = parts.reference_template("llama3_1")
    made = row(user("t?"), calls(("clock", {"zone": "UTC"})), result("42"), says("42"), tools=(CLOCK,))
    start_tokens = set()
    other = copy.deepcopy(tokenizer_with(template))
    other.bos_token = other.eos_token
    for tokenizer in (other, parts.fresh_tokenizer("llama3", template)):
        fmt = get_format("native", tokenizer)
        encoded = encode(made, tokenizer, fmt)
        assert_exact(made, encoded, tokenizer, fmt)
        start_tokens.add(encoded.sequences[0].text.partition("<|start_header_id|>")[0])
    assert start_tokens == {"<|endoftext|>", "<|begin_of_text|>"}
