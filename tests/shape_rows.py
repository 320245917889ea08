"""One small row of each shape, with the answers that are trained: shared by the tests and the table in docs/data.md."""

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


def docs_table() -> str:
    """The table of docs/data.md."""
    lines = ["| shape | written by | columns | example | read |", "| --- | --- | --- | --- | --- |"]
    for shape in SHAPES:
        row = EXAMPLES[shape.name][0]
        read = describe(row).split(": ", 1)[1]
        example = json.dumps(row, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {shape.name} | {shape.writers} | {shape.columns} | `{example}` | {read} |")
    return "\n".join(lines) + "\n"
