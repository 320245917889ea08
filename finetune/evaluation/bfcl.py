"""The Berkeley Function Calling Leaderboard's single-turn rows, judged by the leaderboard's own checker.

Data and checker come from the package bfcl-eval (Apache-2.0), installed with --no-deps: the checker itself needs only
the standard library, once the module that lists every vendor's client is replaced by an empty one.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, IRRELEVANT, Item
from finetune.reading.tool_schemas import normalize_tools

WITH_ANSWERS = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "live_simple",
    "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
WITHOUT_CALL = ("irrelevance", "live_irrelevance")
CATEGORIES = (*WITH_ANSWERS, *WITHOUT_CALL)


def data_folder() -> Path:
    """Where the package keeps its rows; UserError when it is not installed."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None:
        raise UserError("--suite bfcl needs the package bfcl-eval; run: pip install --no-deps bfcl-eval==2026.3.23")
    return Path(spec.submodule_search_locations[0]) / "data"


def parse_suite(suite: str) -> list[str]:
    """`bfcl:simple_python,multiple` -> categories; plain `bfcl` means all of them."""
    kind, _, names = suite.partition(":")
    if kind != "bfcl":
        raise UserError(f"--suite {suite}: the only suite is bfcl, for instance bfcl:simple_python,multiple")
    categories = [name.strip() for name in names.split(",") if name.strip()] or list(CATEGORIES)
    for name in categories:
        if name not in CATEGORIES:
            raise UserError(f"--suite {suite}: no category {name!r}; there are {', '.join(CATEGORIES)}")
    return categories


def load_items(categories: list[str], *, limit: int | None = None) -> list[Item]:
    """Items of the given categories (of the first `limit` rows of each)."""
    items = []
    for category in categories:
        rows = _read_lines(data_folder() / f"BFCL_v4_{category}.json")
        answers = {}
        if category in WITH_ANSWERS:
            path = data_folder() / "possible_answer" / f"BFCL_v4_{category}.json"
            answers = {row["id"]: row["ground_truth"] for row in _read_lines(path)}
        for number, row in enumerate(rows[:limit], 1):
            possible = answers.get(row["id"])
            items.append(
                Item(
                    source=f"bfcl:{category}",
                    row=number,
                    turn=len(row["question"][0]),
                    kind=CALL if possible is not None else IRRELEVANT,
                    messages=row["question"][0],
                    tools=normalize_tools(row["function"]),
                    expected_calls=[first_answer(call) for call in possible or []],
                    possible_answers=possible,
                    category=category,
                )
            )
    return items


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def first_answer(possible: dict[str, dict[str, list]]) -> dict[str, Any]:
    """One call that is right: the first allowed value of every argument; those that may be left out first are."""
    ((name, arguments),) = possible.items()
    return {"name": name, "arguments": {k: _first(v) for k, v in arguments.items() if v and v[0] != ""}}


def _first(allowed: list) -> Any:
    value = allowed[0]
    if isinstance(value, dict):  # each key has allowed values of its own; what is deeper is meant literally
        return {key: inner[0] for key, inner in value.items() if inner and inner[0] != ""}
    if isinstance(value, list):
        return [_first([element]) for element in value]
    return value


def verdict(item: Item, made: list[dict], errors: list[str], ours: dict[str, Any]) -> dict[str, bool]:
    """`bfcl_valid`, the leaderboard's own verdict, and `bfcl_agrees`, whether our verdict is the same.

    Where no call is right the leaderboard only asks that none can be read, so that text with a broken call passes.
    """
    if item.possible_answers is None:
        valid, own = not made, ours["no_call_correct"]
    else:
        valid, own = not errors and check(item, made), ours["arguments_correct"]
    return {"bfcl_valid": valid, "bfcl_agrees": valid == own}


def check(item: Item, made: list[dict]) -> bool:
    """The verdict of BFCL's AST checker on calls ({"name", "arguments"}) for a row with possible answers."""
    ast_checker, language = _checker()
    languages = {"simple_java": language.JAVA, "simple_javascript": language.JAVASCRIPT}
    result = ast_checker(
        _functions_of(item),
        [{call["name"]: call["arguments"]} for call in made],
        item.possible_answers,
        languages.get(item.category, language.PYTHON),
        item.category,
        "any",
    )
    return bool(result["valid"])


_rows: dict[str, list[dict[str, Any]]] = {}


def _functions_of(item: Item) -> list[dict[str, Any]]:
    """The functions as BFCL writes them: its checker wants its own names of types."""
    if item.category not in _rows:
        _rows[item.category] = _read_lines(data_folder() / f"BFCL_v4_{item.category}.json")
    return _rows[item.category][item.row - 1]["function"]


def _checker():
    name = "bfcl_eval.constants.model_config"
    if name not in sys.modules:
        config = types.ModuleType(name)
        # The checker asks each model's entry for one thing: whether its dots in names became underscores.
        config.MODEL_CONFIG_MAPPING = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
        sys.modules[name] = config
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    return ast_checker, Language
