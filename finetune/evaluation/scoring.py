"""Verdicts on one answer: calls against expected calls and their tools' schemas, text against the expected text."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any

from finetune.evaluation.items import CALL, QUESTION, Item
from finetune.evaluation.text_scores import exact_match, quality_ok, rouge_l, token_f1
from finetune.json_schema import ToolSchemas

NO_CALL = "(no call)"
UNDECLARED = "(undeclared tool)"
BROKEN = "(broken call)"


def json_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: 7 == 7.0, but "7" != 7 and true != 1; the order of an object's keys does not count."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == right
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(json_equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    return left == right


def leaves(arguments: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, value) of every value that holds no other; an empty object or list is a leaf."""
    if not isinstance(arguments, dict | list) or not arguments:
        yield path, arguments
        return
    inner = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
    for key, value in inner:
        yield from leaves(value, (*path, key))


def common_leaves(expected: dict[str, Any], made: dict[str, Any]) -> int:
    """Number of argument leaves with the same path and an equal value."""
    wanted = dict(leaves(expected))
    return sum(path in wanted and json_equal(wanted[path], value) for path, value in leaves(made) if path)


def count_leaves(arguments: dict[str, Any]) -> int:
    """Number of argument leaves of a call; 0 without arguments."""
    return sum(1 for path, _ in leaves(arguments) if path)


def pair_calls(expected: list[dict], made: list[dict]) -> list[tuple[int | None, int | None]]:
    """Pair expected and made calls of one turn: same name first, most equal arguments first, the rest in order.

    Parallel calls have no order. Returns indices into the two lists; None where a call has no partner.
    """
    candidates = sorted(
        (
            (-common_leaves(a["arguments"], b["arguments"]), not json_equal(a["arguments"], b["arguments"]), i, j)
            for i, a in enumerate(expected)
            for j, b in enumerate(made)
            if a["name"] == b["name"]
        ),
    )
    pairs: list[tuple[int | None, int | None]] = []
    left, right = dict.fromkeys(range(len(expected))), dict.fromkeys(range(len(made)))
    for _, _, i, j in candidates:
        if i in left and j in right:
            del left[i], right[j]
            pairs.append((i, j))
    return pairs + list(itertools.zip_longest(left, right))


def score(item: Item, text: str, parsed_calls: list[dict], parse_errors: list[str]) -> dict[str, Any]:
    """The verdicts that apply to the item's kind; docs/metrics.md defines them."""
    verdicts: dict[str, Any] = {"called": bool(parsed_calls or parse_errors)}
    if item.kind != QUESTION:
        verdicts |= _call_verdicts(item, parsed_calls, parse_errors)
    if item.kind != CALL and item.expected_text is not None:
        verdicts["exact_match"] = exact_match(item.expected_text, text)
        verdicts["token_f1"] = token_f1(item.expected_text, text)
        verdicts["rouge_l"] = rouge_l(item.expected_text, text)
    if item.kind == QUESTION:
        verdicts["quality_ok"] = quality_ok(text)
    return verdicts


def _call_verdicts(item: Item, made: list[dict], errors: list[str]) -> dict[str, Any]:
    schemas = ToolSchemas(item.tools)
    declared = [call for call in made if call["name"] in schemas.parameters]
    unknown = [f"{call['name']}: {path}" for call in declared for path in schemas.unknown_arguments(call)]
    undeclared = [call["name"] for call in made if call["name"] not in schemas.parameters]
    verdicts: dict[str, Any] = {}
    if item.tools:
        verdicts = {
            "hallucinated": bool(undeclared or unknown),
            "hallucinated_tools": undeclared,
            "hallucinated_arguments": unknown,
        }
    if item.kind != CALL:
        return verdicts | {"no_call_correct": not (made or errors)}

    expected = item.expected_calls
    pairs = pair_calls(expected, made)
    matched = [(expected[i], made[j]) for i, j in pairs if i is not None and j is not None]
    same_names = not errors and len(expected) == len(made) and all(a["name"] == b["name"] for a, b in matched)
    unknown = any(call["arguments"] is None for call in expected)
    if item.possible_answers is None:
        same_arguments = all(json_equal(a["arguments"], b["arguments"]) for a, b in matched)
    else:
        same_arguments = matches_possible_answers(made, item.possible_answers, item.tools)
    if item.tools:
        valid = all(schemas.is_valid(call) is not False for call in declared)
        verdicts["schema_valid"] = bool(made) and not errors and not undeclared and valid
    return verdicts | {
        "json_valid": bool(made) and not errors,
        "name_correct": same_names,
        "arguments_correct": None if unknown else same_names and same_arguments,
        "parallel": len(expected) > 1,
        "step": _step(item),
        "arguments_known": not unknown,
        "arguments_expected": sum(count_leaves(call["arguments"]) for call in expected),
        "arguments_made": sum(count_leaves(call["arguments"]) for call in made),
        "arguments_matched": sum(
            common_leaves(a["arguments"], b["arguments"]) for a, b in matched if a["name"] == b["name"]
        ),
    }


def confusion_pairs(
    item: Item, made: list[dict], broken: int = 0, known: Collection[str] = ()
) -> list[tuple[str, str]]:
    """(expected, made) tool names of one request; NO_CALL where a side has none, UNDECLARED for invented tools.

    broken  number of calls that could not be read; they are paired last, as calls of BROKEN
    known   the tools of a request that declares none, because its text describes them
    """
    names = {one["name"] for one in [tool["function"] for tool in item.tools] or item.expected_calls}
    names.update(() if item.tools else known)
    made_names = [call["name"] if call["name"] in names else UNDECLARED for call in made] + [BROKEN] * broken
    made = made + [{"name": BROKEN, "arguments": {}}] * broken
    if not item.expected_calls and not made:
        return [(NO_CALL, NO_CALL)]
    return [
        (NO_CALL if i is None else item.expected_calls[i]["name"], NO_CALL if j is None else made_names[j])
        for i, j in pair_calls(item.expected_calls, made)
    ]


def matches_possible_answers(made: list[dict], possible: list[dict], tools: list[dict]) -> bool:
    """Whether the made calls and BFCL's possible answers can be paired so that every call matches its answer."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    declared = {tool["function"]["name"]: tool["function"] for tool in tools}
    if len(made) != len(possible):
        return False
    matches = csr_array([[_call_matches(call, answer, declared) for call in made] for answer in possible])
    return bool((maximum_bipartite_matching(matches) >= 0).all())


def _call_matches(call: dict, answer: dict, declared: dict[str, dict]) -> bool:
    ((name, allowed),) = answer.items()
    if call["name"] != name:
        return False
    required = declared[name]["parameters"].get("required", [])
    arguments = call["arguments"]
    return (
        all(key in allowed and _any_matches(value, allowed[key]) for key, value in arguments.items())
        and all(key in arguments for key in required)
        and all(key in arguments or "" in values for key, values in allowed.items())
    )


def _any_matches(value: Any, allowed: list) -> bool:
    return any(_matches(value, choice) for choice in allowed)


def _matches(value: Any, choice: Any) -> bool:
    if isinstance(choice, dict) and isinstance(value, dict):
        return all(
            key in choice and any(_same(inner, one) for one in choice[key]) for key, inner in value.items()
        ) and all(key in value or "" in inner for key, inner in choice.items())
    if isinstance(choice, list) and isinstance(value, list):
        return len(choice) == len(value) and all(map(_matches, value, choice))
    return _same(value, choice)


def _same(value: Any, choice: Any) -> bool:
    if isinstance(choice, str) and isinstance(value, str):
        return normalized(value) == normalized(choice)
    return json_equal(value, choice)


def normalized(text: str) -> str:
    """BFCL and ACEBench ignore case, spaces, the punctuation , . / - _ * ^ and the kind of quotes."""
    return "".join(c for c in text.lower() if c not in " ,./-_*^").replace("'", '"')


def _step(item: Item) -> int:
    """Tool results since the last user message: 0 for a first call, more for the later steps of a chain."""
    after_user = itertools.takewhile(lambda message: message["role"] != "user", reversed(item.messages))
    return sum(message["role"] == "tool" for message in after_user)
