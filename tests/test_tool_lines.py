"""Calls that rows write as lines, and tools that rows name without a call."""

from __future__ import annotations

import json

import pytest

from finetune.evaluation.items import load_items
from finetune.evaluation.metrics import Scored, compute_metrics
from finetune.evaluation.scoring import score
from finetune.preparing.checks import check_conversation
from finetune.reading.normalize import normalize_row
from finetune.reading.row_files import RowError

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"q": {}}}}}
    for name in ("find", "chat")
]
LINES = 'Tool: find\nParameters: {"q": "x"}\nReasoning: It is\nours.'


def answer(text, **columns):
    row = {"instruction": "Ask.", "response": text, **columns}
    message = normalize_row(row, tools=TOOLS)["messages"][-1]
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"], called


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (LINES, ("It is\nours.", [("find", {"q": "x"})])),
        (LINES.replace("Parameters", "PARAMETERS"), ("It is\nours.", [("find", {"q": "x"})])),
        ('**Tool:** `find`\n**Parameters:** ```json\n{"q": "x"}\n```', ("", [("find", {"q": "x"})])),
        ('Tool: find\nParameters: {\n  "q": "a\\nTool: b"\n}', ("", [("find", {"q": "a\nTool: b"})])),
        ("Tool: find\nParameters: {'q': None}", ("", [("find", {"q": None})])),
        ("Sure.\nReasoning: Small talk.\nTool: chat\nParameters: none", ("Sure.\n\nSmall talk.", [("chat", {})])),
        ("Tool: chat", ("", [("chat", {})])),
        ("Tool: find\nParameters: {}\nTool: chat\nReasoning: r", ("r", [("find", {}), ("chat", {})])),
        ('Tool: elsewhere\nParameters: {"a": 1}', ("", [("elsewhere", {"a": 1})])),
        (f"{LINES}\nReasoning: more", ("It is\nours.\nReasoning: more", [("find", {"q": "x"})])),
        ("Tool: hammer", ("Tool: hammer", [])),
        ("Tool: hammer\nParameters: 2 kg", ("Tool: hammer\nParameters: 2 kg", [])),
        ("Tool: none\nReasoning: r", ("Tool: none\nReasoning: r", [])),
        ("Parameters: {}\nTool: find", ("Parameters: {}\nTool: find", [])),
        ("The right tool: patience.", ("The right tool: patience.", [])),
    ],
)  # fmt: skip
def test_lines_are_read_as_calls(text, read):
    assert answer(text) == read


def test_unreadable_or_contradictory_rows_are_rejected():
    with pytest.raises(RowError, match="calls find, but its Parameters are not a JSON object: 'about x'"):
        answer("Tool: find\nParameters: about x")
    with pytest.raises(RowError, match=r"metadata\.tool is chat, but the answer calls find"):
        answer(LINES, metadata={"source": "custom", "tool": "chat"})
    assert answer(LINES, metadata={"tool": "find"}) == answer(LINES, metadata={"tool": "an annotation program"})


def test_query_log_without_parameters_keeps_its_tool():
    row = {"query": "Ask.", "tool_used": "find", "response": "Found."}
    assert normalize_row(row)["messages"][-1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {}}
    message = normalize_row(row | {"response": LINES})["messages"][-1]
    assert (message["content"], message["tool_calls"][0]["function"]["arguments"]) == ("It is\nours.", {"q": "x"})
    message = normalize_row(row | {"response": LINES, "parameters": '{"q": "logged"}'})["messages"][-1]
    assert (message["content"], message["tool_calls"][0]["function"]["arguments"]) == ("", {"q": "logged"})


def test_tools_may_be_described_in_the_text():
    kinds = []
    for asked in ("Tools: find, chat. Ask.", "I find it.", "A tool for finding."):
        found = normalize_row({"instruction": asked, "response": LINES})
        kinds.append([problem.kind for problem in check_conversation(found) if "tool" in problem.kind])
    assert kinds == [["tools described only in the text"], ["undeclared tool"], ["undeclared tool"]]
    declared = normalize_row(
        {"instruction": "Tools: lost. Ask.", "response": LINES.replace("find", "lost")}, tools=TOOLS
    )
    assert [problem.kind for problem in check_conversation(declared)] == ["undeclared tool"]


ROWS = [
    {"query": "a", "tool_used": "find", "response": "Found."},
    {"instruction": "b", "response": "Hello.", "metadata": {"tool": "chat"}},
    {"instruction": "c", "response": LINES, "metadata": {"tool": "find"}},
    {"instruction": "d", "response": "Hello.", "metadata": {"tool": "an annotation program"}},
]


def scored(rows, path, made, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = load_items([path], **options)
    calls = [[{"name": name, "arguments": {}}] if name else [] for name in made]
    return items, [
        Scored(item, "", call, score(item, "", call, []), 0.0) for item, call in zip(items, calls, strict=True)
    ]


def test_tools_without_parameters_are_scored_by_their_choice(tmp_path):
    items, answers = scored(ROWS, tmp_path / "rows.jsonl", ["find", "find", "find", None], tools=TOOLS)
    assert [item.expected_calls for item in items] == [
        [{"name": "find", "arguments": None}], [{"name": "chat", "arguments": None}],
        [{"name": "find", "arguments": {"q": "x"}}], [],
    ]  # fmt: skip
    metrics = compute_metrics(answers)
    assert metrics["counted"]["tool_name_accuracy"] == 3 and metrics["tool_name_accuracy"] == pytest.approx(
        2 / 3, abs=1e-5
    )
    assert metrics["counted"]["parameter_accuracy"] == metrics["counted"]["argument_recall"] == 1
    assert metrics["parameter_accuracy"] == 0 and metrics["per_tool"]["chat"]["support"] == 1


def test_confusion_of_tools_that_only_the_text_names(tmp_path):
    rows = [
        {"instruction": "Tools: find, chat.", "response": LINES},
        {"instruction": "Tools: find, chat. Hi", "response": "Tool: chat\nParameters: {}"},
    ]
    _, answers = scored(rows, tmp_path / "rows.jsonl", ["chat", "lost"])
    matrix = compute_metrics(answers)["confusion_matrix"]
    assert matrix["labels"][:2] == ["chat", "find"]
    assert [row[: len(row) - 1] for row in matrix["matrix"][:2]] == [[0, 0, 0, 1], [1, 0, 0, 0]]
