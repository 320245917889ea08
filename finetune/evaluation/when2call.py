"""When2Call (NVIDIA, Apache-2.0): call, ask back or decline; a file of the user's copy, or the Hub data set.

Each row has one answer of each kind, so that a model can also choose by likelihood (`--decisions`), as the benchmark's
multiple-choice task does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, IRRELEVANT, MISSING_PARAMETER, Item, Option
from finetune.evaluation.suite_rows import items_of_rows, make_item
from finetune.reading.answer_shapes import calling
from finetune.reading.row_files import RowError, decode_json
from finetune.reading.sources import parse_spec, read_rows

NAME = "when2call"
SOURCE = "git clone https://github.com/NVIDIA/When2Call (data/test/when2call_test_mcq.jsonl)"
KINDS = {"tool_call": CALL, "request_for_info": MISSING_PARAMETER, "cannot_answer": IRRELEVANT, "direct": IRRELEVANT}


def load_items(file: str, *, limit: int | None = None) -> list[Item]:
    """Items of the first `limit` rows (default: all) of a file, or of a Hub data set (org/name:config@split)."""
    if not file:
        raise UserError(f"--suite {NAME} needs a file: {NAME}:FILE; get it with: {SOURCE}")
    try:
        rows = read_rows(parse_spec(file))
    except UserError as error:
        raise UserError(f"--suite {NAME}:{file}: {error}; get it with: {SOURCE}") from error
    return items_of_rows(rows, NAME, _items, limit=limit)


def _items(number: int, row: dict[str, Any]) -> Iterator[Item]:
    answers = decode_json(row["answers"], "answers")
    correct = row["correct_answer"]
    options = []
    for name, text in answers.items():
        if name not in KINDS:
            raise RowError(f"unknown kind of answer {name!r}")
        if text is None:  # a column that another kind of rows has
            continue
        is_call = KINDS[name] == CALL
        call = decode_json(text, name) if is_call else None
        if is_call and not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            raise RowError(f"answer {name!r} is not a call with a name")
        if not is_call and not isinstance(text, str):
            raise RowError(f"answer {name!r} is not a text")
        options.append(Option(name, [call] if is_call else [], "" if is_call else text, name == correct))
    right = next((option for option in options if option.is_expected), None)
    if right is None:
        raise RowError(f"correct_answer {correct!r} is none of its answers")
    if right.calls:
        answer = calling(right.calls)
    else:
        answer = {"role": "assistant", "content": right.text}
    messages = [{"role": "user", "content": row["question"]}]
    yield make_item(NAME, number, KINDS[correct], messages, row["tools"], answer, options=options)
