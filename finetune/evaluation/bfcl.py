"""The Berkeley Function Calling Leaderboard's rows, checked by the leaderboard's own checker.

Data and checker come from the package bfcl-eval (Apache-2.0), installed with --no-deps: the checker needs only the
standard library once `bfcl_eval.constants.model_config`, which imports every vendor's client, is replaced.
"""

from __future__ import annotations

import collections
import importlib.util
import sys
import types
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from finetune.errors import UserError, require
from finetune.evaluation.items import CALL, IRRELEVANT, Item
from finetune.evaluation.suite_rows import read_answers, read_items
from finetune.reading.row_files import json_lines
from finetune.reading.tool_schemas import normalize_tools

WITH_ANSWERS = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "live_simple",
    "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
WITHOUT_CALL = ("irrelevance", "live_irrelevance")
CATEGORIES = (*WITH_ANSWERS, *WITHOUT_CALL)
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


def data_folder() -> Path:
    """The package's folder of rows; UserError when the package is not installed."""
    require("--suite bfcl", "bfcl_eval")
    spec = importlib.util.find_spec("bfcl_eval")
    return Path(spec.submodule_search_locations[0]) / "data"


def parse_categories(names: str) -> list[str]:
    """`simple_python,multiple` -> categories; "" means all but those of several turns, which take hours."""
    categories = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip())) or list(CATEGORIES)
    for name in categories:
        if name not in (*CATEGORIES, *MULTI_TURN):
            choices = ", ".join((*CATEGORIES, *MULTI_TURN))
            raise UserError(f"--suite bfcl:{names}: no category {name!r}; choose from {choices}")
    return categories


def load_items(names: str, *, limit: int | None = None) -> list[Item]:
    """Items of the first `limit` rows of each category in `names` (default: all rows)."""
    items = []
    for category in parse_categories(names):
        if category in MULTI_TURN:
            items += _multi_turn_items(category, limit)
            continue
        answers = None
        if category in WITH_ANSWERS:
            answers = read_answers(data_folder() / "possible_answer" / f"BFCL_v4_{category}.json", "bfcl")
        items += read_items(_rows_file(category), "bfcl", partial(_items, category, answers), limit=limit)
    return items


def _items(category: str, answers: dict[str, Any] | None, number: int, row: dict[str, Any]) -> Iterator[Item]:
    possible = None if answers is None else answers[row["id"]]
    yield Item(
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


def _multi_turn_items(category: str, limit: int | None) -> list[Item]:
    folder = data_folder()
    from finetune.evaluation.bfcl_multi_turn import item_of

    answers = read_answers(folder / "possible_answer" / f"BFCL_v4_{category}.json", "bfcl")

    def make(number: int, row: dict[str, Any]) -> Iterator[Item]:
        yield item_of(row, answers[row["id"]], number, category, folder)

    return read_items(_rows_file(category), "bfcl", make, limit=limit)


def _rows_file(category: str) -> Path:
    return data_folder() / f"BFCL_v4_{category}.json"


@cache
def _functions(category: str) -> dict[int, list[dict[str, Any]]]:
    """The tools of each row, by its number, with BFCL's own names of types."""
    return {number: row["function"] for number, row in json_lines(_rows_file(category))}


def first_answer(possible: dict[str, dict[str, list]]) -> dict[str, Any]:
    """One correct call: the first allowed value of every argument; an argument whose first value is "" is omitted."""
    ((name, arguments),) = possible.items()
    return {"name": name, "arguments": {k: _first(v) for k, v in arguments.items() if v and v[0] != ""}}


def _first(allowed: list) -> Any:
    value = allowed[0]
    if isinstance(value, dict):  # each key has a list of allowed values; deeper values are literal
        return {key: inner[0] for key, inner in value.items() if inner and inner[0] != ""}
    if isinstance(value, list):
        return [_first([element]) for element in value]
    return value


def verdict(item: Item, made: list[dict], errors: list[str], ours: dict[str, Any]) -> dict[str, bool]:
    """`bfcl_valid`, the leaderboard's verdict, and `bfcl_agrees`, whether our verdict is the same.

    Where no call is expected the leaderboard accepts any text without a readable call, even with a broken one.
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
        _functions(item.category)[item.row],
        [{call["name"]: call["arguments"]} for call in made],
        item.possible_answers,
        languages.get(item.category, language.PYTHON),
        item.category,
        "any",
    )
    return bool(result["valid"])


def _checker():
    name = "bfcl_eval.constants.model_config"
    if name not in sys.modules:
        config = types.ModuleType(name)
        # The checker reads only whether a model writes underscores for the dots in names.
        config.MODEL_CONFIG_MAPPING = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
        sys.modules[name] = config
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    return ast_checker, Language
