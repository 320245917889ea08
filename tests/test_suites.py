"""Suites whose data the user brings: what is read, how answers are judged, and what is said when something is missing.

The rows have the form of the published files; their contents are invented.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.evaluation.items import ANSWER, CALL, IRRELEVANT, MISSING_PARAMETER
from finetune.evaluation.metrics import Scored, compute_metrics, metric_names
from finetune.evaluation.scoring import score
from finetune.evaluation.suites import SUITES, load_suite, suite_verdict

LOAN = {
    "type": "function",
    "function": {
        "name": "책_대출",
        "parameters": {
            "type": "object",
            "properties": {"제목": {"type": "string"}, "기간": {"type": "integer"}},
            "required": ["제목"],
        },
    },
}


def loan(**arguments) -> dict:
    function = {"name": "책_대출", "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function", "function": function}]}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def functionchat(tmp_path) -> Path:
    folder = tmp_path / "FunctionChat-Bench"
    asked, booked = user("바다의 시간을 빌려 줘"), loan(제목="바다의 시간", 기간=14)
    result = {"role": "tool", "tool_call_id": "x", "name": "책_대출", "content": '{"ok": true}'}
    turns = [
        ("slot", [user("책을 빌려 줘")], says("어떤 책을 빌려 드릴까요?"), None),
        ("call", [asked], booked, '{"기간": [21, 30]}'),
        ("completion", [asked, booked, result], says("빌려 드렸습니다."), None),
        ("relevance", [user("날씨 알려 줘")], says("날씨 기능은 없습니다."), None),
        ("call", [asked], booked, "Only ground truth is allowed."),
    ]
    dialog = [
        {"type_of_output": kind, "query": query, "ground_truth": truth, "acceptable_arguments": accepted}
        for kind, query, truth, accepted in turns
    ]
    write(folder / "data/FunctionChat-Dialog.jsonl", {"dialog_num": 1, "tools": [LOAN], "turns": dialog})
    texts = [{"serial_num": 1, "content": "달과 정원"}, {"serial_num": 2, "content": "겨울 항구"}]
    truths = [
        {"content": json.dumps({"name": "책_대출", "arguments": json.dumps({"제목": one["content"]})})} for one in texts
    ]
    tools = [{"type": "exact", "content": [LOAN]}, {"type": "4_close", "content": [LOAN]}]
    single = {"query": texts, "ground_truth": truths, "acceptable_arguments": [{"content": None}] * 2, "tools": tools}
    write(folder / "data/FunctionChat-Singlecall.jsonl", single)
    decision = {"type_of_output": "slot", "input_messages": [user("빌려 줘")], "input_tools": [LOAN]}
    write(
        folder / "data/FunctionChat-CallDecision.jsonl",
        decision | {"ground_truth": says("제목을 알려 주세요."), "acceptable_arguments": None},
    )
    (folder / "data/system_prompt.txt").write_text("한국어로 답하세요.\n", encoding="utf-8")
    return folder


def test_functionchat_items(functionchat):
    items = load_suite(f"functionchat:{functionchat}")
    kinds = [(item.source.removeprefix("functionchat:"), item.kind) for item in items]
    assert kinds == [
        ("calldecision", MISSING_PARAMETER),
        *(("dialog", kind) for kind in (MISSING_PARAMETER, CALL, ANSWER, IRRELEVANT, CALL)),
        *(("singlecall_exact", CALL), ("singlecall_4_close", CALL)) * 2,
    ]
    assert {item.messages[0]["content"] for item in items[1:]} == {"한국어로 답하세요."}
    assert items[0].messages == [user("빌려 줘")], "rows with messages of their own get no system prompt"
    assert [message["role"] for message in items[3].messages] == ["system", "user", "assistant", "tool"]
    assert items[2].expected_calls == [{"name": "책_대출", "arguments": {"제목": "바다의 시간", "기간": 14}}]
    assert items[2].fingerprint() != items[5].fingerprint(), "what is acceptable belongs to the verdict"
    assert len(load_suite(f"functionchat:{functionchat}/data", limit=1)) == len(items), "one row of each file"


@pytest.mark.parametrize(
    ("arguments", "valid", "strict"),
    [
        ({"제목": "바다의 시간", "기간": 14}, True, True),
        ({"제목": "바다의시간", "기간": 14}, True, True),
        ({"제목": "바다의 시간", "기간": 30}, True, False),
        ({"제목": "바다의 시간", "기간": 31}, False, False),
        ({"제목": "바다의 시간"}, False, False),
        ({"제목": "바다의 시간", "기간": 14, "지점": 1}, False, False),
        ({"제목": "바다", "기간": 14}, False, False),
    ],
)
def test_functionchat_verdict(functionchat, arguments, valid, strict):
    items = load_suite(f"functionchat:{functionchat}")
    made = [{"name": "책_대출", "arguments": arguments}]
    for item, expected in ((items[2], valid), (items[5], strict)):
        assert suite_verdict(item, made, [], {}) == {"functionchat_valid": expected}
        assert suite_verdict(item, [*made, made[0]], [], {}) == {"functionchat_valid": expected}, (
            "the first call counts"
        )
        assert suite_verdict(item, [made[0] | {"name": "책"}, *made], [], {}) == {"functionchat_valid": False}
        assert suite_verdict(item, [], [], {}) == {"functionchat_valid": False}
    assert suite_verdict(items[1], made, [], {}) == {}, "texts are not judged by it"


def test_metrics_of_a_suite_and_its_categories(functionchat):
    """A verdict of a suite becomes its accuracy, and one for each category, in the order of the tables."""
    scored = []
    for item in load_suite(f"functionchat:{functionchat}"):
        verdicts = score(item, "", item.expected_calls, [])
        verdicts |= suite_verdict(item, item.expected_calls, [], verdicts)
        scored.append(Scored(item, "", item.expected_calls, verdicts, 0.1))
    metrics = compute_metrics(scored)
    assert metrics["functionchat_accuracy"] == 1.0 and metrics["counted"]["functionchat_accuracy"] == 6
    assert metrics["functionchat_dialog_accuracy"] == 1.0
    names = metric_names({"base": metrics})
    assert names.index("functionchat_accuracy") < names.index("functionchat_singlecall_4_close_accuracy")
    assert "bfcl_accuracy" in metrics["not_measured"]


def lamp(*required: str, key: str = "parameters") -> dict:
    properties = {
        "room": {"type": "string"}, "level": {"type": "number"}, "on": {"type": "boolean"}, "zones": {"type": "array"},
        "plan": {"type": "object"},
    }  # fmt: skip
    schema = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": "set_lamp", "description": "Dim a lamp.", key: schema}


@pytest.fixture
def acebench(tmp_path) -> Path:
    folder = tmp_path / "ACEBench" / "data_all" / "data_en"

    def category(name: str, truth, question: str = "user: Dim the attic\n", **row) -> None:
        row = {"id": f"{name}_0", "question": question, "function": [lamp("room")], **row}
        write(folder / f"data_{name}.json", row)
        write(folder / "possible_answer" / f"data_{name}.json", {"id": f"{name}_0", "ground_truth": truth})

    talk = "user: Dim it.\nHow dark it is: very.\nsystem: Which room?\nuser: The attic.\n"
    first = {"set_lamp": {"room": "the attic", "level": 3, "on": True, "zones": ["A"], "plan": {"by": "Mr. Day"}}}
    other = {"set_lamp_1": {"room": "attic"}, "set_lamp_2": {"room": "hall"}}
    category("normal_atom_bool", [first, other], talk, time="Today is Monday.")
    category(
        "normal_preference", {"set_lamp": {"room": "attic"}}, function=[lamp("room", key="arguments")], profile="{}"
    )
    category("special_incomplete", {"set_lamp": ["room"]})
    category("special_error_param", {"room": ["attik"]})
    category("special_irrelevant", "CAN NOT SOLVE")
    category("agent_multi_turn", [])
    return folder.parents[1]


def test_acebench_items(acebench):
    items = load_suite(f"acebench:{acebench}")
    assert [(item.category, item.kind) for item in items] == [
        ("normal_atom_bool", CALL), ("normal_preference", CALL), ("special_error_param", MISSING_PARAMETER),
        ("special_incomplete", MISSING_PARAMETER), ("special_irrelevant", IRRELEVANT),
    ]  # fmt: skip
    assert [(m["role"], m["content"]) for m in items[0].messages] == [
        ("system", "Today is Monday."), ("user", "Dim it.\nHow dark it is: very."), ("assistant", "Which room?"),
        ("user", "The attic."),
    ]  # fmt: skip
    assert items[1].tools[0]["function"]["parameters"]["required"] == ["room"], "declared under another key"
    assert items[4].expected_text is None, "its wording is free"


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"room": "in THE-attic, please"}, True),
        ({"room": "the atti"}, False),
        ({"level": 3.0}, True),
        ({"level": 4}, False),
        ({"on": False}, False),
        ({"zones": []}, False),
        ({"plan": {"by": "mr day"}}, True),
        ({"plan": {}}, False),
        ({"colour": "red"}, False),
        ({"level": None}, True),
        ({"room": None}, False),
    ],
    ids=str,
)
def test_acebench_verdict(acebench, changes, valid):
    """None stands for an omitted argument."""
    item = load_suite(f"acebench:{acebench}")[0]
    (call,) = item.expected_calls
    arguments = {name: value for name, value in (call["arguments"] | changes).items() if value is not None}
    made = [{"name": "set_lamp", "arguments": arguments}]
    assert suite_verdict(item, made, [], {}) == {"acebench_valid": valid}
    assert suite_verdict(item, made, ["cut off"], {}) == {"acebench_valid": False}
    assert suite_verdict(item, made * 3, [], {}) == {"acebench_valid": False}


def test_acebench_accepts_the_other_calls(acebench):
    item = load_suite(f"acebench:{acebench}")[0]
    rooms = [{"name": "set_lamp", "arguments": {"room": room}} for room in ("hall", "attic")]
    assert suite_verdict(item, rooms, [], {})["acebench_valid"]
    assert not suite_verdict(item, [rooms[0], rooms[0]], [], {})["acebench_valid"]


WHEN2CALL = {
    "question": "Dim the attic", "correct_answer": "request_for_info", "target_tool": None,
    "tools": [json.dumps(lamp("room"))],
    "answers": {
        "direct": "It is dim.", "request_for_info": "How dark?", "cannot_answer": "I cannot.",
        "tool_call": json.dumps({"name": "set_lamp", "arguments": {"room": "attic"}}),
    },
}  # fmt: skip


def test_when2call_items(tmp_path):
    path = tmp_path / "test.jsonl"
    write(path, WHEN2CALL, WHEN2CALL | {"correct_answer": "tool_call"}, WHEN2CALL | {"correct_answer": "cannot_answer"})
    asks, calls, declines = load_suite(f"when2call:{path}")
    assert [item.kind for item in (asks, calls, declines)] == [MISSING_PARAMETER, CALL, IRRELEVANT]
    assert asks.expected_text == "How dark?" and calls.expected_calls[0]["arguments"] == {"room": "attic"}
    assert [(one.name, one.is_expected) for one in asks.options] == [
        ("direct", False), ("request_for_info", True), ("cannot_answer", False), ("tool_call", False)
    ]  # fmt: skip
    assert len({item.fingerprint() for item in (asks, calls, declines)}) == 3
    assert len(load_suite(f"when2call:{path}", limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"correct_answer": "maybe"}, "correct_answer 'maybe' is none of its answers"),
        ({"answers": {"shout": "No!"}}, "unknown kind of answer 'shout'"),
        ({"answers": 3}, "row 1: not a row of when2call"),
        ({"tools": [3]}, "tool 1 is a JSON number"),
        ({"answers": WHEN2CALL["answers"] | {"tool_call": "[]"}}, "answer 'tool_call' is not a call with a name"),
        ({"answers": WHEN2CALL["answers"] | {"tool_call": '{"name": 5}'}}, "answer 'tool_call' is not a call with a"),
        ({"answers": WHEN2CALL["answers"] | {"direct": 5}}, "answer 'direct' is not a text"),
    ],
)
def test_rows_that_are_not_of_the_suite(tmp_path, row, reason):
    path = tmp_path / "test.jsonl"
    write(path, WHEN2CALL | row)
    with pytest.raises(UserError, match=reason):
        load_suite(f"when2call:{path}")
    write(path, {key: value for key, value in WHEN2CALL.items() if key != "question"})
    with pytest.raises(UserError, match=r"test\.jsonl row 1: not a row of when2call \(has no 'question'\)"):
        load_suite(f"when2call:{path}")


@pytest.mark.parametrize(
    ("suite", "reason"),
    [
        ("toolbench:all", "no suite 'toolbench'; choose from bfcl:CATEGORY"),
        ("functionchat", "needs a folder.*git clone https://github.com/kakao/FunctionChat-Bench"),
        ("functionchat:{}", r"no FunctionChat-\*.jsonl there.*git clone https://github.com/kakao/FunctionChat-Bench"),
        ("acebench:{}", r"no data_\*.json there.*git clone https://github.com/ACEBench/ACEBench"),
        ("when2call", "needs a file.*git clone https://github.com/NVIDIA/When2Call"),
        ("when2call:{}/missing.jsonl", "no such file.*git clone https://github.com/NVIDIA/When2Call"),
    ],
)
def test_missing_data(tmp_path, suite, reason):
    with pytest.raises(UserError, match=reason):
        load_suite(suite.format(tmp_path))


def test_missing_parts(functionchat, acebench):
    (functionchat / "data/system_prompt.txt").unlink()
    with pytest.raises(UserError, match=r"system_prompt\.txt: cannot be read; get it with: git clone"):
        load_suite(f"functionchat:{functionchat}")
    (acebench / "data_all/data_en/possible_answer/data_normal_atom_bool.json").unlink()
    with pytest.raises(UserError, match=r"possible_answer: no data_normal_atom_bool\.json there"):
        load_suite(f"acebench:{acebench}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ground_truth": says("빌려 드릴게요.")}, "row 1: not a row of functionchat .its answer has no call"),
        ({"ground_truth": None}, "its answer has no call"),
        ({"type_of_output": "slot"}, "its answer has a call, which is not expected"),
    ],
)
def test_answers_that_are_not_of_their_kind(functionchat, change, reason):
    path = functionchat / "data/FunctionChat-Dialog.jsonl"
    row = json.loads(path.read_text(encoding="utf-8"))
    row["turns"][1] |= change
    write(path, row)
    with pytest.raises(UserError, match=reason):
        load_suite(f"functionchat:{functionchat}")


@pytest.mark.parametrize(
    ("question", "truth", "reason"),
    [
        ("Please note this.\nuser: Dim it", {"set_lamp": {}}, "question does not begin and end with user:"),
        ("user: Dim it\nsystem: Which room?", {"set_lamp": {}}, "question does not begin and end with user:"),
        ("system: Which room?", {"set_lamp": {}}, "question does not begin and end with user:"),
        ("Dim it", {"set_lamp": {}}, "question does not begin and end with user:"),
        ("user: Dim it", {}, "its answer has no call"),
        ("user: Dim it", [{}], "its answer has no call"),
    ],
)
def test_acebench_rows_that_lose_something(acebench, question, truth, reason):
    folder = acebench / "data_all/data_en"
    write(folder / "data_normal_x.json", {"id": "x", "question": question, "function": [lamp("room")]})
    write(folder / "possible_answer/data_normal_x.json", {"id": "x", "ground_truth": truth})
    with pytest.raises(UserError, match=rf"data_normal_x\.json row 1: not a row of acebench \({reason}"):
        load_suite(f"acebench:{acebench}")


def test_files_of_no_known_part_and_without_rows(acebench, tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="has no row to score"):
        load_suite(f"when2call:{tmp_path / 'empty.jsonl'}")
    write(acebench / "data_all/data_en/data_typo_x.json", {})
    with pytest.raises(UserError, match=r"data_typo_x\.json: not a part of ACEBench that is known"):
        load_suite(f"acebench:{acebench}")


@pytest.mark.parametrize(
    ("row", "answer", "reason"),
    [
        ("{", "", r"BFCL_v4_simple_python\.json row 1: not a row of bfcl"),
        ('{"id": "a"}', '{"id": "a", "ground_truth": []}', "has no 'question'"),
        ("[1]", "", "is a JSON array, not an object"),
        ('{"id": "a", "question": [[]], "function": []}', "", "has no 'a'"),  # not a row that expects no call
    ],
)
def test_damaged_rows_of_bfcl(tmp_path, monkeypatch, row, answer, reason):
    from finetune.evaluation import bfcl

    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "BFCL_v4_simple_python.json").write_text(row + "\n", encoding="utf-8")
    (tmp_path / "possible_answer/BFCL_v4_simple_python.json").write_text(answer, encoding="utf-8")
    monkeypatch.setattr(bfcl, "data_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=reason):
        load_suite("bfcl:simple_python")


def test_every_suite_says_what_it_takes():
    for name, suite in SUITES.items():
        assert suite.name == name and suite.takes
