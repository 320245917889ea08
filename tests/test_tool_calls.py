"""Tools and calls in each spelling: declarations, arguments, calls in an assistant's text."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.reading.calls_in_text import read_arguments, split_calls
from finetune.reading.conversations import RowError, normalize_row
from finetune.reading.tool_schemas import normalize_tools
from tests.rows import LAMP, WRAPPED, calls, chat, last_message


@pytest.mark.parametrize(
    "tools",
    [
        [WRAPPED],
        [LAMP],
        [json.dumps(WRAPPED)],
        [json.dumps(LAMP)],
        json.dumps([WRAPPED]),
        json.dumps([LAMP]),
        LAMP,
        json.dumps([json.dumps(LAMP)]),
        [{"function": LAMP}],
        [{"type": "function", **LAMP}],
        [{"input_schema" if key == "parameters" else key: value for key, value in {"type": "custom", **LAMP}.items()}],
        [{"inputSchema" if key == "parameters" else key: value for key, value in LAMP.items()}],
    ],
    ids=[
        "dicts",
        "bare",
        "strings",
        "bare strings",
        "one string",
        "one string of bare",
        "one dict",
        "string in string",
        "wrapper without type",
        "flat with type",
        "Anthropic",
        "MCP",
    ],
)
def test_each_spelling_of_tools_is_normalised(tools):
    assert normalize_tools(tools) in ([WRAPPED], [{"function": LAMP, "type": "function"}])


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools):
    assert normalize_tools(tools) == []


def test_tools_keep_unknown_keys_and_key_order():
    tool = {
        "function": {"parameters": {"type": "object", "properties": {}}, "name": "a", "strict": True},
        "type": "function",
    }
    assert json.dumps(normalize_tools([tool])) == json.dumps([tool])


def test_tool_without_description_is_unchanged():
    assert normalize_tools([{"name": "ping"}]) == [{"type": "function", "function": {"name": "ping"}}]


def test_flat_parameters_become_json_schema():
    notes = Counter()
    flat = {
        "city": {"description": "where", "type": "str"},
        "days": {"description": "how many", "type": "int, optional", "default": 3},
        "tags": {"description": "words", "type": "List[str]"},
    }
    (tool,) = normalize_tools([{"name": "w", "description": "", "parameters": flat}], notes)
    schema = tool["function"]["parameters"]
    assert schema["required"] == ["city", "tags"]
    assert schema["properties"]["days"] == {"description": "how many", "type": "integer", "default": 3}
    assert schema["properties"]["tags"] == {"description": "words", "type": "array", "items": {"type": "string"}}
    assert notes["tool with a flat parameter list rewritten as JSON Schema"] == 1


def test_type_names_are_translated_at_every_depth():
    schema = {
        "type": "dict",
        "properties": {"x": {"type": "float"}, "y": {"type": "array", "items": {"type": "dict"}}, "z": {"type": "any"}},
        "required": ["x"],
    }
    (tool,) = normalize_tools([{"name": "f", "parameters": schema}])
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"x": {"type": "number"}, "y": {"type": "array", "items": {"type": "object"}}, "z": {}},
        "required": ["x"],
    }


@pytest.mark.parametrize("name", ["type", "description"])
def test_schema_without_type_is_not_a_flat_list(name):
    schema = {"properties": {name: {"type": "string"}, "n": {"type": "integer"}}}
    (tool,) = normalize_tools([{"name": "f", "parameters": schema}])
    assert tool["function"]["parameters"] == schema


@pytest.mark.parametrize("tools", ["{", [{"description": "nameless"}], [3], 7, [{"name": "a", "parameters": [1]}]])
def test_unreadable_tools_are_refused(tools):
    with pytest.raises(RowError, match="tool"):
        normalize_row(chat({"role": "assistant", "content": "ok"}, tools=tools))


CALL_TEXTS = {
    "llama": '<function=set_lamp>{"room": "a}<\\"/b", "level": 7}</function>',
    "hermes": '<tool_call>\n{"name": "set_lamp", "arguments": {"room": "a}<\\"/b", "level": 7}}\n</tool_call>',
    "hermes, arguments as text": "<tool_call>"
    + json.dumps({"name": "set_lamp", "arguments": '{"room": "a}<\\"/b", "level": 7}'})
    + "</tool_call>",
    "hermes, Python dict": "<tool_call>{'arguments': {'room': 'a}<\"/b', 'level': 7}, 'name': 'set_lamp'}</tool_call>",
    "when2call": '<TOOLCALL>[{"name": "set_lamp", "arguments": {"room": "a}<\\"/b", "level": 7}}]</TOOLCALL>',
    "mistral": '[TOOL_CALLS] [{"name": "set_lamp", "arguments": {"room": "a}<\\"/b", "level": 7}, "id": "abcdefghi"}]',
    "mistral v11": '[TOOL_CALLS]set_lamp[CALL_ID]abcdefghi[ARGS]{"room": "a}<\\"/b", "level": 7}',
    "mistral v13": '[TOOL_CALLS]set_lamp[ARGS]{"room": "a}<\\"/b", "level": 7}',
    "qwen xml": '<tool_call>\n<function=set_lamp>\n<parameter=room>\na}<"/b\n</parameter>\n'
    "<parameter=level>\n7\n</parameter>\n</function>\n</tool_call>",
    "glaive": """<functioncall> {"name": "set_lamp", "arguments": '{"room": "a}<\\"/b", "level": 7}'}""",
    "glaive, with an end": '<functioncall> {"name": "set_lamp", "arguments": {"room": "a}<\\"/b", "level": 7}}'
    " <|endoftext|>",
    "glaive, plain JSON": '<functioncall> {"name": "set_lamp", "arguments": {"room": "a}<\\"/b", "level": 7}}',
}


@pytest.mark.parametrize("text", CALL_TEXTS.values(), ids=CALL_TEXTS)
def test_calls_in_text_become_tool_calls(text):
    message = last_message(chat({"role": "assistant", "content": text}, tools=[LAMP]))
    assert message["content"] == ""
    assert calls(message) == [("set_lamp", {"room": 'a}<"/b', "level": 7})]


def test_python_tuple_in_text_becomes_a_list():
    text = "<tool_call>{'name': 'set_lamp', 'arguments': {'room': ('<|im_end|>', None, -1.0)}}</tool_call>"
    message = last_message(chat({"role": "assistant", "content": text}, tools=[LAMP]))
    assert calls(message) == [("set_lamp", {"room": ["<|im_end|>", None, -1.0]})]


def test_text_before_several_calls():
    text = 'One moment.\n<function=set_lamp>{"room": "a"}</function>\n<function=set_lamp>{"room": "b"}</function>\n'
    message = last_message(chat({"role": "assistant", "content": text}, tools=[LAMP]))
    assert message["content"] == "One moment."
    assert calls(message) == [("set_lamp", {"room": "a"}), ("set_lamp", {"room": "b"})]


@pytest.mark.parametrize(
    "text",
    [
        '<function=set_lamp>{"room": "a"}',  # cut off
        '<function=set_lamp>{"room": }</function>',
        '<function=set_lamp>["a"]</function>',
        '<function=set_lamp>{"room": "a"}</function> and then?',
        'Write <tool_call>{"name": "other", "arguments": {}}</tool_call>',  # mentions an undeclared tool
        '<tool_call>{"name": "set_lamp", "x": 1}</tool_call>',
        '[TOOL_CALLS]set_lamp[ARGS]{"room": "a"} and then?',
        "<tool_call><function=set_lamp><parameter=room>a</function></tool_call>",
        "<function=set_lamp>" + '{"a":' * 5000,
        "<tool_call>{'name': 'set_lamp', 'arguments': {'room': 'a', 'room': 'b'}}</tool_call>",
        "<tool_call>{'name': 'set_lamp', 'arguments': {'room': {1: 2}}}</tool_call>",
        "<tool_call>{'name': 'set_lamp', 'arguments': {'room': b'a'}}</tool_call>",
    ],
)
def test_calls_that_do_not_parse_completely_stay_text(text):
    notes = Counter()
    message = last_message(chat({"role": "assistant", "content": text}, tools=[LAMP]), notes=notes)
    assert message == {"role": "assistant", "content": text}
    assert notes["call tag in the text left as text (it does not parse cleanly)"] == 1


def test_tags_in_user_and_tool_messages_stay_text():
    text = '<function=set_lamp>{"room": "a"}</function>'
    row = {"messages": [{"role": "user", "content": text}, {"role": "tool", "content": text}], "tools": [LAMP]}
    assert [m["content"] for m in normalize_row(row)["messages"]] == [text, text]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"b": 1, "a": 2}, {"b": 1, "a": 2}),
        ('{"b": 1, "a": 2}', {"b": 1, "a": 2}),
        (json.dumps('{"b": 1, "a": 2}'), {"b": 1, "a": 2}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("{}", {}),
        ("null", {}),
    ],
)
def test_arguments_in_each_spelling(arguments, expected):
    call = {"type": "function", "id": 5, "function": {"name": "f", "arguments": arguments}}
    message = last_message(chat({"role": "assistant", "content": None, "tool_calls": [call]}))
    assert json.dumps(message["tool_calls"]) == json.dumps(
        [{"type": "function", "id": "5", "function": {"name": "f", "arguments": expected}}]
    )


def test_arguments_under_other_keys():
    def called(call: dict, notes: Counter) -> dict:
        return normalize_row(chat({"role": "assistant", "tool_calls": [call]}), notes=notes)["messages"][-1]

    notes: Counter = Counter()
    for call in ({"name": "f", "args": {"a": 1}}, {"type": "tool_use", "function": {"name": "f", "input": {"a": 1}}}):
        assert calls(called(call, notes)) == [("f", {"a": 1})]
    with pytest.raises(RowError, match="call of f has no arguments but params"):
        called({"name": "f", "params": {"a": 1}}, notes)
    with pytest.raises(RowError, match="two arguments that differ"):
        called({"name": "f", "arguments": {"a": 2}, "input": {"a": 1}}, notes)
    assert calls(called({"name": "f", "arguments": None, "parameters": {"a": 1}}, notes)) == [("f", {"a": 1})]
    assert not [note for note in notes if "calls" in note]
    assert calls(called({"name": "f", "arguments": {}, "result": 3, "index": 0}, notes)) == [("f", {})]
    assert notes["not read, key 'result' of calls"] == 1
    called({"name": "f", "arguments": {"a": 1}, "function": "text"}, notes)
    called({"function": {"name": "f", "arguments": {}, "function": "text"}}, notes)
    assert notes["not read, key 'function' of calls"] == 2
    with pytest.raises(RowError, match="call of f has no arguments but function"):
        called({"name": "f", "function": "text"}, notes)


@pytest.mark.parametrize("arguments", [[1], "[1]", "seven", "7", 7, True, '{"a": NaN}', '{"a": 1, "a": 2}', '{"a"'])
def test_arguments_that_are_not_an_object_are_refused(arguments):
    with pytest.raises(RowError, match=r"message 2: call of f: arguments"):
        last_message(chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}))


def test_number_types_are_preserved():
    text = '{"n": 12345678901234567890, "e": 1e-07, "z": -0.0, "f": 7.0, "i": 7, "s": "007", "b": true, "x": null}'
    assert json.dumps(read_arguments(text)) == text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(objects, min_size=1, max_size=3), st.sampled_from(["llama", "hermes", "nvidia"]), st.booleans())
def test_any_arguments_in_text_are_read_back(arguments, style, ascii_only):
    def dump(value):
        return json.dumps(value, ensure_ascii=ascii_only)

    named = [{"name": "f", "arguments": a} for a in arguments]
    text = {
        "llama": "".join(f"<function=f>{dump(a)}</function>" for a in arguments),
        "hermes": "\n".join(f"<tool_call>\n{dump(call)}\n</tool_call>" for call in named),
        "nvidia": f"<TOOLCALL>{dump(named)}</TOOLCALL>",
    }[style]
    assert json.dumps(split_calls("text " + text)) == json.dumps(("text", named))


@settings(max_examples=80, deadline=None)
@given(objects)
def test_normalising_is_idempotent(arguments):
    row = chat(
        {"role": "assistant", "content": " hi ", "tool_calls": [{"name": "f", "arguments": json.dumps(arguments)}]}
    )
    once = normalize_row(row)
    assert json.dumps(normalize_row(json.loads(json.dumps(once)))) == json.dumps(once)
    assert json.dumps(once["messages"][1]["tool_calls"][0]["function"]["arguments"]) == json.dumps(arguments)
