"""Each shape of row, without a flag: what is trained, what is declared, and what is refused with the reason."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest

from finetune.errors import UserError
from finetune.preparing.checks import check_conversation
from finetune.reading.bracket_calls import bracket_calls
from finetune.reading.conversations import RowError, load_conversations, normalize_row
from finetune.reading.shapes import SHAPES, describe, detect_shape
from finetune.reading.tool_schemas import load_tools_file
from tests.rows import ANSWER, LAMP, WRAPPED, calls
from tests.shape_rows import EXAMPLES, VARIANTS


def answers(row: dict, **options) -> list[tuple[str, list]]:
    """(text, calls) of each assistant message."""
    messages = normalize_row(row, **options)["messages"]
    return [(m["content"], calls(m) if "tool_calls" in m else []) for m in messages if m["role"] == "assistant"]


def roles(row: dict) -> list[str]:
    return [message["role"] for message in normalize_row(row)["messages"]]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_example_of_each_shape(shape):
    row, expected = EXAMPLES[shape.name]
    assert detect_shape(row)[0] is shape
    if expected:
        assert answers(row) == expected
    else:
        with pytest.raises(RowError, match="one row for each"):
            normalize_row(row)


@pytest.mark.parametrize(("writers", "row", "expected", "tools"), VARIANTS, ids=lambda value: str(value)[:20])
def test_example_of_each_writer(writers, row, expected, tools):
    assert answers(row) == expected
    assert [tool["function"]["name"] for tool in normalize_row(row)["tools"]] == tools


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("text", ("text", [])),
        (says("text"), ("text", [])),
        ({"from": "gpt", "value": "text"}, ("text", [])),
        ([says("text")], ("text", [])),
        (json.dumps(says("text")), ("text", [])),
        ({"name": "dim", "arguments": {"pct": 1}}, ("", [("dim", {"pct": 1})])),
        ([{"name": "dim", "arguments": {"pct": 1}}], ("", [("dim", {"pct": 1})])),
        ([user("q"), says("text")], ("text", [])),
        (["text", "other text"], ("text", [])),
    ],
)
@pytest.mark.parametrize("column", ["chosen", "answer", "completion", "ground_truth"])
def test_answer_beside_messages(column, answer, expected):
    row = {"messages": [user("q")], column: answer, "rejected": "bad"}
    assert answers(row) == [expected]
    assert roles(row) == ["user", "assistant"]
    further = f", {column}.further answers" if answer == ["text", "other text"] else ""
    assert describe(row).endswith(f"not read: rejected{further}")


def test_answer_after_a_tool_result():
    call = says("") | {"tool_calls": [{"function": {"name": "dim", "arguments": {}}}]}
    row = {"messages": [user("q"), call, {"role": "tool", "content": "ok"}], "answer": "Dimmed"}
    assert answers(row) == [("", [("dim", {})]), ("Dimmed", [])]


def test_answer_beside_answered_messages_is_unread(tmp_path):
    rows = [{"messages": [user("q")], "answer": "b"}, {"messages": [user("q"), says("a")], "answer": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = load_conversations(path)
    assert [c["messages"][-1]["content"] for c in result.conversations] == ["b", "a"]
    assert [text.split(": ", 1)[1] for text in result.mappings] == [
        "messages and answer column: messages, answer -> completion",
        "messages: messages; not read: answer",
    ]


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        ("q", [user("q"), says("a")]),
        ("q", [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]),
        ([{"role": "system", "content": "s"}, user("q")], [user("q"), says("a")]),
        ("q", [{"role": "system", "content": "s"}, user("q"), says("a")]),
        ([user("q")], says("a")),
    ],
)
def test_chosen_does_not_repeat_the_prompt(prompt, chosen):
    row = {"prompt": prompt, "chosen": chosen, "rejected": "bad"}
    assert answers(row) == [("a", [])]
    assert roles(row).count("user") == 1


def test_chosen_that_contradicts_the_prompt():
    with pytest.raises(RowError, match="does not repeat the prompt"):
        normalize_row({"prompt": "q", "chosen": [user("other"), says("a")]})


def test_only_a_boolean_label_is_a_verdict():
    row = {"prompt": "q", "completion": "a"}
    for label in (True, 0, 1, "false", 2):
        assert answers(row | {"label": label}) == [("a", [])]
    for column in ("label", "Label", "kto_tag"):
        with pytest.raises(RowError, match=f"{column} is false"):
            normalize_row(row | {column: False})


@pytest.mark.parametrize(
    ("asks", "replies"),
    [
        ("Question", "ANSWER"),
        ("User Query", "Response"),
        ("input", "output"),
        ("Q", "A"),
        ("질문", "답변"),
        (unicodedata.normalize("NFD", "질문"), unicodedata.normalize("NFD", "답변")),
        ("问题", "回答"),
        ("Pregunta", "Respuesta"),
        ("question", "ground_truth"),
        ("user", "assistant"),
    ],
)
def test_columns_in_any_case_and_language(asks, replies):
    row = {"id": 3, asks: "q", replies: "a"}
    assert [m["content"] for m in normalize_row(row)["messages"]] == ["q", "a"]
    assert describe(row).endswith("; not read: id")


def test_squad_answers():
    row = {"context": "Text.", "question": "q", "answers": {"text": ["one", "two"], "answer_start": [0, 1]}}
    assert [m["content"] for m in normalize_row(row)["messages"]] == ["Text.\n\nq", "one"]
    assert answers(row | {"answers": [{"text": "one", "answer_start": 0}]}) == [("one", [])]
    with pytest.raises(RowError, match="answers are empty"):
        normalize_row(row | {"answers": {"text": [], "answer_start": []}})


ANTHROPIC = [
    {"role": "user", "content": [{"type": "text", "text": "Dim it"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A lamp.", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Wait."},
            {"type": "tool_use", "id": "a", "name": "dim", "input": {"pct": 1}},
            {"type": "tool_use", "id": "b", "name": "dim", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "ok"}]},
            {"type": "tool_result", "tool_use_id": "b", "content": "none"},
            {"type": "text", "text": "Thanks"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Bye"}]},
]
CONVERSE = [
    {"role": "user", "content": [{"text": "Dim it"}]},
    {
        "role": "assistant",
        "content": [
            {"reasoningContent": {"reasoningText": {"text": "A lamp."}}},
            {"text": "Wait."},
            {"toolUse": {"toolUseId": "a", "name": "dim", "input": {"pct": 1}}},
            {"toolUse": {"toolUseId": "b", "name": "dim", "input": {}}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"toolResult": {"toolUseId": "a", "content": [{"text": "ok"}]}},
            {"toolResult": {"toolUseId": "b", "content": [{"text": "none"}], "status": "error"}},
            {"text": "Thanks"},
        ],
    },
    {"role": "assistant", "content": [{"text": "Bye"}]},
]


@pytest.mark.parametrize("messages", [ANTHROPIC, CONVERSE], ids=["Anthropic", "Converse"])
def test_blocks_become_messages(messages):
    row = {"messages": messages, "system": [{"type": "text", "text": "Brief."}], "tools": [LAMP]}
    made = normalize_row(row)["messages"]
    assert [(m["role"], m["content"]) for m in made] == [
        *(("system", "Brief."), ("user", "Dim it"), ("assistant", "Wait."), ("tool", "ok"), ("tool", "none")),
        *(("user", "Thanks"), ("assistant", "Bye")),
    ]
    assert calls(made[2]) == [("dim", {"pct": 1}), ("dim", {})]
    assert made[2]["reasoning_content"] == "A lamp."
    assert [m.get("tool_call_id") for m in made if m["role"] == "tool"] == ["a", "b"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image", "source": {}}, "message 1: .*type image"),
        ({"type": "tool_result", "content": [{"type": "image"}]}, "message 1: .*type image"),
        ({"type": "tool_use", "name": "dim", "input": {}}, "only the assistant"),
        ({"document": {}}, "document"),
    ],
)
def test_blocks_that_are_refused(part, reason):
    with pytest.raises(RowError, match=reason):
        normalize_row({"messages": [{"role": "user", "content": [part]}, *ANTHROPIC[1:]]})


def test_gemini_in_snake_case():
    row = {
        "system_instruction": {"parts": [{"text": "Brief."}]},
        "tools": [{"function_declarations": [{"name": "dim", "parameters": {"type": "OBJECT", "properties": {}}}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "Dim"}]},
            {"role": "model", "parts": [{"function_call": {"name": "dim", "args": {}}}]},
            {"role": "function", "parts": [{"function_response": {"name": "dim", "response": {"ok": 1}}}]},
            {"role": "model", "parts": [{"text": "So", "thought": True}, {"text": "Done"}]},
        ],
    }
    made = normalize_row(row)
    assert [m["role"] for m in made["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert made["messages"][3]["content"] == '{"ok": 1}' and made["messages"][4]["reasoning_content"] == "So"
    assert made["tools"][0]["function"]["parameters"]["type"] == "object"
    assert answers(row) == [("", [("dim", {})]), ("Done", [])]


def test_responses_items():
    row = {
        "instructions": "Brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Dim"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two lamps."}]},
            {"type": "function_call", "call_id": "a", "name": "dim", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "dim", "arguments": '{"pct": 1}'},
            {"type": "function_call_output", "call_id": "a", "output": "ok"},
            {"type": "function_call_output", "call_id": "b", "output": "ok"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done"}]},
        ],
    }
    assert answers(row) == [("", [("dim", {}), ("dim", {"pct": 1})]), ("Done", [])]
    assert roles(row) == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert normalize_row(row)["messages"][2]["reasoning_content"] == "Two lamps."
    text = {"instructions": "Brief.", "input": "Dim", "output": row["input"][6:]}
    assert roles(text) == ["system", "user", "assistant"]
    with pytest.raises(RowError, match="item 8: has the type web_search_call"):
        normalize_row(row | {"input": [*row["input"], {"type": "web_search_call"}]})


@pytest.mark.parametrize("under", ["data", "kwargs"])
def test_langchain_messages_under_a_key(under):
    body = {"content": "", "additional_kwargs": {"tool_calls": [{"function": {"name": "dim", "arguments": "{}"}}]}}
    row = {"messages": [{"type": "human", under: {"content": "Dim"}}, {"type": "ai", under: body}]}
    assert answers(row) == [("", [("dim", {})])]


def test_pairs_with_a_mask():
    row = {"conversation": [{"system": "s", "input": "q", "output": "a", "output_with_loss": False}]}
    made = normalize_row(row)["messages"]
    assert [m["role"] for m in made] == ["system", "user", "assistant"] and made[-1]["train"] is False
    with pytest.raises(RowError, match="exchange 1 also holds note"):
        normalize_row({"conversation": [{"input": "q", "output": "a", "note": "x"}]})


TOOLACE = (
    "Answer for the lamp shop. Here is a list of functions in JSON format that you can invoke:\n"
    + json.dumps([LAMP | {"name": "Lamp Dimmer"}])
    + "\nShould you decide to return the function call(s).\nPut it in the format of [func1(a=b...), func2(params)]\n"
    "NO other text MUST be included. Be kind."
)


@pytest.mark.parametrize("in_message", [True, False])
def test_bracket_calls_and_tools_of_the_system_text(in_message):
    messages = [
        user("Dim"),
        says('[Lamp Dimmer(room="a, (b)", on=true), Lamp Dimmer(pct=[1, 2])]'),
        user("?"),
        says("[x]"),
    ]
    row = {"system": TOOLACE, "messages": messages}
    if in_message:
        row = {"messages": [{"role": "system", "content": TOOLACE}, *messages]}
    made = normalize_row(row)
    assert made["messages"][0]["content"] == "Answer for the lamp shop.\nBe kind."
    assert answers(row)[0] == ("", [("Lamp Dimmer", {"room": "a, (b)", "on": True}), ("Lamp Dimmer", {"pct": [1, 2]})])
    assert answers(row)[1] == ("[x]", [])
    assert [tool["function"]["name"] for tool in made["tools"]] == ["Lamp Dimmer"]


@pytest.mark.parametrize(
    "text", ["[dim(1)]", "[dim(pct=1]", "[dim(pct=1) and", "[dim(pct=os.x)]", "[dim(pct=1, pct=2)]"]
)
def test_bracket_calls_that_break_off(text):
    with pytest.raises(ValueError, match=r"."):
        bracket_calls(text, ["dim"])


def test_tools_in_system_text_and_column():
    kimi = f"<|im_system|>tool_declare<|im_middle|>{json.dumps([WRAPPED])}<|im_end|>"
    hermes = f"Be brief. You are a function calling AI model. Tools: <tools> {json.dumps([LAMP])} </tools>"
    for text, rest in ((kimi, []), (hermes, ["Be brief."])):
        row = {"messages": [{"role": "system", "content": text}, user("q"), says("a")], "tools": json.dumps([LAMP])}
        made = normalize_row(row)
        assert made["tools"] == [WRAPPED]
        assert [m["content"] for m in made["messages"] if m["role"] == "system"] == rest


@pytest.mark.parametrize(
    "column", ["tool_defs", "available_tools", "input_tools", "function_description", "toolConfig"]
)
def test_tools_under_each_name(column):
    tools = {"tools": [{"toolSpec": LAMP}]} if column == "toolConfig" else json.dumps(LAMP)
    assert normalize_row({"messages": [user("q"), says("a")], column: tools})["tools"] == [WRAPPED]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"tools": [LAMP]}),
        json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"tools": [LAMP], "nextCursor": None}}),
        json.dumps(LAMP) + "\n" + json.dumps(LAMP | {"name": "other"}) + "\n",
    ],
)
def test_tools_file_of_mcp_and_json_lines(tmp_path, text):
    path = tmp_path / "tools.json"
    path.write_text(text, encoding="utf-8")
    assert load_tools_file(path)[0] == WRAPPED
    path.write_text('{"tools": []}', encoding="utf-8")
    with pytest.raises(UserError, match="contains no tool schema"):
        load_tools_file(path)


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [LAMP], "lost": "words", "empty": None},
        {"jsonrpc": "2.0", "id": 1, "result": {"tools": [LAMP], "lost": 1}},
        {"jsonrpc": "2.0", "id": 1, "result": {"tools": [LAMP]}, "lost": 1},
        [{"functionDeclarations": [LAMP], "lost": {"a": 1}}],
        [{"toolSpec": LAMP, "lost": "words"}],
    ],
)
def test_what_is_beside_tools_is_noted(tools):
    notes = Counter()
    row = {"messages": [user("q"), says("a")], "tools": tools}
    assert normalize_row(row, notes=notes)["tools"] == [WRAPPED]
    assert [note for note in notes if "beside" in note] == ["not read, key 'lost' beside tools"]


def test_bare_lists_of_messages(tmp_path):
    for row in ([user("q"), says("a")], [["q", "a"]], ["q", "a"]):
        for name, text in (("a.jsonl", "{0}\n{0}\n"), ("b.json", "[{0}, {0}]")):
            (tmp_path / name).write_text(text.replace("{0}", json.dumps(row)), encoding="utf-8")
            found = load_conversations(tmp_path / name).conversations
            assert [[m["content"] for m in one["messages"]] for one in found] == [["q", "a"]] * 2


@pytest.mark.parametrize("column", ["traj", "trajectory", "history"])
def test_trajectories(column):
    row = {"id": 1, column: [user("q"), says("a")], "info": {"done": True}}
    assert answers(row) == [("a", [])]
    assert describe(row).endswith("not read: id, info")


def test_function_chat_dialog_repeats_its_turns():
    turns = [
        {"query": [user("q")], "ground_truth": says("a")},
        {"query": [user("q"), says("a"), user("r")], "ground_truth": says("b")},
    ]
    assert answers({"turns": turns}) == [("a", []), ("b", [])]
    for turn, arguments in ((turns[0]["ground_truth"], '{"a": 1}'), (turns[1]["query"][1], '{"a":1}')):
        turn["tool_calls"] = [{"id": arguments, "function": {"name": "f", "arguments": arguments}}]
    assert answers({"turns": turns})[0] == ("a", [("f", {"a": 1})])
    turns[1]["query"][1] = says("other")
    with pytest.raises(RowError, match="turn 2"):
        normalize_row({"turns": turns})


def test_open_webui_names_keys_beside_the_messages():
    row = {"chat": {"messages": [user("Dim"), says("Done.")], "title": "Lamps", "tags": [], "input": ["more"]}}
    assert describe(row) == "Open WebUI export: chat; not read: chat.title, chat.input"


def test_open_webui_reads_the_shown_branch():
    nodes = {
        "a": user("q") | {"parentId": None},
        "b": says("old") | {"parentId": "a"},
        "c": says("new") | {"parentId": "a"},
    }
    row = {"chat": {"history": {"messages": nodes, "currentId": "c"}, "messages": [user("q"), says("old")]}}
    assert answers(row) == [("new", [])]
    assert describe(row) == "Open WebUI export: chat; not read: chat.messages, chat.other branches"
    for broken in ({"c": says("new") | {"parentId": "gone"}}, {"c": says("new") | {"parentId": "c"}}):
        with pytest.raises(RowError, match="the chat's history runs in a circle, or a message of it is missing"):
            normalize_row({"chat": {"history": {"messages": broken, "currentId": "c"}}})


def test_glaive_without_line_breaks():
    assert answers({"chat": "USER: q ASSISTANT: a <|endoftext|> USER: r ASSISTANT: b"}) == [("a", []), ("b", [])]
    with pytest.raises(RowError, match="do not begin lines"):
        normalize_row({"chat": "USER: q USER: r ASSISTANT: b"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "The mill stands by the weir."}, "raw text"),
        ({"question": [[user("a")], [user("b")]], "path": []}, "multi-turn BFCL rows need their simulator"),
        ({"role": "user", "content": "q"}, "it is one message"),
        ({"gespraech": [user("q"), says("a")]}, "--map gespraech=messages"),
        (
            {"log": {"steps": [user("q"), says("a")]}},
            "log.steps looks like .* --map log.steps=messages",
        ),
        ({"ask me": "what is it", "reply": "it is this"}, "--map 'ask me=prompt' --map reply=completion"),
    ],
)
def test_rows_without_a_shape_name_the_remedy(row, reason):
    with pytest.raises(RowError, match=reason):
        normalize_row(row)


def event(uuid: str, parent: str | None, role: str, content, identity: str | None = None) -> dict:
    message = {"role": role, "content": content} | ({"id": identity} if identity else {})
    return {"uuid": uuid, "parentUuid": parent, "sessionId": "s", "type": role, "message": message}


def test_session_log_of_events(tmp_path):
    """The shown branch is read; calls that are events of their own are one turn, results stand behind them."""
    use = [{"type": "tool_use", "id": name, "name": "dim", "input": {"pct": n}} for n, name in enumerate("xy")]
    result = [[{"type": "tool_result", "tool_use_id": name, "content": name}] for name in "xy"]
    events = [
        {"type": "summary", "summary": "Lamps", "leafUuid": "h"},
        event("a", None, "user", "Dim both"),
        event("b", "a", "assistant", [{"type": "text", "text": "An abandoned answer"}], "m0"),
        event("c", "a", "assistant", [{"type": "text", "text": "Both."}], "m1"),
        event("d", "c", "assistant", use[:1], "m1"),
        event("e", "d", "user", result[0]),
        event("f", "d", "assistant", use[1:], "m1"),
        event("g", "f", "user", result[1]),
        {"type": "system", "uuid": "sys", "parentUuid": "g", "sessionId": "s", "content": "hook"},
        event("h", "sys", "assistant", [{"type": "text", "text": "Done."}], "m2"),
        event("i", None, "user", "A subagent") | {"isSidechain": True},
        event("j", "i", "assistant", [{"type": "text", "text": "Yes."}], "m3") | {"isSidechain": True},
    ]
    path = tmp_path / "session.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in events), encoding="utf-8")
    result = load_conversations(path)
    assert [[(m["role"], m["content"]) for m in c["messages"]] for c in result.conversations] == [
        [("user", "Dim both"), ("assistant", "Both."), ("tool", "x"), ("tool", "y"), ("assistant", "Done.")],
        [("user", "A subagent"), ("assistant", "Yes.")],
    ]
    assert calls(result.conversations[0]["messages"][1]) == [("dim", {"pct": 0}), ("dim", {"pct": 1})]
    assert result.origins == [(str(path), 2), (str(path), 11)]


def test_session_log_with_wrong_fields(tmp_path):
    """Links that are not text begin a conversation; a circle of links ends."""
    events = [
        event("a", "b", "user", "q"),
        event("b", "a", "assistant", [{"type": "text", "text": "a"}], "m"),
        event("c", None, "user", "r") | {"parentUuid": ["a"]},
        event("d", "c", "assistant", "b") | {"message": {"id": [1], "role": "assistant", "content": "b"}},
        {"type": "user", "uuid": "e", "parentUuid": "d", "message": "lost"},
    ]
    path = tmp_path / "session.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in events), encoding="utf-8")
    found = load_conversations(path, strict=False)
    assert [[m["content"] for m in c["messages"]] for c in found.conversations] == [["q", "a"], ["r", "b", ""]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"user_input": "q", "reference": "a", "reference_contexts": ["c"]}, [("a", [])]),
        ({"user_input": [{"type": "human", "content": "q"}], "reference": "a"}, [("a", [])]),
        ({"user_input": "q", "response": "b", "reference": "a"}, [("b", [])]),
        ({"dialog": [["q", "a"], ["r", "b"]]}, [("a", []), ("b", [])]),
    ],
)
def test_ragas_rows_and_lists_of_two(row, expected):
    assert answers(row) == expected


def test_reference_is_an_answer_only_in_ragas_rows():
    with pytest.raises(RowError, match="has no messages"):
        normalize_row({"question": "q", "reference": "a book"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": {"role": ["user", "ai"], "content": ["q", "a"]}},
        {"prompt": "q", "completion": [{"type": "text", "text": "a"}]},
        {"messages": [{"user": "q"}, {"assistant": "a"}]},
        {"turns": [user("q"), says("a")]},
        {"contents": [{"role": "user", "parts": {"text": "q"}}, {"role": "model", "parts": {"text": "a"}}]},
    ],
)
def test_further_spellings_of_messages(row):
    assert answers(row) == [("a", [])]


def test_index_of_a_choice_is_not_an_answer():
    with pytest.raises(RowError, match="has no messages"):
        normalize_row({"question": "q", "choices": ["a", "b"], "answer": 1})
    assert answers({"question": "q", "answer": 1}) == [("1", [])]


def test_tools_by_name():
    tools = {"set_lamp": {key: LAMP[key] for key in ("description", "parameters")}}
    assert normalize_row({"messages": [user("q"), says("a")], "tools": tools})["tools"] == [WRAPPED]


def test_part_of_a_column_is_mapped():
    row = {"log": json.dumps({"steps": [user("q"), says("a")]})}
    assert answers(row, column_map={"log.steps": "messages"}) == [("a", [])]
    assert describe(row, {"log.steps": "messages"}) == "messages: log.steps -> messages; not read: log"


def test_plain_rows_pass_the_checks():
    for name in ("messages", "prompt and completion", "messages and answer column"):
        assert not check_conversation(normalize_row(EXAMPLES[name][0]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"type": "human", "text": "Hi"}, {"type": "ai", "content": "Hello"}]}, "a key text"),
        ({"title": "x", "chat": {"messages": [{"role": "user", "parts": "Hi"}, ANSWER]}}, "a key parts"),
        ({"messages": [{"role": "user", "blocks": [{"block_type": "text", "text": "Hi"}]}, ANSWER]}, "a key blocks"),
    ],
)
def test_text_under_an_unread_key_is_refused(row, reason):
    """Of LangChain's and Open WebUI's messages too, whose metadata are not read."""
    with pytest.raises(RowError, match=f"message 1 \\(user\\) has no content but {reason}"):
        normalize_row(row)


def test_unread_keys_of_langchain_are_counted():
    notes = Counter()
    answer = {"type": "ai", "content": "Hello", "artifact": "lamp.png", "usage_metadata": {"total": 3}}
    normalize_row({"messages": [{"type": "human", "content": "Hi"}, answer]}, notes=notes)
    assert notes == {"not read, key 'artifact' of assistant messages": 1}


def test_preference_rows_of_llama_factory_v1():
    parts = [{"type": "text", "value": "Hi"}]
    chosen = [{"role": "user", "content": parts, "loss_weight": 0.0}, {"role": "assistant", "content": "Hello"}]
    row = {"chosen_messages": chosen, "rejected_messages": [chosen[0], {"role": "assistant", "content": "No"}]}
    assert [message["content"] for message in normalize_row(row)["messages"]] == ["Hi", "Hello"]


def test_keys_beside_a_function_are_kept():
    """Whatever the `type` is called; the model sees the declaration as it is."""
    notes = Counter()
    tools = [{"type": "web_search", "function": {"name": "find"}, "region": "KR"}]
    row = normalize_row({"messages": [{"role": "user", "content": "Hi"}, ANSWER], "tools": tools}, notes=notes)
    assert row["tools"] == [{"type": "function", "function": {"name": "find"}, "region": "KR"}]
    assert notes["type of a tool -> function"] == 1


WITH_KEYS_BESIDE = {
    "chat.history": {"chat": {"messages": [user("q"), says("a")], "history": {"note": "x"}}},
    "answers.note": {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0], "note": "x"}},
    "answers.other": {"question": "q", "answers": {"good": "a", "other": "b"}, "correct_answer": "good"},
    "turns.note": {"turns": [{"query": [user("q")], "ground_truth": says("a"), "note": "x"}]},
    "answer.further answers": {"question": "q", "answer": ["a", "b"]},
    "choices.further choices": {
        "messages": [user("q")],
        "choices": [{"index": 0, "message": says("a")}, {"index": 1, "message": says("b")}],
    },
    "response.note": {
        "request": {"messages": [user("q")]},
        "response": {"choices": [{"text": "a", "index": 0}], "note": "x", "usage": {"total_tokens": 3}},
    },
}


@pytest.mark.parametrize("name", WITH_KEYS_BESIDE)
def test_keys_beside_an_answer_are_named(name):
    row = WITH_KEYS_BESIDE[name]
    assert answers(row) == [("a", [])]
    assert describe(row).endswith(f"; not read: {name}")


def test_texts_of_an_answer_are_joined():
    """Items without a role are content parts; only those of a completion API are alternatives."""
    assert answers({"input": [], "output": [{"text": "D"}, {"content": "x"}]}) == [("Dx", [])]
    assert answers({"input": "q", "output": [{"text": "D", "index": 0}, {"text": "x", "index": 1}]}) == [("D", [])]
    with pytest.raises(RowError, match="message 2: a content part with the keys note is not text"):
        answers({"input": "q", "output": [{"text": "D"}, {"note": "x"}]})


@pytest.mark.parametrize("mark", ["train", "weight", "loss_mask", "masked"])
@pytest.mark.parametrize(
    "part",
    [
        {"functionCall": {"name": "dim", "args": {"pct": 5}}},
        {"toolUse": {"name": "dim", "input": {"pct": 5}}},
        {"reasoningContent": {"text": "hm"}},
    ],
)
def test_mark_inside_a_part(part, mark):
    """A mark on the part itself is the message's, where all parts agree; inside the call it is refused."""
    row = {"messages": [user("q"), {"role": "assistant", "content": [part | {mark: 0}]}]}
    assert normalize_row(row)["messages"][-1].get("train", True) is (mark == "masked")
    ((key, inner),) = part.items()
    row["messages"][1]["content"] = [{key: inner | {mark: 0}}]
    with pytest.raises(RowError, match=f"message 2.* has {mark}"):
        normalize_row(row)


@pytest.mark.parametrize("place", ["call", "function", "plain"])
def test_type_of_a_call(place):
    call = {"name": "dim", "arguments": {}} if place == "plain" else {"function": {"name": "dim", "arguments": {}}}
    for kind, noted in ((None, 0), ("function", 0), ("toolUse", 0), ("tool-call", 0), ("web_search", 1), ({"a": 1}, 1)):
        (call["function"] if place == "function" else call)["type"] = kind
        notes = Counter()
        assert answers({"messages": [user("q"), says("") | {"tool_calls": [call]}]}, notes=notes) == [
            ("", [("dim", {})])
        ]
        assert notes["not read, key 'type' of calls"] == noted


def test_key_that_repeats_a_call_is_only_noted():
    """SWE-agent writes `action` beside the call that it was made of."""
    message = says("I dim it.") | {"tool_calls": [{"name": "dim", "arguments": {}}], "action": "dim"}
    row = {"tools": [LAMP, {"name": "dim"}], "history": [user("q"), message]}
    notes = Counter()
    assert answers(row, notes=notes) == [("I dim it.", [("dim", {})])]
    assert notes["not read, key 'action' of assistant messages"] == 1
    message["action"] = "set_lamp"
    with pytest.raises(RowError, match="the key 'action' is not read but holds the name of the tool set_lamp"):
        normalize_row(row)
