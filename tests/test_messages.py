"""Messages as providers and trainers write them: content parts, training marks, calls under other keys, split turns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune.reading.conversations import RowError, normalize_row
from finetune.reading.training_marks import TRAINING_MARKS
from tests.rows import LAMP, calls, chat, last_message

ROOT = Path(__file__).resolve().parent.parent
CALL = {"name": "set_lamp", "arguments": {"room": "hall"}}
AS_JSON = json.dumps(CALL)
HALL = ("set_lamp", {"room": "hall"})


def says(content=None, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def called(**more) -> dict:
    """An assistant message that calls the lamp tool, with `more` in the call."""
    return says("", tool_calls=[{"type": "function", "function": CALL, **more}])


def messages(*given: dict, **more) -> list[dict]:
    """The canonical messages behind the user's request; reading them again changes nothing."""
    row = normalize_row(chat(*given, tools=[LAMP]), **more)
    assert normalize_row(json.loads(json.dumps(row))) == row
    return row["messages"][1:]


@pytest.mark.parametrize(
    "content",
    [
        ["It is ", "dim."],
        [{"text": "It is "}, {"text": "dim."}],
        {"type": "text", "text": "It is dim."},
        [{"type": "text", "value": "It is dim.", "image_url": None}],
        [{"type": "text", "content": "It is dim."}],
        [{"type": "output_text", "text": "It is dim.", "annotations": [], "logprobs": [1]}],
        [{"type": "text", "text": {"value": "It is dim.", "annotations": []}}],
        [{"type": "text", "text": "It is dim.", "cache_control": {"type": "ephemeral"}}],
    ],
)
def test_text_parts(content):
    assert messages(says(content)) == [{"role": "assistant", "content": "It is dim."}]
    assert messages({"role": "user", "content": content}, says("x"))[0]["content"] == "It is dim."


def test_system_column_in_parts():
    parts = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    for system in (parts, [{"text": "Be brief."}], "Be brief."):
        row = {"system": system, "messages": [{"role": "user", "content": "Dim it"}, says("x")]}
        assert normalize_row(row)["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "file:///a.png"}}, "type image_url is"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "type input_audio is"),
        ({"type": "document", "source": {}}, "type document is"),
        ({"type": "refusal", "refusal": "No."}, "type refusal is"),
        ({"image": {"format": "png", "source": {}}}, "keys image"),
        ({"inlineData": {"mimeType": "image/png", "data": ""}}, "keys inlineData"),
        ({"room": "hall"}, "keys room"),
        (7, "JSON number"),
    ],
)
def test_other_parts_reject_the_row(part, named):
    with pytest.raises(RowError, match=f"message 2.*{named}"):
        messages({"role": "user", "content": [{"type": "text", "text": "See"}, part]}, says("x"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_use", "id": "t", "name": "set_lamp", "input": {"room": "hall"}},
        {"type": "tool-call", "toolCallId": "t", "toolName": "set_lamp", "args": {"room": "hall"}},
        {"type": "function_call", "call_id": "t", "name": "set_lamp", "arguments": '{"room": "hall"}'},
        {"toolUse": {"toolUseId": "t", "name": "set_lamp", "input": {"room": "hall"}}},
        {"functionCall": {"name": "set_lamp", "args": {"room": "hall"}}, "thoughtSignature": "s"},
        {"type": "tool_call", "value": AS_JSON},
    ],
)
@pytest.mark.parametrize(
    "thought",
    [
        {"type": "thinking", "thinking": "Hall, then.", "signature": "s"},
        {"type": "reasoning", "value": "Hall, then."},
        {"text": "Hall, then.", "thought": True},
        {"reasoningContent": {"reasoningText": {"text": "Hall, then.", "signature": "s"}}},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hall, then."}]},
    ],
)
def test_calls_and_reasoning_in_parts(part, thought):
    (message,) = messages(says([thought, {"text": "Dimming."}, part]))
    assert (message["content"], message["reasoning_content"], calls(message)) == ("Dimming.", "Hall, then.", [HALL])


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "tool_result", "tool_use_id": "t", "content": "ok", "is_error": False}, "ok"),
        ({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "ok"}]}, "ok"),
        ({"toolResult": {"toolUseId": "t", "content": [{"json": {"level": 3}}], "status": "success"}}, '{"level": 3}'),
        ({"functionResponse": {"name": "set_lamp", "response": {"level": 3}}}, '{"level": 3}'),
        ({"type": "tool-result", "toolCallId": "t", "output": {"type": "json", "value": [3]}}, "[3]"),
    ],
)
def test_results_in_parts_of_a_user_message(part, text):
    made = messages(called(id="t"), {"role": "user", "content": [{"text": "Thanks."}, part]}, says("x"))
    assert [(m["role"], m["content"]) for m in made[1:3]] == [("tool", text), ("user", "Thanks.")]


def test_parts_in_the_wrong_role_are_refused():
    use, result = {"type": "tool_use", "name": "set_lamp", "input": {}}, {"type": "tool_result", "content": "x"}
    with pytest.raises(RowError, match=r"message 2 \(assistant\) has text behind a call"):
        messages(says([use, {"type": "text", "text": "Done."}]))
    with pytest.raises(RowError, match=r"message 2 \(user\) has a tool call"):
        messages({"role": "user", "content": [use]})
    with pytest.raises(RowError, match=r"message 2 \(assistant\) has a tool result"):
        messages(says([result]))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a", "level": 3}], '[{"type": "text", "text": "a", "level": 3}]'),
        ([{"type": "desk", "lit": True}], '[{"type": "desk", "lit": true}]'),
        ([{"type": "file", "name": "a.txt"}], '[{"type": "file", "name": "a.txt"}]'),
        (["a", 7], '["a", 7]'),
        (["a", "b"], '["a", "b"]'),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b", "annotations": None}], "a b"),
        ([{"type": "text", "value": "a", "loss_weight": 0.0}], "a"),
    ],
)
def test_result_lists(content, text):
    assert messages(called(), {"role": "tool", "content": content})[1]["content"] == text


def test_media_in_a_result_or_column_rejects_the_row():
    picture = {"type": "image", "source": {"type": "base64", "data": ""}}
    with pytest.raises(RowError, match="message 3: a content part of type image"):
        messages(called(), {"role": "tool", "content": [{"type": "text", "text": "a"}, picture]})
    with pytest.raises(RowError, match="has the column images"):
        normalize_row(chat(says("A lamp.")) | {"images": ["lamp.png"]})
    with pytest.raises(RowError, match="has the column image"):
        normalize_row(chat({"role": "user", "content": "<image>What?"}, says("A lamp.")) | {"image": "lamp.png"})
    assert normalize_row(chat(says("A lamp.")) | {"image": "cover.png", "images": []})
    with pytest.raises(RowError, match=r"message 2 \(user\) has images"):
        messages({"role": "user", "content": "What?", "images": ["lamp.png"]}, says("x"))


@pytest.mark.parametrize("key", TRAINING_MARKS)
def test_training_marks_of_each_trainer(key):
    when_true = TRAINING_MARKS[key]
    for value in (True, 1, 0.0, False, None):
        trained = True if value is None else bool(value) is when_true
        for message in (says("a", **{key: value}), says([{"type": "text", "text": "a", key: value}])):
            assert messages(message)[0].get("train", True) is trained
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": AS_JSON}]}
        row["conversations"][1][key] = value
        assert last_message(row).get("train", True) is trained
    for value in (0.5, 2, "true", [0, 1], float("nan")):
        with pytest.raises(RowError, match=f"message 2: {key} is "):
            messages(says("a", **{key: value}))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (says("a", train=True, loss=False), "train True and loss False disagree"),
        (says("a", masked=True, weight=1), "masked True and weight 1 disagree"),
        (says("a", train_detail=[{"train": False}]), "train_detail is "),
        (says("a", lossFactor=1), "lossFactor is 1; it looks like a training mark"),
        (says("a", is_masked=True), "is_masked is True; it looks"),
        (says([{"text": "a", "train": False}, {"text": "b"}]), "parts differ .*train False"),
        (says([{"text": "a", "train": False}], train=True), "parts differ .*train False"),
        (says([{"text": "a", "weight": 0.3}]), "weight is 0.3"),
    ],
)
def test_unclear_training_marks_reject_the_row(message, named):
    with pytest.raises(RowError, match=f"message 2: .*{named}"):
        messages(message)


def test_keys_that_only_contain_the_letters_of_a_mark():
    notes = Counter()
    messages(says("a", constraint="b", glossary="c", train=None), notes=notes)
    assert notes.keys() == {f"not read, key {key!r} of assistant messages" for key in ("constraint", "glossary")}


def test_docs_list_each_training_mark():
    docs = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for key, when_true in TRAINING_MARKS.items():
        (line,) = [line for line in docs.splitlines() if line.startswith(f"| `{key}` |")]
        assert line.endswith(("| false |", "| 0 |") if when_true else "| true |")


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_uses": [{"tool": "set_lamp", "input": {"room": "hall"}}]},
        {"toolCalls": [CALL]},
        {"function_calls": json.dumps([CALL])},
        {"toolInvocations": [{"toolCallId": "1", "toolName": "set_lamp", "args": {"room": "hall"}}]},
        {"additional_kwargs": {"tool_calls": [{"id": "c", "type": "function", "function": CALL}]}},
        {"additional_kwargs": {"function_call": CALL | {"arguments": '{"room": "hall"}'}}},
        {"toolCalls": [CALL], "tool_calls": [CALL]},
    ],
)
def test_calls_under_other_keys(keys):
    (message,) = messages(says("Dimming.", **keys))
    assert (message["content"], calls(message)) == ("Dimming.", [HALL])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"toolInvocations": [{"toolName": "set_lamp", "args": {}, "result": 3}]}, "toolInvocations .*has result"),
        ({"tool_uses": ["set_lamp"]}, "tool_uses .*not valid JSON"),
        ({"tool_uses": [CALL], "tool_calls": [{"name": "other"}]}, "tool_uses are not those"),
        ({"tool_calls": [CALL | {"train": False}]}, "call of set_lamp has train"),
        ({"metadata": {"called": "set_lamp"}}, "'metadata' .*set_lamp"),
        ({"raw": 'set_lamp(room="hall")'}, "'raw' .*set_lamp"),
        ({"action": json.dumps(AS_JSON)}, "'action' .*set_lamp"),
        ({"additional_kwargs": {"used": ["set_lamp"]}}, "'additional_kwargs' .*set_lamp"),
    ],
)
def test_calls_that_cannot_be_read_reject_the_row(keys, named):
    with pytest.raises(RowError, match=f"message 2.*{named}"):
        messages(says("Dimming.", **keys))


def test_only_the_assistant_calls():
    for key in ("tool_calls", "toolCalls", "tool_use"):
        with pytest.raises(RowError, match=rf"message 2 \(user\) has {key}; only the assistant"):
            messages({"role": "user", "content": "x", key: [CALL]}, says("a"))


def test_keys_without_a_call_are_noted():
    notes = Counter()
    (message,) = messages(
        says("a", usage={"tokens": 3}, additional_kwargs={}, why="set_lamp is not needed"), notes=notes
    )
    assert message == {"role": "assistant", "content": "a"}
    assert set(notes) == {f"not read, key {key!r} of assistant messages" for key in ("usage", "why")}


@pytest.mark.parametrize("role", ["tool_call", "function_call", "tool_calls"])
def test_call_messages_join_the_turn_in_front(role):
    other = {"name": "set_lamp", "arguments": {"room": "attic"}}
    pieces = ({"role": role, "content": AS_JSON}, {"role": role, **other})
    made = messages(says("Dimming."), *pieces, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"})
    assert [m["role"] for m in made] == ["assistant", "tool", "tool"]
    assert (made[0]["content"], calls(made[0])) == ("Dimming.", [HALL, ("set_lamp", {"room": "attic"})])
    made = messages(pieces[0], {"role": "tool", "content": "1"}, pieces[1], {"role": "tool", "content": "2"})
    assert [len(calls(m)) for m in made[::2]] == [1, 1]


def test_reasoning_alone_joins_the_message_behind_it():
    made = messages(says("<think>\nHall.\n</think>\n\n"), {"role": "tool_call", "content": AS_JSON})
    assert [(m["content"], calls(m)) for m in made] == [("<think>\nHall.\n</think>", [HALL])]
    made = messages(says("<think>Short.</think>"), says("Done."))
    assert [m["content"] for m in made] == ["<think>Short.</think>\n\nDone."]
    made = messages(says("", reasoning_content="Short."), says("Done."))
    assert made == [{"role": "assistant", "content": "Done.", "reasoning_content": "Short."}]
    made = messages({"role": "tool_call", "content": f"<think>Hall.</think>\n{AS_JSON}"})
    assert [(m["content"], calls(m)) for m in made] == [("<think>Hall.</think>", [HALL])]


def test_consecutive_assistant_messages_are_one_turn():
    assert messages(says("Wait."), says("Done.")) == [says("Wait.\n\nDone.")]
    made = messages(says("Wait."), says("So.", reasoning_content="Hall."), called(), {"role": "tool", "content": "1"})
    assert [(m["content"], m.get("reasoning_content")) for m in made] == [("Wait.\n\nSo.", "Hall."), ("1", None)]
    assert calls(made[0]) == [HALL]
    made = messages(says("Wait."), says("<think>Hall.</think>\nDone."))
    assert made == [says("<think>\nHall.\n</think>\n\nWait.\n\nDone.")]
    assert messages(says("Wait."), says(""), says("Done.")) == [says("Wait.\n\nDone.")]
    # A turn ends with its calls: text behind them is another message.
    assert [m["content"] for m in messages(called(), says("Done."))] == ["", "Done."]
    with pytest.raises(RowError, match=r"messages 2 and 3 are one turn, .* \(train False\)"):
        messages(says("Wait.", train=False), says("Done."))


def test_pieces_of_a_turn_must_have_one_training_mark():
    with pytest.raises(RowError, match=r"messages 2 and 3 are one turn, .* in part \(loss False\)"):
        messages(says("Dimming.", loss=False), {"role": "tool_call", "content": AS_JSON})
    (message,) = messages(says("Dimming.", loss=False), {"role": "tool_call", "content": AS_JSON, "weight": 0})
    assert message["train"] is False


def test_results_are_put_into_the_order_of_their_calls():
    two = says("", tool_calls=[{"id": "a", "function": CALL}, {"id": "b", "function": CALL}])
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in "ba"]
    assert [m["content"] for m in messages(two, *results)[1:]] == ["a", "b"]
    unknown = [results[0], {"role": "tool", "content": "?"}]
    assert [m["content"] for m in messages(two, *unknown)[1:]] == ["b", "?"]
    named = says("", tool_calls=[{"name": "set_lamp"}, {"name": "other"}])
    results = [{"role": "tool", "content": name, "name": name} for name in ("other", "set_lamp")]
    assert [m["content"] for m in messages(named, *results)[1:]] == ["set_lamp", "other"]
    with pytest.raises(RowError, match="message 4: a result of the call in message 2, but message 3"):
        messages(called(id="a"), says("Wait."), {"role": "tool", "content": "x", "tool_call_id": "a"})


def test_harmony_channels():
    made = messages(
        says("The hall, then.", channel="analysis"),
        says("Dimming.", channel="commentary", recipient=None),
        says('{"room": "hall"}', channel="commentary", recipient="functions.set_lamp", content_type="json"),
        {
            "role": "tool",
            "name": "functions.set_lamp",
            "channel": "commentary",
            "recipient": "assistant",
            "content": "1",
        },
        says([{"type": "text", "text": "Done."}], channel="final"),
    )
    assert [m["content"] for m in made] == ["Dimming.", "1", "Done."]
    assert (made[0]["reasoning_content"], calls(made[0])) == ("The hall, then.", [HALL])
    assert made[1]["name"] == "set_lamp"
    for keys, named in (({"channel": "side"}, "channel 'side'"), ({"recipient": "python"}, "recipient python")):
        with pytest.raises(RowError, match=named):
            messages(says("print(1)", **keys))


@pytest.mark.parametrize(
    "text",
    [
        "<function=set_lamp>\n<parameter=room>hall</parameter>\n</function>",
        "<tool_call>set_lamp\n<arg_key>room</arg_key>\n<arg_value>hall</arg_value>\n</tool_call>",
        "<tool_call>\n<function=set_lamp>\n<parameter=room>\nhall\n</parameter>\n</function>\n</tool_call>",
        '[set_lamp(room="hall")]',
    ],
)
def test_calls_in_the_notation_of_models(text):
    (message,) = messages(says(text))
    assert (message["content"], calls(message)) == ("", [HALL])
    if not text.startswith("["):
        (message,) = messages(says(f"Dimming.\n\n{text}"))
        assert (message["content"], calls(message)) == ("Dimming.", [HALL])
    for broken in (f"See {text} there", text[:-3], text.replace("set_lamp", "other")):
        (message,) = messages(says(broken))
        assert message["content"] == broken or calls(message)[0][0] == "other"


@pytest.mark.parametrize(
    "text", [f"```json\n{AS_JSON}\n```", 'set_lamp\n{"room": "hall"}', f"<think>Hall.</think>\n{AS_JSON}"]
)
def test_call_as_text_in_front_of_a_result(text):
    made = messages(says(text), {"role": "tool", "content": "1"})
    assert calls(made[0]) == [HALL]
    assert messages(says(text)) == [says(text)]


def test_json_text_in_front_of_a_result_is_a_call():
    made = messages(says(json.dumps([CALL])), {"role": "tool", "content": "1"}, says("Done."))
    assert [m["content"] for m in made] == ["", "1", "Done."] and calls(made[0]) == [HALL]
    assert messages(says(AS_JSON)) == [{"role": "assistant", "content": AS_JSON}]  # it may be asked for as an answer
