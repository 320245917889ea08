"""Rows of every shape become canonical conversations; rows that cannot be read exactly are refused with the reason."""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.files import write_jsonl
from finetune.preparing.checks import check_conversation, exact_key
from finetune.reading.conversations import RowError, load_conversations, normalize_row
from finetune.reading.row_files import Unreadable
from finetune.reading.shapes import FIELDS, SHAPES, describe, parse_map
from prepare_data import EXAMPLES
from tests.rows import LAMP, WRAPPED, calls, chat, last_message
from tests.shape_rows import docs_page

ROOT = Path(__file__).resolve().parent.parent
DEEP = json.loads("[" * 900 + "]" * 900)


def test_docs_list_each_shape_and_field():
    docs = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    shapes = (ROOT / "docs/shapes.md").read_text(encoding="utf-8")
    assert shapes == docs_page(), "run: python -m tests.shape_rows > docs/shapes.md"
    assert ", ".join(f"`{name}`" for name in FIELDS) in " ".join(docs.split())
    assert f"Fields of --map: {', '.join(FIELDS)};" in " ".join(EXAMPLES.split())


def test_shapes_read_known_fields_only():
    assert all(shape.needs | shape.used <= FIELDS.keys() for shape in SHAPES)
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)


def test_roles():
    roles = ["developer", "user", "assistant", "ipython", "function", "tool", "model", "HUMAN"]
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    assert [m["role"] for m in normalize_row(row)["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "tool",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ({"온도": 1.50, "n": None}, '{"온도": 1.5, "n": null}'),
        ([1, 2], "[1, 2]"),
        (42, "42"),
        (True, "true"),
        ("  kept \n", "  kept \n"),
    ],
)
def test_contents_of_a_tool_result(content, expected):
    row = chat({"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": content, "name": "f"})
    assert last_message(row) == {"role": "tool", "content": expected, "name": "f"}


def test_only_assistant_text_is_stripped():
    row = {"messages": [{"role": "user", "content": " q\n"}, {"role": "assistant", "content": "\n\u3000a \n"}]}
    assert [m["content"] for m in normalize_row(row)["messages"]] == [" q\n", "a"]


def test_reasoning_and_train_flag():
    message = last_message(chat({"role": "assistant", "content": "a", "reasoning_content": " r ", "train": False}))
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "r", "train": False}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "text": "hi"}, {"role": "model", "parts": [{"text": "hi"}]},
        {"role": "tool", "content": None, "result": {"t": 3}}, {"role": "assistant", "content": None, "refusal": "No."},
    ],
)  # fmt: skip
def test_text_under_another_key_is_refused(message):
    with pytest.raises(RowError, match=rf"message 2 .* has no content but a key {list(message)[-1]}; rename it"):
        normalize_row(chat(message))
    kept = message | {"content": "said"}
    assert normalize_row(chat(kept))["messages"][1]["content"] == "said"


def test_empty_list_content():
    call = {"role": "assistant", "content": [], "tool_calls": [{"name": "f"}]}
    messages = normalize_row(chat(call, {"role": "tool", "content": []}))["messages"]
    assert [m["content"] for m in messages[1:]] == ["", "[]"]


def test_overridden_columns_are_counted_as_not_read():
    own = {"role": "system", "content": "Be brief."}
    for system, number in (("Be brief.", 0), ("Be kind.", 1)):
        notes = Counter()
        row = {"system": system, "messages": [own, *said("x")["messages"]]}
        assert normalize_row(row, notes=notes)["messages"][0] == own
        assert notes["system column not read: the messages begin with a system message of their own"] == number
    for empty in ({"role": "system"}, {"role": "system", "content": ""}, {"from": "system", "value": ""}):
        row = {"system": "Be kind.", "messages": [empty, *said("x")["messages"]]}
        messages = normalize_row(row)["messages"]
        assert (messages[0]["content"], messages[1]["role"]) == ("Be kind.", "user")
    row = {"a": "1", "b": "2", "completion": "c"}
    assert normalize_row(row, column_map={"a": "prompt", "b": "prompt"})["messages"][0]["content"] == "1"
    assert describe(row, {"a": "prompt", "b": "prompt"}).endswith("not read: b")


@pytest.mark.parametrize("empty", [[], None, ""])
def test_empty_tool_calls_are_removed(empty):
    assert last_message(chat({"role": "assistant", "content": "a", "tool_calls": empty})) == {
        "role": "assistant",
        "content": "a",
    }


def test_legacy_function_call():
    message = last_message(
        chat({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}})
    )
    assert calls(message) == [("f", {})]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 1}, "has no messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages: not valid JSON"),
        ({"messages": {"role": "user"}}, "not a list"),
        ({"messages": ["hi"]}, "message 1 is a JSON string"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role 'narrator'"),
        ({"messages": [{"content": "x"}]}, "role None"),
        (chat({"role": "assistant", "tool_calls": [{"arguments": {}}]}), "no name"),
        (chat({"role": "assistant", "tool_calls": "[{"}), "tool_calls: not valid JSON"),
        (chat({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}), "only text"),
        (chat({"role": "assistant", "content": "half \ud83d"}), "surrogate"),
        (
            chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}),
            "cannot represent",
        ),
        (Unreadable("is not JSON: x", "{"), "is not JSON"),
        (chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": DEEP}}]}), "deeper than 64"),
        (
            chat({"role": "assistant", "content": "x"}, tools=[{"name": "f", "parameters": {"x": DEEP}}]),
            "nested too deeply",
        ),
        ({"instruction": "i", "output": "o", "history": 7}, "history is not a list"),
        ({"question": "q", "answers": {"a": "b"}, "correct_answer": ["a"]}, "no text under the correct_answer"),
        ({"question": [[{"role": "user", "content": "q"}]], "function": [LAMP], "ground_truth": [{"f": 5}]}, "without"),
        (chat({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}), r"message 2 \(user\) has tool_calls"),
        (
            chat({"role": "tool", "content": "x", "function_call": {"name": "f"}}),
            r"message 2 \(tool\) has function_call",
        ),
        (chat({"role": "assistant", "content": "x", "reasoning_content": ["a"]}), "reasoning_content is a JSON array"),
    ],
)
def test_unusable_rows_give_the_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        normalize_row(row)


def test_sharegpt_with_calls_and_observation():
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Dim it"},
            {"from": "function_call", "value": '{"name": "set_lamp", "arguments": {"room": "hall"}}'},
            {"from": "observation", "value": '{"ok": true}'},
            {"from": "gpt", "value": "Done."},
        ],
        "tools": json.dumps([LAMP]),
    }
    messages = normalize_row(row)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert calls(messages[2]) == [("set_lamp", {"room": "hall"})]


def test_tools_of_hermes_system_prompt():
    system = (
        "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML "
        f"tags. <tools> {json.dumps(WRAPPED)} </tools> For each function call return a json object:\n"
        "<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>\nAnswer in Korean."
    )
    row = {
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": "Dim"},
            {"from": "gpt", "value": "<tool_call>\n{'name': 'set_lamp', 'arguments': {'room': 'a'}}\n</tool_call>"},
            {"from": "tool", "value": '<tool_response>\n{"ok": 1}\n</tool_response>\n<tool_response>2</tool_response>'},
        ]
    }
    conversation = normalize_row(row)
    assert conversation["tools"] == [WRAPPED]
    assert conversation["messages"][0] == {"role": "system", "content": "Answer in Korean."}
    assert [m["content"] for m in conversation["messages"] if m["role"] == "tool"] == ['{"ok": 1}', "2"]


def test_apigen_xlam():
    row = {
        "query": "Dim hall and attic",
        "tools": json.dumps([LAMP]),
        "answers": json.dumps(
            [{"name": "set_lamp", "arguments": {"room": "hall"}}, {"name": "set_lamp", "arguments": {"room": "attic"}}]
        ),
    }
    assert calls(last_message(row)) == [("set_lamp", {"room": "hall"}), ("set_lamp", {"room": "attic"})]


@pytest.mark.parametrize("key", ["direct", "tool_call"])
def test_when2call_multiple_choice(key):
    row = {
        "question": "Dim",
        "correct_answer": key,
        "tools": [json.dumps(LAMP)],
        "answers": {"direct": "I cannot.", "tool_call": '{"name": "set_lamp", "arguments": {"room": "x"}}'},
    }
    message = last_message(row)
    assert message["content"] == ("I cannot." if key == "direct" else "")
    assert ("tool_calls" in message) == (key == "tool_call")


def test_when2call_preference_row():
    row = {
        "messages": [{"role": "user", "content": "q"}],
        "chosen_response": {"role": "assistant", "content": "good"},
        "rejected_response": {"role": "assistant", "content": "bad"},
    }
    assert last_message(row)["content"] == "good"
    assert describe(row) == (
        "messages and answer column: messages, chosen_response -> completion; not read: rejected_response"
    )


def test_glaive_chat():
    row = {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(LAMP, indent=4),
        "chat": 'USER: Dim the hall\n\n\nASSISTANT: <functioncall> {"name": "set_lamp", "arguments": \'{"room": '
        '"hall"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"ok": true}\n\n\nASSISTANT: Done. <|endoftext|>',
    }
    conversation = normalize_row(row)
    assert [m["role"] for m in conversation["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert calls(conversation["messages"][1]) == [("set_lamp", {"room": "hall"})]
    assert conversation["messages"][3]["content"] == "Done."
    assert conversation["tools"] == [WRAPPED]


def test_bfcl_with_its_answers_file(tmp_path):
    function = {
        "name": "m.area",
        "description": "d",
        "parameters": {"type": "dict", "properties": {"a": {"type": "float"}}},
    }
    question = {"id": ["x", 0], "question": [[{"role": "user", "content": "area?"}]], "function": [function]}
    truth = {
        "id": ["x", 0],
        "ground_truth": [{"m.area": {"a": [2.5, 2], "unit": ["", "cm"], "o": [{"k": [1, 2], "l": [""]}]}}],
    }
    (tmp_path / "possible_answer").mkdir()
    for path, row in (
        (tmp_path / "BFCL_v4_x.json", question),
        (tmp_path / "possible_answer" / "BFCL_v4_x.json", truth),
    ):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (conversation,) = load_conversations(tmp_path / "BFCL_v4_x.json").conversations
    assert calls(conversation["messages"][-1]) == [("m.area", {"a": 2.5, "o": {"k": 1}})]
    assert conversation["tools"][0]["function"]["parameters"]["type"] == "object"


@pytest.mark.parametrize(
    ("row", "user", "answer"),
    [
        ({"instruction": "i", "response": "r", "metadata": {"tool": "web"}}, "i", "r"),
        ({"instruction": "i", "input": "ctx", "output": "r"}, "i\n\nctx", "r"),
        ({"instruction": "i", "input": "", "output": "r"}, "i", "r"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"question": "q", "answer": 4}, "q", "4"),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
            "p",
            "c",
        ),
        ({"text": "User: hi\nAssistant: hello"}, "hi", "hello"),
        ({"text": "### Human: hi### x\n### Assistant: hello"}, "hi### x", "hello"),
    ],
)
def test_prompt_and_completion_in_each_spelling(row, user, answer):
    messages = normalize_row(row)["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [("user", user), ("assistant", answer)]


def test_speaker_text_with_a_quoted_marker():
    text = "System: Kurz.\nUser: Say 'Assistant: no'\nAssistant: Sure:\nAssistant: no\nUser: Danke"
    messages = normalize_row({"text": text})["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Kurz."),
        ("user", "Say 'Assistant: no'"),
        ("assistant", "Sure:\nAssistant: no"),
        ("user", "Danke"),
    ]


def test_rendered_text_is_refused():
    with pytest.raises(RowError, match="already rendered"):
        normalize_row({"text": "<|im_start|>user\nhi<|im_end|>"})


def test_query_log_row_with_external_tools():
    row = {"query": "Dim", "tool_used": "set_lamp", "parameters": '{"room": "hall"}', "reasoning": "A lamp.", "id": 4}
    conversation = normalize_row(row, tools=[WRAPPED])
    assert conversation["messages"][-1]["content"] == "A lamp."
    assert calls(conversation["messages"][-1]) == [("set_lamp", {"room": "hall"})]
    assert conversation["tools"] == [WRAPPED]


def test_map_overrides_columns_and_is_described(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"question": "wrong", "frage": "right", "answer": "a"}])
    result = load_conversations(path, column_map=parse_map(["frage=prompt"]))
    assert result.conversations[0]["messages"][0]["content"] == "right"
    assert list(result.mappings) == [
        f"{path}: prompt and completion: frage -> prompt, answer -> completion; not read: question"
    ]
    assert parse_map(["prompt=frage"]) == {"frage": "prompt"}
    with pytest.raises(UserError, match="COLUMN=FIELD"):
        parse_map(["a=b"])


def said(text: str) -> dict:
    """A row whose answer is `text`."""
    return chat({"role": "assistant", "content": text})


def test_cached_reading_is_lazy(tmp_path, monkeypatch):
    """The second time, no row is read before a conversation is accessed."""
    path, kept = tmp_path / "rows.jsonl", tmp_path / "kept"
    write_jsonl(path, [said("one"), said("two"), said("three")])
    plain = load_conversations(path)
    first = load_conversations(path, cache_dir=kept)
    assert first == plain
    with monkeypatch.context() as patched:
        patched.setattr("finetune.reading.conversations.read_rows", None)
        second = load_conversations(path, cache_dir=kept)
        assert len(second.conversations) == 3
    for name in ("origins", "counts", "mappings", "notes", "fingerprint", "rejected"):
        assert getattr(second, name) == getattr(plain, name), name
    assert list(second.conversations) == plain.conversations and second.conversations[1:] == plain.conversations[1:]


@pytest.mark.parametrize("change", ["content", "same size and time", "limit", "map", "weight", "damage"])
def test_any_change_invalidates_the_cache(tmp_path, change):
    path, kept = tmp_path / "rows.jsonl", tmp_path / "kept"
    write_jsonl(path, [said("one"), said("two"), said("three")])
    load_conversations(path, cache_dir=kept)
    spec, options, stat = path, {}, path.stat()
    if change == "content":
        write_jsonl(path, [said("one")])
    elif change == "same size and time":
        write_jsonl(path, [said("one"), said("two"), said("tREEh")])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    elif change == "limit":
        options = {"limit": 1}
    elif change == "map":
        options = {"column_map": {"messages": "messages"}}
    elif change == "weight":
        spec = f"{path}*2"
    else:
        (entry,) = kept.iterdir()
        entry.write_text(entry.read_text(encoding="utf-8").replace("rows.jsonl", "tows.jsonl"), encoding="utf-8")
    again, plain = load_conversations(spec, cache_dir=kept, **options), load_conversations(spec, **options)
    assert again == plain


def test_files_changed_while_in_use_are_refused(tmp_path):
    path, kept = tmp_path / "rows.jsonl", tmp_path / "kept"
    write_jsonl(path, [said("one")])
    load_conversations(path, cache_dir=kept)
    loaded = load_conversations(path, cache_dir=kept)
    write_jsonl(path, [said("two")])
    with pytest.raises(UserError, match="changed while it was in use"):
        list(loaded.conversations)


def test_bad_row_is_named_each_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="row 1: messages is empty"):
            load_conversations(path, cache_dir=tmp_path / "kept")


def test_unread_message_keys_are_counted():
    notes = Counter()
    normalize_row(chat({"role": "assistant", "content": "x", "audio": {"id": 1}, "refusal": None}), notes=notes)
    assert notes == {"not read, key 'audio' of assistant messages": 1}


def test_text_between_tool_responses_is_kept():
    text = "<tool_response>1</tool_response> but <tool_response>2</tool_response>"
    assert normalize_row(chat({"role": "tool", "content": text}))["messages"][1]["content"] == text


MUTATED = [
    chat({"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "set_lamp", "arguments": "{}"}]},
         {"role": "tool", "content": "r", "tool_call_id": "c1"}, {"role": "assistant", "content": "a"}, tools=[LAMP]),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'},
                       {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"query": "q", "answers": '[{"name": "f", "arguments": {"a": 1}}]', "tools": '[{"name": "f", "parameters": {}}]'},
    {"question": "q", "answers": {"direct": "d", "tool_call": '{"name": "f"}'}, "correct_answer": "tool_call"},
    {"question": [[{"role": "user", "content": "q"}]], "function": [LAMP], "ground_truth": [{"f": {"a": ["x", ""]}}]},
    {"query": "q", "tool_used": "f", "parameters": '{"a": 1}', "reasoning": "why"},
    {"instruction": "i", "input": "c", "output": "o", "history": [["a", "b"]], "system": "s"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"text": "User: hi\nAssistant: yo"},
    {"system": 'SYSTEM: You are a helpful assistant with access to the following functions. Use them\n{"name": "f"}',
     "chat": 'USER: q\nASSISTANT: <functioncall> {"name": "f", "arguments": {}}\nFUNCTION RESPONSE: 1\nASSISTANT: a'},
]  # fmt: skip
JUNK = [
    *(
        None,
        True,
        0,
        7,
        1.5,
        float("inf"),
        10**400,
        b"bytes",
        [],
        {},
        [None],
        [1],
        ["x"],
        [[]],
        [{}],
        {"a": 1},
        {"": 1},
    ),
    *("", " ", "x", "{}", "[]", "{", "null", "[1]", "\ud800", "\x00", "<tool_call>", "<function=f>{}</function>"),
    *(
        "[TOOL_CALLS] [1]",
        "<tool_call>{'name': {[1]: 2}}</tool_call>",
        {"name": "f"},
        {"role": "user"},
        {"function": {}},
    ),
    *([{"type": "text"}], {"type": ["string", None]}, {"type": 1}, {"$ref": "#"}, {"properties": 1}, {"required": "a"}),
]


def places(value, path=()):
    """The path of keys to each value in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_mutated_rows_are_kept_or_refused():
    """Rows of every shape with junk in up to three places give a reason or a valid conversation, never a crash."""
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(4000):
        row = copy.deepcopy(rng.choice(MUTATED))
        for _ in range(rng.randint(1, 3)):
            if not row:
                break
            *path, last = rng.choice(list(places(row)))
            target = row
            for key in path:
                target = target[key]
            if rng.random() < 0.2:
                del target[last]
            else:
                target[last] = copy.deepcopy(rng.choice(JUNK))
        try:
            conversation = normalize_row(row)
        except RowError as error:
            assert str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["kept"] += 1
        assert {m["role"] for m in conversation["messages"]} <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(m["content"], str) for m in conversation["messages"])
        assert normalize_row(json.loads(json.dumps(conversation))) == conversation
        check_conversation(conversation)
        exact_key(conversation)
    assert outcomes["refused"] > 500 and outcomes["kept"] > 500


def test_unread_second_spelling_is_noted():
    notes, call = Counter(), {"name": "set_lamp", "arguments": {"room": "hall"}}
    both = {"role": "assistant", "content": "", "tool_calls": [call], "function_call": call | {"name": "other"}}
    made = normalize_row(chat(both | {"reasoning_content": "One.", "thinking": "Two."}, tools=[LAMP]), notes=notes)
    assert [c["function"]["name"] for c in made["messages"][-1]["tool_calls"]] == ["set_lamp"]
    assert made["messages"][-1]["reasoning_content"] == "One."
    assert notes["function_call not read: the message has tool_calls"] == 1
    assert notes["thinking not read: the message has another reasoning"] == 1


def test_nonempty_one_of_two_spellings_is_read():
    padded = {"role": None, "from": "gpt", "content": None, "value": "hello"}
    assert last_message(chat(padded)) == {"role": "assistant", "content": "hello"}
    assert last_message(chat({"role": "assistant", "content": "", "value": "hello"}))["content"] == "hello"
    assert last_message(chat({"role": "assistant", "content": "hello", "value": "hello"}))["content"] == "hello"
    with pytest.raises(RowError, match="a content and another value"):
        normalize_row(chat({"role": "assistant", "content": "hello", "value": "bye"}))


@pytest.mark.parametrize(
    "message",
    [
        {"function_call": '{"name": "set_lamp", "arguments": "{\\"room\\": \\"hall\\"}"}'},
        {"tool_calls": [{"function": {"name": "set_lamp"}, "arguments": {"room": "hall"}}]},
        {"tool_calls": [{"function": {"name": "set_lamp", "arguments": ""}, "parameters": {"room": "hall"}}]},
        {"tool_calls": [{"name": "set_lamp", "arguments": {}, "parameters": '{"room": "hall"}'}]},
        {"content": '<tool_call>{"name": "set_lamp", "arguments": {}, "parameters": {"room": "hall"}}</tool_call>'},
    ],
)
def test_calls_and_arguments_in_unusual_places(message):
    answer = last_message(chat({"role": "assistant"} | message, tools=[LAMP]))
    assert calls(answer) == [("set_lamp", {"room": "hall"})]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"function_call": "set_lamp"}, "function_call: not valid JSON"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}]}, "two arguments that differ"),
        ({"tool_calls": [{"name": "f", "function": {"name": "g"}}]}, "two names, g and f"),
    ],
)
def test_contradictory_calls_are_refused(message, wanted):
    with pytest.raises(RowError, match=wanted):
        normalize_row(chat({"role": "assistant"} | message, tools=[LAMP]))
