"""Rows that log a request and its response, as APIs, proxies and tracing tools write them."""

from __future__ import annotations

import json

import pytest

from finetune.reading.conversations import RowError, normalize_row
from finetune.reading.shapes import describe
from tests.rows import LAMP, WRAPPED, calls

ASKS = {"role": "user", "content": "Dim it"}
CALLS = {"id": "c", "type": "function", "function": {"name": "set_lamp", "arguments": '{"room": "hall"}'}}
ANSWER = {"role": "assistant", "content": None, "tool_calls": [CALLS]}
CHAT = {"model": "m", "messages": [ASKS], "tools": [WRAPPED]}
COMPLETION = {"id": "x", "choices": [{"index": 0, "message": ANSWER}], "usage": {"total_tokens": 5}}
CLAUDE = {"system": "Brief.", "messages": [ASKS], "tools": [{"name": "set_lamp", "input_schema": LAMP["parameters"]}]}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "set_lamp", "input": {"room": "hall"}}]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "Dim it"}]}], "tools": [{"functionDeclarations": [LAMP]}]}
CANDIDATE = {"role": "model", "parts": [{"functionCall": {"name": "set_lamp", "args": {"room": "hall"}}}]}
ITEM = {"type": "function_call", "call_id": "c", "name": "set_lamp", "arguments": '{"room": "hall"}'}
TOOL_USE = {"toolUse": {"toolUseId": "t", "name": "set_lamp", "input": {"room": "hall"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"request": CHAT, "response": COMPLETION},
        {"request": json.dumps(CHAT), "response": json.dumps(COMPLETION)},
        {"request": {"url": "/v1", "body": CHAT}, "response": {"status_code": 200, "body": COMPLETION}},
        {"input": CHAT, "output": COMPLETION},
        {"request": CHAT, "result": {"messages": [ASKS]}, "response": json.dumps(COMPLETION), "question": "Dim it"},
        {"kwargs": CHAT, "output": ANSWER},
        {"inputs": CHAT, "outputs": ANSWER, "metadata": {}},
        {**CHAT, "choices": COMPLETION["choices"]},
        {**CHAT, "response": COMPLETION},
        {"request": CLAUDE, "response": USE},
        {"request": GEMINI, "response": {"candidates": [{"content": CANDIDATE, "finishReason": "STOP"}]}},
        {**GEMINI, "candidates": [{"content": CANDIDATE}]},
        {"input": {"messages": [ASKS], "toolConfig": {"tools": [{"toolSpec": LAMP}]}},
         "output": {"message": {"role": "assistant", "content": [TOOL_USE]}}},
        {"request": {"instructions": "Brief.", "input": "Dim it", "tools": [LAMP]}, "response": {"output": [ITEM]}},
    ],
)  # fmt: skip
def test_request_and_response(row):
    made = normalize_row(row)
    *_, asks, answer = made["messages"]
    assert asks == ASKS
    assert calls(answer) == [("set_lamp", {"room": "hall"})]
    assert made["tools"][0]["function"]["name"] == "set_lamp"
    if "request" in row and "Brief." in str(row):
        assert made["messages"][0] == {"role": "system", "content": "Brief."}


def serialized(content: str, name: str) -> dict:
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", name], "kwargs": {"content": content}}


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"messages": [{"type": "human", "content": "q"}]}, {"messages": [{"type": "ai", "content": "a"}]}),
        ({"question": "q"}, {"answer": "a"}),
        ({"input": "q"}, {"output": "a"}),
        ({"messages": [[serialized("q", "HumanMessage")]]},
         {"generations": [[{"text": "a", "message": serialized("a", "AIMessage")}]]}),
    ],
)  # fmt: skip
def test_langsmith_runs(inputs, outputs):
    row = {"id": 7, "inputs": inputs, "outputs": outputs}
    assert [m["content"] for m in normalize_row(row)["messages"]] == ["q", "a"]
    assert describe(row).endswith("; not read: id")


def test_parts_of_a_log_are_named():
    assert describe({"request": CHAT, "response": COMPLETION}) == (
        "messages and answer column: request.messages -> messages, request.tools -> tools, response -> completion; "
        "not read: request.model"
    )


def test_objects_beside_a_prompt_stay_columns():
    """Only a row that asks nowhere else is a log."""
    row = {"instruction": "i", "input": {"question": "q"}, "output": "o"}
    with pytest.raises(RowError, match="the context is a JSON object"):
        normalize_row(row)
