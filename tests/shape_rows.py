"""One small row of each shape, with the answers that are trained: shared by the tests and docs/shapes.md."""

from __future__ import annotations

import json
from typing import Any

from finetune.reading.shapes import SHAPES, describe

_DIM = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "dim", "arguments": {"pct": 5}}}]}
_ASKS = {"role": "user", "content": "Dim"}
CALL = ("", [("dim", {"pct": 5})])

# shape -> (row, [(text, calls) of each assistant message])
EXAMPLES: dict[str, tuple[dict[str, Any], list[tuple[str, list]]]] = {
    "OpenAI Responses": (
        {
            "input": [_ASKS, {"type": "function_call", "call_id": "c", "name": "dim", "arguments": '{"pct": 5}'}],
            "output": [
                {"type": "function_call_output", "call_id": "c", "output": "ok"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done"}]},
            ],
        },
        [CALL, ("Done", [])],
    ),
    "Gemini": (
        {
            "contents": [
                {"parts": [{"text": "Dim"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "dim", "args": {"pct": 5}}}]},
            ]
        },
        [CALL],
    ),
    "LangChain messages": (
        {
            "messages": [
                {"type": "human", "content": "Dim"},
                {"type": "ai", "content": "", "tool_calls": [{"name": "dim", "args": {"pct": 5}, "id": "c"}]},
            ]
        },
        [CALL],
    ),
    "question and answer list": (
        {"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Bye", "assistant": "See you"}]},
        [("Hello", []), ("See you", [])],
    ),
    "content blocks": (
        {
            "messages": [
                _ASKS,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "dim", "input": {"pct": 5}}]},
            ]
        },
        [CALL],
    ),
    "messages and answer column": (
        {"messages": [_ASKS], "chosen": {"role": "assistant", "content": "Done"}, "rejected": "No"},
        [("Done", [])],
    ),
    "messages": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [("Hello", [])],
    ),
    "FunctionChat dialog": ({"turns": [{"query": [_ASKS], "ground_truth": _DIM}]}, [CALL]),
    "Open WebUI export": (
        {"title": "Lamp", "chat": {"messages": [_ASKS, {"role": "assistant", "content": "Done"}]}},
        [("Done", [])],
    ),
    "Glaive chat": (
        {"chat": "USER: Dim\n\n\nASSISTANT: Done <|endoftext|>"},
        [("Done", [])],
    ),
    "BFCL": ({"question": [[_ASKS]], "ground_truth": [{"dim": {"pct": [5]}}]}, [CALL]),
    "FunctionChat SingleCall": (
        {"query": [{"serial_num": 1, "content": "Dim"}], "ground_truth": [{"serial_num": 1, "content": "{}"}]},
        [],
    ),
    "When2Call multiple choice": (
        {"question": "Dim", "answers": {"direct": "No lamp", "tool_call": "{}"}, "correct_answer": "direct"},
        [("No lamp", [])],
    ),
    "SQuAD": (
        {"context": "It is dim.", "question": "How is it?", "answers": {"text": ["dim"], "answer_start": [6]}},
        [("dim", [])],
    ),
    "APIGen/xLAM": ({"query": "Dim", "answers": '[{"name": "dim", "arguments": {"pct": 5}}]'}, [CALL]),
    "query log": ({"query": "Dim", "tool_used": "dim", "parameters": '{"pct": 5}', "response": "Done"}, [CALL]),
    "prompt and completion": ({"Question": "Hi", "Answer": "Hello"}, [("Hello", [])]),
    "question and ground truth": ({"question": "Hi", "contexts": ["Greet."], "ground_truth": "Hello"}, [("Hello", [])]),
    "conversation in chosen": (
        {"chosen": [_ASKS, {"role": "assistant", "content": "Done"}], "rejected": [_ASKS]},
        [("Done", [])],
    ),
    "User:/Assistant: text": ({"text": "User: Hi\nAssistant: Hello"}, [("Hello", [])]),
}


_TOOL = {"name": "dim", "description": "Dim a lamp", "parameters": {"type": "object", "properties": {}}}
_USED = '{"name": "dim", "arguments": {"pct": 5}}'
_DONE = {"role": "assistant", "content": "Done"}
_SAYS_AND_CALLS = [("One moment.", CALL[1]), ("Done", [])]

# (who writes such rows, row, [(text, calls) of each assistant message], names of the declared tools)
VARIANTS: list[tuple[str, Any, list[tuple[str, list]], list[str]]] = [
    (
        "ms-swift agent rows",
        {
            "tools": json.dumps([_TOOL]),
            "messages": [
                _ASKS,
                {"role": "assistant", "content": "One moment."},
                {"role": "tool_call", "content": _USED},
                {"role": "tool_response", "content": "ok"},
                _DONE,
            ],
        },
        _SAYS_AND_CALLS,
        ["dim"],
    ),
    (
        "Toucan",
        {
            "available_tools": [_TOOL],
            "messages": [
                _ASKS,
                {"role": "assistant", "content": "One moment."},
                {"role": "assistant", "content": "", "function_call": {"name": "dim", "arguments": '{"pct": 5}'}},
                {"role": "function", "name": "dim", "content": "ok"},
                _DONE,
            ],
        },
        _SAYS_AND_CALLS,
        ["dim"],
    ),
    (
        "ToolACE",
        {
            "system": f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([_TOOL])}",
            "conversations": [{"from": "user", "value": "Dim"}, {"from": "assistant", "value": "[dim(pct=5)]"}],
        },
        [CALL],
        ["dim"],
    ),
    (
        "Glaive, also as messages and in Korean",
        {
            "system": "You are a helpful assistant with access to the following functions. Use them if required -\n"
            + json.dumps(_TOOL),
            "chat": f"USER: Dim\n\n\nASSISTANT: <functioncall> {_USED} <|endoftext|>",
        },
        [CALL],
        ["dim"],
    ),
    (
        "LLaMA-Factory v1",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "Dim"}]},
                {"role": "assistant", "content": [{"type": "tool_call", "value": _USED}], "loss_weight": 1.0},
            ]
        },
        [CALL],
        [],
    ),
    (
        "Bedrock Converse",
        {
            "toolConfig": {"tools": [{"toolSpec": {"name": "dim", "inputSchema": {"json": {"type": "object"}}}}]},
            "messages": [
                {"role": "user", "content": [{"text": "Dim"}]},
                {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c", "name": "dim", "input": {"pct": 5}}}]},
            ],
        },
        [CALL],
        ["dim"],
    ),
    (
        "Harmony, gpt-oss",
        {
            "messages": [
                _ASKS,
                {"role": "assistant", "channel": "commentary", "recipient": "functions.dim", "content": '{"pct": 5}'},
            ]
        },
        [CALL],
        [],
    ),
    (
        "logs of requests and responses",
        {
            "request": {"messages": [_ASKS], "tools": [_TOOL]},
            "response": {"choices": [{"message": _DIM}]},
        },
        [CALL],
        ["dim"],
    ),
    (
        "NeMo Gym",
        {
            "responses_create_params": {
                "input": [_ASKS | {"type": "message"}],
                "tools": [{"type": "function", **_TOOL}],
            },
            "response": {
                "output": [{"type": "function_call", "call_id": "c", "name": "dim", "arguments": '{"pct": 5}'}],
                "tool_choice": "auto",
            },
            "question": "Dim",
            "reward": 1.0,
        },
        [CALL],
        ["dim"],
    ),
    (
        "OpenAI preferences",
        {
            "input": {"messages": [_ASKS], "tools": [_TOOL]},
            "preferred_output": [_DIM],
            "non_preferred_output": [{"role": "assistant", "content": "No"}],
        },
        [CALL],
        ["dim"],
    ),
    (
        "Fireworks preferences",
        {"chosen": {"messages": [_ASKS, _DONE], "tools": []}, "rejected": {"messages": [_ASKS], "tools": []}},
        [("Done", [])],
        [],
    ),
    (
        "Cohere",
        {"messages": [{"role": "User", "content": "Dim"}, {"role": "Chatbot", "content": "Done"}]},
        [("Done", [])],
        [],
    ),
    ("Vertex AI text tuning", {"input_text": "Dim", "output_text": "Done"}, [("Done", [])], []),
    (
        "full-hh-rlhf",
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Dim\n\nAssistant:", "response": " Done"},
        [("Hello", []), ("Done", [])],
        [],
    ),
    ("Bedrock evaluation", {"prompt": "Dim", "referenceResponse": "Done", "category": "lamp"}, [("Done", [])], []),
    ("LangSmith", {"inputs": {"question": "Dim"}, "outputs": {"answer": "Done"}}, [("Done", [])], []),
    (
        "verifiers",
        {"prompt": [_ASKS], "completion": [_DIM], "tool_defs": [_TOOL], "reward": 1.0},
        [CALL],
        ["dim"],
    ),
    ("tau-bench, SWE-agent", {"traj": [_ASKS, _DIM], "reward": 1.0}, [CALL], []),
    ("RAGAS", {"user_input": "Hi", "reference": "Hello", "reference_contexts": []}, [("Hello", [])], []),
    ("lists of question and answer", {"conversation": [["Hi", "Hello"]]}, [("Hello", [])], []),
    ("KTO", {"prompt": "Hi", "completion": "Hello", "label": True}, [("Hello", [])], []),
]


def docs_page() -> str:
    """docs/shapes.md; `python -m tests.shape_rows > docs/shapes.md` writes it."""
    lines = [
        "# Shapes of rows",
        "",
        "Generated by `python -m tests.shape_rows > docs/shapes.md` from `finetune/reading/shapes.py`. The first",
        "shape that fits is used, and the columns read are printed. How they become conversations: [data](data.md).",
        "",
        "## By columns",
        "",
    ]
    lines += ["| shape | written by | columns | example | read |", "| --- | --- | --- | --- | --- |"]
    for shape in SHAPES:
        row = EXAMPLES[shape.name][0]
        read = describe(row).split(": ", 1)[1]
        lines.append(f"| {shape.name} | {shape.writers} | {shape.columns} | {_code(row)} | {read} |")
    lines += ["", "## By writer", "", "| also written by | example | read |", "| --- | --- | --- |"]
    lines += [f"| {writers} | {_code(row)} | {describe(row)} |" for writers, row, _, _ in VARIANTS]
    return "\n".join(lines) + "\n"


def _code(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False).replace("|", "\\|")
    return f"`{text}`"


if __name__ == "__main__":
    print(docs_page(), end="")
