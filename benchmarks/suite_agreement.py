"""How often our verdicts on right and spoiled calls equal those of a suite's own code, run from its repository.

python benchmarks/suite_agreement.py acebench ACEBench
python benchmarks/suite_agreement.py functionchat FunctionChat-Bench
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.evaluation.items import CALL, Item
from finetune.evaluation.suites import load_suite, suite_verdict


@cache
def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def variants(calls: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """(what was changed, calls): the expected calls and spoiled ones."""
    arguments = calls[0]["arguments"]

    def changed(**new: Any) -> list[dict]:
        kept = {name: value for name, value in (arguments | new).items() if value is not None}
        return [{"name": calls[0]["name"], "arguments": kept}, *calls[1:]]

    yield "as expected", calls
    yield "no call", []
    yield "a call twice", [*calls, calls[0]]
    yield "another tool", [calls[0] | {"name": calls[0]["name"] + "x"}, *calls[1:]]
    yield "one more argument", changed(zzz=1)
    for name, value in list(arguments.items())[:2]:
        yield "an argument missing", changed(**{name: None})
        if isinstance(value, str):
            yield "upper case and a full stop", changed(**{name: value.upper() + " ."})
            yield "another text", changed(**{name: f"no {value[:-1]}qq"})
        elif isinstance(value, bool):
            yield "the other boolean", changed(**{name: not value})
        elif isinstance(value, int | float):
            yield "another number", changed(**{name: value + 1})
        elif isinstance(value, list):
            yield "the last element missing", changed(**{name: value[:-1]})
        elif isinstance(value, dict) and value:
            yield "a key missing", changed(**{name: dict(list(value.items())[1:])})


def acebench(folder: Path) -> Callable[[Item, list[dict]], bool]:
    """The verdict of ACEBench's checker on the English rows."""
    sys.path.insert(0, str(folder))
    from model_eval.checker import normal_checker

    data = folder / "data_all" / "data_en"

    def theirs(item: Item, made: list[dict]) -> bool:
        row = rows_of(data / f"data_{item.category}.json")[item.row - 1]
        answers = {
            one["id"]: one["ground_truth"] for one in rows_of(data / f"possible_answer/data_{item.category}.json")
        }
        truth = answers[row["id"]]
        calls = [{call["name"]: call["arguments"]} for call in made]
        return any(
            normal_checker(row["function"], copy.deepcopy(calls), copy.deepcopy(one), row["question"], item.category)[
                "valid"
            ]
            for one in (truth if isinstance(truth, list) else [truth])
        )

    return theirs


def functionchat(folder: Path) -> Callable[[Item, list[dict]], bool]:
    """The verdict of FunctionChat-Bench's exact matcher: the method alone, since its module imports OpenAI's client."""
    source = ast.parse((folder / "src" / "evaluation_handler.py").read_text("utf-8"))
    (handler,) = [node for node in source.body if isinstance(node, ast.ClassDef)]
    names = ("compare_arguments",)
    handler.body = [node for node in handler.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"json": json}
    exec(compile(ast.Module([handler], []), "evaluation_handler", "exec"), space)  # noqa: S102  the suite's own code
    matcher = space[handler.name]()

    def theirs(item: Item, made: list[dict]) -> bool:
        expected = item.expected_calls[0]
        if not made or made[0]["name"] != expected["name"]:
            return False
        given = (item.truth or {}).get("accepted", {})
        both = (json.dumps(one["arguments"]) for one in (expected, made[0]))
        return matcher.compare_arguments(*both, {name: one[0] if len(one) == 1 else one for name, one in given.items()})

    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("acebench", "functionchat"))
    parser.add_argument("folder", type=Path, help="a copy of the suite's repository")
    args = parser.parse_args()
    theirs = {"acebench": acebench, "functionchat": functionchat}[args.suite](args.folder)
    counts: dict[str, Counter] = defaultdict(Counter)
    for item in load_suite(f"{args.suite}:{args.folder}"):
        if item.kind == CALL:
            for name, made in variants(item.expected_calls):
                ours = suite_verdict(item, made, [], {})[f"{args.suite}_valid"]
                counts[name][ours, theirs(item, made)] += 1
    print("| answer | number | both accept | both refuse | we alone accept | they alone accept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, found in counts.items():
        kinds = ((True, True), (False, False), (True, False), (False, True))
        print(f"| {name} | {found.total()} | {' | '.join(str(found[kind]) for kind in kinds)} |")


if __name__ == "__main__":
    main()
