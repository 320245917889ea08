"""How the requests that are generated for a tool set are worded, and hand-written requests for two tool sets.

python benchmarks/generated_rows.py TOOLS.json
python benchmarks/generated_rows.py TOOLS.json --natural mcp_git natural.jsonl      rows for evaluate_lora.py

Tools of the sets in natural_requests.json: `bfcl_file_system` is gorilla_file_system.json in
bfcl_eval/data/multi_turn_func_doc of the package bfcl-eval, `mcp_git` the list of the MCP reference server for Git. The
generator knows none of these requests.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune.errors import one_line_errors
from finetune.files import json_lines, write_text_atomic
from finetune.reading.tool_schemas import load_tools_file
from finetune.synthetic.generate import generate
from finetune.synthetic.phrasing import read_json
from finetune.synthetic.schema_phrasing import FOLDER, own_descriptions, task_of

EXAMPLE = Path(__file__).parents[1] / "data" / "samples" / "demo_tool_schemas.json"
# Answers without a call: evaluate_lora.py scores whether a call is made and a question asked, not the words.
TEXTS = {"ask": ("missing_parameter", "Which one?"), "none": ("irrelevant", "Sorry, I have no tool for that.")}


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="?", default=EXAMPLE, help="JSON file with tool schemas")
    parser.add_argument("--per_tool", type=int, default=32)
    parser.add_argument("--natural", nargs=2, metavar=("SET", "OUTPUT"), help="write the hand-written requests instead")
    args = parser.parse_args()
    tools = load_tools_file(args.tools)
    if args.natural:
        write_text_atomic(Path(args.natural[1]), json_lines(natural_rows(args.natural[0], tools)))
        return 0
    rows = generate(tools, per_tool=args.per_tool)["train"][1]
    print(f"rows: {dict(Counter(kind for kind, _ in rows))}")
    words = read_json(FOLDER / "en.json")
    tasks = {function["name"]: task_of(function, words).lower() for function in own_descriptions(tools)}
    styles = Counter(style(row, tasks) for kind, row in rows if kind == "call")
    for name, number in styles.items():
        print(f"{name:<30}{number:>6}{number / styles.total():>8.0%}")
    own = sum(number == 1 for number in Counter(tasks.values()).values())
    print(f"tools with a description of their own: {own} of {len(tools)}")
    return 0


def style(row: dict, tasks: dict[str, str]) -> str:
    """What the request of a single call names."""
    request, answer = row["messages"][-2]["content"].lower(), row["messages"][-1]
    name = answer["tool_calls"][0]["function"]["name"]
    if re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", request):
        return "the tool's name"
    return "its description as it stands" if tasks[name] in request else "neither"


def natural_rows(name: str, tools: list[dict]) -> list[dict]:
    """The hand-written requests of a set as rows."""
    rows = []
    for text, expected in read_json(Path(__file__).with_name("natural_requests.json"))[name]:
        row = {"messages": [{"role": "user", "content": text}], "tools": json.dumps(tools)}
        if isinstance(expected, str):
            row["category"], answer = TEXTS[expected]
            row["messages"].append({"role": "assistant", "content": answer})
        else:
            calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in expected.items()]
            row["messages"].append({"role": "assistant", "tool_calls": calls})
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
