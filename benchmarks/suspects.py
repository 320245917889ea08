"""How many planted errors `evaluate_lora.py RUN --suspects N` finds: plant, train on the CPU, list, count.

python benchmarks/suspects.py plant data/samples/gennx_train.jsonl spoiled.jsonl --no_schemas     5% of the rows
python train_lora.py --config configs/demo.yaml --dataset spoiled.jsonl --save_steps 13 --name suspects
python evaluate_lora.py experiments/suspects --suspects 50
python benchmarks/suspects.py count spoiled.planted.json experiments/suspects/evaluation/suspects.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

UNITS = {"KN": "N", "N": "KN", "M": "MM", "MM": "M", "CM": "M", "TONF": "KN", "KGF": "N"}
METHODS = ("excess_margin", "margin", "excess_loss", "loss")


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, value) of every value inside objects and lists."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def put(value: Any, path: tuple, new: Any) -> None:
    """Replace the value at a path."""
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def wrong_tool(call: dict, tools: list[str], rng: random.Random) -> bool:
    call["name"] = rng.choice([name for name in tools if name != call["name"]])
    return True


def swapped_argument(call: dict, tools: list[str], rng: random.Random) -> bool:
    """Two values of one type change places."""
    found = [(path, value) for path, value in leaves(call["arguments"]) if path]
    pairs = [(a, b) for a in found for b in found if a[0] < b[0] and type(a[1]) is type(b[1]) and a[1] != b[1]]
    if not pairs:
        return False
    (first, left), (second, right) = rng.choice(pairs)
    put(call["arguments"], first, right)
    put(call["arguments"], second, left)
    return True


def wrong_unit(call: dict, tools: list[str], rng: random.Random) -> bool:
    """A number in thousandths or thousands, or the name of another unit."""
    found = [(path, value) for path, value in leaves(call["arguments"]) if path and value]
    numbers = [(path, value) for path, value in found if type(value) in (int, float)]
    units = [(path, UNITS[value.upper()]) for path, value in found if isinstance(value, str) and value.upper() in UNITS]
    if units:
        put(call["arguments"], *rng.choice(units))
    elif numbers:
        path, value = rng.choice(numbers)
        put(call["arguments"], path, value * 1000 if rng.random() < 0.5 or value < 1 else value / 1000)
    return bool(units or numbers)


def truncated(call: dict, tools: list[str], rng: random.Random) -> bool:
    """The last value is missing."""
    path, _ = list(leaves(call["arguments"]))[-1]
    if not path:
        return False
    inner = call["arguments"]
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return True


KINDS = (wrong_tool, swapped_argument, wrong_unit, truncated)


def without_schema(tool: dict) -> dict:
    """The tool with its name and description alone: a short run then takes minutes."""
    kept = {key: tool["function"][key] for key in ("name", "description") if key in tool["function"]}
    return {"type": "function", "function": kept}


def plant(source: Path, target: Path, share: float, seed: int, schemas: bool = True) -> None:
    """Write the rows with `share` of them spoiled, and which and how into `<target>.planted.json`."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    for row in () if schemas else rows:
        tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        row["tools"] = [without_schema(tool) for tool in tools]
    wanted, planted = round(share * len(rows)), {}
    for number in rng.sample(range(len(rows)), len(rows)):
        kind = KINDS[len(planted) % len(KINDS)]
        messages = rows[number]["messages"]
        following = [message["role"] for message in messages[1:]] + [""]
        # A call with a result keeps its tool: a row whose result belongs to no call is refused.
        turns = [m for m, after in zip(messages, following, strict=True) if m.get("tool_calls") and after != "tool"]
        if len(planted) == wanted or not turns:
            continue
        function = rng.choice(turns)["tool_calls"][0]["function"]
        call = {"name": function["name"], "arguments": json.loads(function["arguments"])}
        before = copy.deepcopy(call)
        tools = rows[number]["tools"]
        names = [t["function"]["name"] for t in (json.loads(tools) if isinstance(tools, str) else tools)]
        if not kind(call, names, rng) or call == before:
            continue
        function["name"] = call["name"]
        function["arguments"] = json.dumps(call["arguments"], ensure_ascii=False, separators=(",", ":"))
        planted[number + 1] = {"kind": kind.__name__, "before": before, "after": call}
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    target.with_suffix(".planted.json").write_text(json.dumps(planted, indent=1, ensure_ascii=False), "utf-8")
    print(f"{len(planted)} of {len(rows)} rows spoiled: {dict(Counter(one['kind'] for one in planted.values()))}")


def count(planted_file: Path, suspects_file: Path, top: int) -> None:
    """Recall and precision at `top` of each method, and recall of each kind of error."""
    planted = {int(row): one["kind"] for row, one in json.loads(planted_file.read_text("utf-8")).items()}
    turns = [json.loads(line) for line in suspects_file.read_text("utf-8").splitlines()]
    kinds = sorted(set(planted.values()))
    print(f"| method | found of {len(planted)} | recall at {top} | precision at {top} | " + " | ".join(kinds) + " |")
    print("| --- |" + " ---: |" * (3 + len(kinds)))
    for method in METHODS:
        listed: dict[int, None] = {}
        for turn in sorted(turns, key=lambda turn: -turn["scores"][method]):
            listed.setdefault(turn["row"])
        found = [row for row in list(listed)[:top] if row in planted]
        by_kind = Counter(planted[row] for row in found)
        shares = [f"{by_kind[kind]} of {sum(one == kind for one in planted.values())}" for kind in kinds]
        values = f"{len(found)} | {len(found) / len(planted):.2f} | {len(found) / top:.2f}"
        print(f"| {method} | {values} | {' | '.join(shares)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("source", type=Path)
    planting.add_argument("target", type=Path)
    planting.add_argument("--share", type=float, default=0.05)
    planting.add_argument("--seed", type=int, default=0)
    planting.add_argument("--no_schemas", action="store_true", help="declare names and descriptions only")
    counting = commands.add_parser("count")
    counting.add_argument("planted", type=Path)
    counting.add_argument("suspects", type=Path)
    counting.add_argument("--top", type=int, default=50)
    args = parser.parse_args()
    if args.command == "plant":
        plant(args.source, args.target, args.share, args.seed, not args.no_schemas)
    else:
        count(args.planted, args.suspects, args.top)


if __name__ == "__main__":
    main()
