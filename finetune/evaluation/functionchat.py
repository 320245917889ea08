"""FunctionChat-Bench (Kakao, Apache-2.0): Korean requests, in the user's copy of the repository.

Calls are compared as its exact matcher does. Its other answers are judged there by GPT-4; here they count as decisions:
no call, and a question back where a value is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import ANSWER, CALL, IRRELEVANT, MISSING_PARAMETER, Item
from finetune.evaluation.scoring import json_equal
from finetune.evaluation.suite_rows import existing, make_item, read_items
from finetune.reading.row_files import decode_json

NAME = "functionchat"
SOURCE = "git clone https://github.com/kakao/FunctionChat-Bench"
PREFIX, SYSTEM_PROMPT = "FunctionChat-", "system_prompt.txt"
KINDS = {"call": CALL, "slot": MISSING_PARAMETER, "relevance": IRRELEVANT, "completion": ANSWER}


def load_items(folder: str, *, limit: int | None = None) -> list[Item]:
    """Items of the first `limit` rows (default: all) of each file of the repository, or of its folder `data`."""
    files = existing(folder, ["data"], f"{PREFIX}*.jsonl", NAME, SOURCE)
    items: list[Item] = []
    for path in files:
        part = path.stem.removeprefix(PREFIX).lower()
        if part not in READERS:
            raise UserError(f"{path}: not a part of FunctionChat-Bench that is known ({', '.join(READERS)}); remove it")
        try:  # the system prompt of the parts whose rows have none
            system = (path.parent / SYSTEM_PROMPT).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path.parent / SYSTEM_PROMPT}: cannot be read; get it with: {SOURCE}") from error
        items += read_items(path, NAME, partial(READERS[part], system), limit=limit)
    return items


def _dialog(system: str, number: int, row: dict[str, Any]) -> Iterator[Item]:
    for turn in row["turns"]:
        messages = [{"role": "system", "content": system}, *turn["query"]]
        yield _item("dialog", number, turn["type_of_output"], messages, row["tools"], turn)


def _single_call(system: str, number: int, row: dict[str, Any]) -> Iterator[Item]:
    texts = zip(row["query"], row["ground_truth"], row["acceptable_arguments"], strict=True)
    for query, truth, accepted in texts:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": query["content"]}]
        answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": json.loads(truth["content"])}]}
        fields = {"ground_truth": answer, "acceptable_arguments": accepted["content"]}
        for tools in row["tools"]:
            yield _item(f"singlecall_{tools['type']}", number, "call", messages, tools["content"], fields)


def _call_decision(_: str, number: int, row: dict[str, Any]) -> Iterator[Item]:
    yield _item("calldecision", number, row["type_of_output"], row["input_messages"], row["input_tools"], row)


READERS = {"dialog": _dialog, "singlecall": _single_call, "calldecision": _call_decision}


def _item(part: str, number: int, output: str, messages: Any, tools: Any, fields: dict[str, Any]) -> Item:
    accepted = _accepted(fields.get("acceptable_arguments"))
    truth = {"accepted": accepted} if accepted else None
    return make_item(
        f"{NAME}:{part}", number, KINDS[output], messages, tools, fields["ground_truth"], category=part, truth=truth
    )


def _accepted(value: Any) -> dict[str, list[Any]]:
    """Further values of arguments; a sentence in their place ("Only ground truth is allowed.") allows none."""
    for _ in range(2):  # some are encoded twice
        if isinstance(value, str):
            try:
                value = decode_json(value, "acceptable_arguments")
            except ValueError:
                return {}
    if not isinstance(value, dict):
        return {}
    return {name: values if isinstance(values, list) else [values] for name, values in value.items()}


def verdict(item: Item, made: list[dict], errors: list[str], ours: dict[str, Any]) -> dict[str, bool]:
    """`functionchat_valid`: the first call has the expected name and arguments, or values listed as acceptable.

    Only where a call is expected. Texts are compared without spaces and case.
    """
    if item.kind != CALL:
        return {}
    (expected,) = item.expected_calls[:1]
    accepted = (item.truth or {}).get("accepted", {})
    valid = bool(made) and made[0]["name"] == expected["name"]
    if valid:
        arguments, wanted = made[0]["arguments"], expected["arguments"]
        valid = arguments.keys() == wanted.keys() and all(
            any(_same(arguments[name], one) for one in (value, *accepted.get(name, ())))
            for name, value in wanted.items()
        )
    return {"functionchat_valid": valid}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, str) and isinstance(right, str):
        return left.replace(" ", "").lower() == right.replace(" ", "").lower()
    return json_equal(left, right)
