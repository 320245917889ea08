"""BFCL's rows, its checker, and how often our verdicts agree with it."""

from __future__ import annotations

import importlib.util
from copy import deepcopy

import pytest

from finetune.errors import UserError
from finetune.evaluation.bfcl import CATEGORIES, WITH_ANSWERS, check, load_items, parse_categories, verdict
from finetune.evaluation.items import CALL, IRRELEVANT
from finetune.evaluation.scoring import matches_possible_answers, score

needs_bfcl = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="pip install --no-deps bfcl-eval==2026.3.23"
)
ROWS = {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200, "live_simple": 258,
        "live_multiple": 1053, "irrelevance": 240}  # fmt: skip


def test_parse_categories():
    assert parse_categories("multiple,simple_python,multiple") == ["multiple", "simple_python"]
    assert parse_categories("simple_python, irrelevance") == ["simple_python", "irrelevance"]
    assert parse_categories("") == list(CATEGORIES)
    assert parse_categories("multi_turn_base") == ["multi_turn_base"]
    with pytest.raises(UserError, match="no category 'simple'"):
        parse_categories("simple")


@needs_bfcl
@pytest.mark.parametrize(("category", "rows"), ROWS.items())
def test_load_items_of_a_category(category, rows):
    items = load_items(category)
    assert len(items) == rows
    assert {item.kind for item in items} == {CALL if category in WITH_ANSWERS else IRRELEVANT}
    assert all(item.messages[-1]["role"] == "user" for item in items)
    types = {item.tools[0]["function"]["parameters"]["type"] for item in items if item.tools}
    assert types == {"object"}  # BFCL writes "dict"
    assert len(load_items(category, limit=3)) == 3


@needs_bfcl
@pytest.mark.parametrize(
    ("category", "accepted"),
    [("simple_python", 0.99), ("multiple", 0.99), ("parallel", 0.99), ("parallel_multiple", 0.97),
     ("live_simple", 0.96), ("live_multiple", 0.96)],
)  # fmt: skip
def test_verdicts_agree_with_the_checker(category, accepted):
    items = load_items(category, limit=200)
    theirs, ours, agree = 0, 0, 0
    judged = 0
    for item in items:
        for change in (None, *CHANGES):
            made = deepcopy(item.expected_calls)
            if change is not None and not change(made):
                continue
            valid = check(item, made)
            own = matches_possible_answers(made, item.possible_answers, item.tools)
            judged += 1
            agree += valid == own
            if change is None:
                theirs += valid
                ours += own
            else:
                assert not valid and not own, (item.source, item.row, change.__name__, made)
    assert theirs / len(items) >= accepted
    assert ours / len(items) >= accepted
    assert agree / judged >= 0.97


def _no_call(made):
    made.clear()
    return True


def _one_more(made):
    made.append(made[0])
    return True


def _wrong_name(made):
    made[0]["name"] += "_x"
    return True


def _invented_argument(made):
    made[0]["arguments"]["invented_argument"] = 1
    return True


def _wrong_text(made):
    for key, value in made[0]["arguments"].items():
        if isinstance(value, str):
            made[0]["arguments"][key] = value + " but not this"
            return True
    return False


CHANGES = (_no_call, _one_more, _wrong_name, _invented_argument, _wrong_text)


@needs_bfcl
def test_verdict_with_and_without_calls():
    (item,) = load_items("simple_python", limit=1)
    right = [{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}]
    for made, errors, valid in ((right, [], True), (right * 2, [], False), (right, ["call 2: cut off"], False)):
        ours = score(item, "", made, errors)
        assert ours["arguments_correct"] is valid
        assert verdict(item, made, errors, ours) == {"bfcl_valid": valid, "bfcl_agrees": True}
    as_float = [{"name": "calculate_triangle_area", "arguments": {"base": 10.0, "height": 5}}]
    ours = score(item, "", as_float, [])
    assert verdict(item, as_float, [], ours) == {"bfcl_valid": False, "bfcl_agrees": False}  # it declares integers

    (none,) = load_items("irrelevance", limit=1)
    assert verdict(none, [], [], score(none, "No.", [], [])) == {"bfcl_valid": True, "bfcl_agrees": True}
    assert verdict(none, right, [], score(none, "", right, [])) == {"bfcl_valid": False, "bfcl_agrees": True}
    bare = next(item for item in load_items("live_irrelevance") if not item.tools)
    assert verdict(bare, [], [], score(bare, "No.", [], [])) == {"bfcl_valid": True, "bfcl_agrees": True}
    broken = ["call 1: the JSON is cut off"]
    assert verdict(none, [], broken, score(none, "", [], broken)) == {"bfcl_valid": True, "bfcl_agrees": False}
