"""Hand-written requests for tools that are not ours, as rows for evaluate_lora.py.

python benchmarks/natural_rows.py bfcl_file_system TOOLS.json natural.jsonl
python benchmarks/natural_rows.py mcp_git TOOLS.json natural.jsonl

The requests are in natural_requests.json; the generator of rows has never seen them. Sets: `bfcl_file_system` (tools:
bfcl_eval/data/multi_turn_func_doc/gorilla_file_system.json of the package bfcl-eval) and `mcp_git` (tools: the list of
the reference server mcp-server-git).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune.files import json_lines, write_text_atomic
from finetune.reading.tool_schemas import load_tools_file

# What an answer without a call is; evaluate_lora.py scores only that no call is made and whether a question is asked.
TEXTS = {"ask": ("missing_parameter", "Which one?"), "none": ("irrelevant", "Sorry, I have no tool for that.")}


def main(name: str, tools_file: str, output: str) -> None:
    requests = json.loads(Path(__file__).with_name("natural_requests.json").read_text(encoding="utf-8"))[name]
    tools = load_tools_file(tools_file)
    rows = []
    for text, expected in requests:
        row = {"messages": [{"role": "user", "content": text}], "tools": tools}
        if isinstance(expected, str):
            row["category"], answer = TEXTS[expected]
            row["messages"].append({"role": "assistant", "content": answer})
        else:
            calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in expected.items()]
            row["messages"].append({"role": "assistant", "tool_calls": calls})
        rows.append(row)
    write_text_atomic(Path(output), json_lines(rows))
    print(f"{output}: {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
