"""The workloads of throughput.py: the same conversations every time, encoded by our own formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[list[int], list[int]]  # input_ids, labels
# fmt: off
WORDS = (
    "order", "ticket", "invoice", "room", "flight", "parcel", "account", "report", "beam", "node", "load", "sensor",
    "valve", "meter", "shelf", "budget", "lesson", "route", "train", "window", "garden", "tax", "kernel", "harbour",
    "pump", "ledger", "voucher", "camera", "battery", "forest", "museum", "recipe", "bridge",
)
# fmt: on
SCHEMA_TOKENS, OWN_TOKENS = 1400, 75

WORKLOADS = {
    "fixed_tools": "one tool set of 1,400 tokens in every row, 75 own tokens",
    "live_multiple": "BFCL live_multiple (351 tool sets, 1,053 requests), rows in --order group_tools",
    "live_multiple_shuffle": "BFCL live_multiple, rows in --order shuffle",
    "simple_python": "BFCL simple_python: a different tool in every row, nothing to share",
    "multi_turn": "eight turns with calls and results, a different tool set in each row",
    "short_qa": "short questions and answers of unequal length, no tools",
}


def steps_of(workload: str, tokenizer: Any, fmt: Any, steps: int, step_rows: int, seed: int = 0) -> list[list[Row]]:
    """`steps` optimizer steps of `step_rows` encoded rows."""
    rng = random.Random(f"{workload} {seed}")
    count = steps * step_rows
    if workload.startswith(("live_multiple", "simple_python")):
        return _bfcl(workload, tokenizer, fmt, steps, step_rows, seed)
    make = {"multi_turn": _multi_turn, "short_qa": _short_qa}.get(workload)
    if make is None:
        conversations = _fixed_tools(rng, count, tokenizer, fmt)
    else:
        conversations = [make(rng) for _ in range(count)]
    rows = _encode(conversations, tokenizer, fmt)
    return [rows[start : start + step_rows] for start in range(0, count, step_rows)]


def _encode(conversations, tokenizer, fmt) -> list[Row]:
    from finetune.encoding.encode import encode_conversations

    encoded = encode_conversations(conversations, tokenizer, fmt, num_proc=1, progress=False)
    if len(encoded.sequences) != len(conversations):
        raise ValueError(f"rows were lost: {encoded.report['reasons']}")
    return list(encoded.sequences)


def _bfcl(workload, tokenizer, fmt, steps, step_rows, seed) -> list[list[Row]]:
    from finetune.evaluation.bfcl import load_items
    from finetune.training.order import groups_for, steps_of_epoch

    items = load_items(workload.removesuffix("_shuffle"))
    conversations = [conversation_of(item) for item in items]
    order = "group_tools" if workload == "live_multiple" else "shuffle"
    groups = groups_for(order, conversations, range(len(conversations)))
    # The last step of an epoch holds the remaining rows; the first ones are typical.
    chosen = steps_of_epoch(len(conversations), step_rows, np.random.default_rng(seed), groups)[:steps]
    return [_encode([conversations[i] for i in step], tokenizer, fmt) for step in chosen]


def conversation_of(item: Any) -> dict[str, Any]:
    """An item of a suite with its expected calls as the answer."""
    calls = [{"type": "function", "function": call} for call in item.expected_calls]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [*item.messages, answer], "tools": item.tools}


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def _tool(rng: random.Random, number: int) -> dict[str, Any]:
    properties = {f"{rng.choice(WORDS)}_{i}": {"type": "string", "description": _words(rng, 8)} for i in range(3)}
    function = {
        "name": f"{rng.choice(WORDS)}_{number}",
        "description": _words(rng, 16),
        "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
    }
    return {"type": "function", "function": function}


def _call(rng: random.Random, tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    arguments = {name: _words(rng, 2) for name in function["parameters"]["properties"]}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _fixed_tools(rng, count, tokenizer, fmt) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    while len(tokenizer(json.dumps(tools, separators=(",", ":")))["input_ids"]) < SCHEMA_TOKENS:
        tools.append(_tool(rng, len(tools)))

    def row(words: int) -> dict[str, Any]:
        call = _call(rng, rng.choice(tools))
        messages = [
            {"role": "user", "content": _words(rng, words)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return {"messages": messages, "tools": tools}

    (alone,) = _encode([row(0)], tokenizer, fmt)
    prompt = _encode([{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}],
                       "tools": tools}], tokenizer, fmt)[0]  # fmt: skip
    own = len(alone[0]) - len(prompt[0])
    return [row(max(1, round((OWN_TOKENS - own) / 1.3)) + rng.randrange(-3, 4)) for _ in range(count)]


def _multi_turn(rng) -> dict[str, Any]:
    tools = [_tool(rng, number) for number in range(3)]
    messages: list[dict[str, Any]] = []
    for _ in range(4):
        messages += [
            {"role": "user", "content": _words(rng, 30)},
            {"role": "assistant", "content": "", "tool_calls": [_call(rng, rng.choice(tools))]},
            {"role": "tool", "content": json.dumps({"result": _words(rng, 25)})},
            {"role": "assistant", "content": _words(rng, 30)},
        ]
    return {"messages": messages, "tools": tools}


def _short_qa(rng) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": _words(rng, rng.randrange(6, 25))},
        {"role": "assistant", "content": _words(rng, rng.randrange(3, 60))},
    ]
    return {"messages": messages}


def save(path: Path, steps: list[list[Row]]) -> None:
    path.write_text(json.dumps(steps), encoding="utf-8")


def load(path: Path) -> list[list[Row]]:
    return json.loads(path.read_text(encoding="utf-8"))
