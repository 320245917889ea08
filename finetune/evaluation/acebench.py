"""ACEBench (MIT): calls, and requests whose calls lack or misstate a value, in the user's copy of the repository.

Its agent rows need a second model as user and are not read. It asks for calls and refusals in a notation of its own,
given in a system prompt; here the model's own format is asked for, so that the scores are not those of its leaderboard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, IRRELEVANT, MISSING_PARAMETER, Item
from finetune.evaluation.scoring import json_equal, normalized
from finetune.evaluation.suite_rows import existing, make_item, read_answers, read_items
from finetune.reading.answer_shapes import calling
from finetune.reading.row_files import RowError

NAME = "acebench"
SOURCE = "git clone https://github.com/ACEBench/ACEBench"
PLACES = ("data_all/data_en", "data_en")  # the Chinese rows: name the folder data_all/data_zh
KINDS = {"normal": CALL, "special_irrelevant": IRRELEVANT, "special": MISSING_PARAMETER}  # by the start of the name
_SPEAKER = re.compile(r"^(user|system|assistant) ?: ?", re.MULTILINE)
_ROLES = {"user": "user", "system": "assistant", "assistant": "assistant"}  # the answering side is called system


def load_items(folder: str, *, limit: int | None = None) -> list[Item]:
    """Items of the first `limit` rows (default: all) of each normal and special category."""
    items: list[Item] = []
    for path in existing(folder, PLACES, "data_*.json", NAME, SOURCE):
        category = path.stem.removeprefix("data_")
        if category.startswith("agent_"):
            continue
        kind = next((KINDS[start] for start in KINDS if category.startswith(start)), None)
        if kind is None:
            raise UserError(f"{path}: not a part of ACEBench that is known ({', '.join(KINDS)}); remove it")
        answers = read_answers(existing(str(path.parent / "possible_answer"), (), path.name, NAME, SOURCE)[0], NAME)
        items += read_items(path, NAME, partial(_items, category, kind, answers), limit=limit)
    return items


def _items(category: str, kind: str, answers: dict[str, Any], number: int, row: dict[str, Any]) -> Iterator[Item]:
    truth = answers[row["id"]]
    facts = "\n\n".join(str(row[name]) for name in ("time", "profile") if row.get(name))
    messages = [{"role": "system", "content": facts}] * bool(facts) + _turns(row["question"])
    tools = [_tool(function) for function in row["function"]]
    answer, alternatives = None, None
    if kind == CALL:
        declared = {tool["name"] for tool in tools}
        alternatives = [_calls(one, declared) for one in (truth if isinstance(truth, list) else [truth])]
        answer = calling([{"name": name, "arguments": arguments} for name, arguments in alternatives[0]])
    source = f"{NAME}:{category}"
    yield make_item(source, number, kind, messages, tools, answer, category=category, truth=alternatives)


def _turns(text: str) -> list[dict[str, str]]:
    """The messages of `user: …\\nsystem: …\\nuser: …`."""
    before, *parts = _SPEAKER.split(text)
    if before.strip() or parts[:1] != ["user"] or parts[-2] != "user":
        raise RowError("question does not begin and end with user:")
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    parameters = next((function[key] for key in ("parameters", "arguments", "_arguments") if function.get(key)), {})
    return {"name": function["name"], "description": function.get("description", ""), "parameters": parameters}


def _calls(truth: dict[str, Any], declared: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments); further calls of one tool are numbered: `name_1`, `name_2`."""
    return [(name if name in declared else re.sub(r"_\d+$", "", name), dict(arguments or {}))
            for name, arguments in truth.items()]  # fmt: skip


def verdict(item: Item, made: list[dict], errors: list[str], ours: dict[str, Any]) -> dict[str, bool]:
    """`acebench_valid`, only where calls are expected.

    ACEBench's checker compares only the types of numbers and booleans; here they must be equal.
    """
    if item.kind != CALL:
        return {}
    return {"acebench_valid": not errors and any(_matches(made, calls, item.tools) for calls in item.truth)}


def _matches(made: list[dict], expected: list[tuple[str, dict]], tools: list[dict]) -> bool:
    """The same tools as often, and for each expected call one made call with its arguments."""
    required = {tool["function"]["name"]: tool["function"].get("parameters", {}).get("required", []) for tool in tools}
    if Counter(call["name"] for call in made) != Counter(name for name, _ in expected):
        return False
    return all(
        any(
            call["name"] == name and _arguments_match(call["arguments"], wanted, required.get(name, []))
            for call in made
        )
        for name, wanted in expected
    )


def _arguments_match(made: dict[str, Any], wanted: dict[str, Any], required: list[str]) -> bool:
    """Arguments that are not required may be omitted, but not all of them."""
    if wanted and not made:
        return False
    return all(name in made for name in required) and all(
        name in wanted and _value_matches(value, wanted[name]) for name, value in made.items()
    )


def _value_matches(made: Any, wanted: Any) -> bool:
    """A text must contain the expected one, apart from case, spaces and the punctuation , . / - _ * ^"""
    if isinstance(wanted, str) and isinstance(made, str):
        return normalized(wanted) in normalized(made)
    if isinstance(wanted, dict) and isinstance(made, dict):
        return made.keys() == wanted.keys() and all(_value_matches(made[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list) and isinstance(made, list):
        return len(made) == len(wanted) and all(map(_value_matches, made, wanted))
    return json_equal(made, wanted)
