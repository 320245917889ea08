"""Verdicts, metrics, intervals and the paired comparison against numbers computed by hand or by another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.items import ANSWER, CALL, IRRELEVANT, MISSING_PARAMETER, QUESTION, items_of
from finetune.evaluation.metrics import METRICS, Metric, compute_metrics, paired_differences
from finetune.evaluation.report import comparison_markdown, one_request
from finetune.evaluation.scoring import (
    BROKEN,
    NO_CALL,
    UNDECLARED,
    confusion_pairs,
    json_equal,
    leaves,
    pair_calls,
    score,
)
from finetune.evaluation.text_scores import exact_match, quality_ok, rouge_l, token_f1, tokenize
from finetune.json_schema import ToolSchemas
from tests.scored import TOOLS, answered, call, item


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (7, 7.0, True),
        ("7", 7, False),
        (True, 1, False),
        (None, False, False),
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, True),
        ([1, 2], [2, 1], False),
        ({"a": None}, {}, False),
        ({}, [], False),
        ("Seoul", "seoul", False),
    ],
)
def test_json_equal(left, right, equal):
    assert json_equal(left, right) is equal
    assert json_equal(right, left) is equal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON, JSON)
def test_json_equal_values_have_equal_leaves(left, right):
    assert json_equal(left, left)
    if json_equal(left, right):
        assert {path for path, _ in leaves(left)} == {path for path, _ in leaves(right)}


def test_leaves_of_nested_arguments():
    body = {"Assign": {"1": {"X": 0, "FV": [0, -1], "empty": {}}}}
    assert list(leaves(body)) == [
        (("Assign", "1", "X"), 0),
        (("Assign", "1", "FV", 0), 0),
        (("Assign", "1", "FV", 1), -1),
        (("Assign", "1", "empty"), {}),
    ]


def test_pair_calls_ignores_order():
    expected = [call("set_lamp", room="hall", level=1), call("set_lamp", room="attic", level=2)]
    made = [call("set_lamp", room="attic", level=2), call("set_lamp", room="hall", level=9)]
    assert sorted(pair_calls(expected, made)) == [(0, 1), (1, 0)]
    assert pair_calls(expected, []) == [(0, None), (1, None)]
    assert pair_calls([], made[:1]) == [(None, 0)]
    verdicts = score(item(CALL, *expected), "", made, [])
    assert verdicts["name_correct"] and not verdicts["arguments_correct"]
    assert (verdicts["arguments_matched"], verdicts["arguments_expected"], verdicts["arguments_made"]) == (3, 4, 4)
    assert score(item(CALL, *expected), "", expected[::-1], [])["arguments_correct"]


@pytest.mark.parametrize(
    ("made", "errors", "name", "arguments", "valid_json", "valid_schema", "hallucinated"),
    [
        ([call("set_lamp", room="hall", level=3)], [], 1, 1, 1, 1, 0),
        ([call("set_lamp", room="hall", level=3.0)], [], 1, 1, 1, 1, 0),
        ([call("set_lamp", room="hall", level="3")], [], 1, 0, 1, 0, 0),
        ([call("set_lamp", level=3)], [], 1, 0, 1, 0, 0),
        ([call("set_lamp", room="hall", level=3, color="red")], [], 1, 0, 1, 1, 1),
        ([call("lamp", room="hall", level=3)], [], 0, 0, 1, 0, 1),
        ([call("door", Assign={"1": {"open": True}})], [], 0, 0, 1, 1, 0),
        ([call("door", Assign={"1": {"opne": True}})], [], 0, 0, 1, 1, 1),
        ([call("set_lamp", room="hall", level=3)] * 2, [], 0, 0, 1, 1, 0),
        ([call("set_lamp", room="hall", level=3)], ["call 2: the JSON is cut off"], 0, 0, 0, 0, 0),
        ([], ["call 1: the JSON is cut off"], 0, 0, 0, 0, 0),
        ([], [], 0, 0, 0, 0, 0),
    ],
)
def test_score_of_a_call(made, errors, name, arguments, valid_json, valid_schema, hallucinated):
    verdicts = score(item(CALL, call("set_lamp", room="hall", level=3)), "", made, errors)
    assert verdicts["called"] == bool(made or errors)
    got = [verdicts[key] for key in ("name_correct", "arguments_correct", "json_valid", "schema_valid", "hallucinated")]
    assert got == [bool(v) for v in (name, arguments, valid_json, valid_schema, hallucinated)]


def test_score_counts_a_broken_call_as_a_call():
    assert score(item(IRRELEVANT, text="No tool for that."), "…", [], [])["no_call_correct"]
    assert not score(item(IRRELEVANT, text="No tool for that."), "…", [], ["call 1: cut off"])["no_call_correct"]
    assert not score(item(ANSWER, text="Done."), "", [call("set_lamp", room="hall")], [])["no_call_correct"]


def test_score_without_declared_tools():
    """Chat logs often hold calls without tools; BFCL has rows without a function where no call is expected."""
    right = call("set_lamp", room="hall")
    m = compute_metrics([answered(item(CALL, right, tools=[]), right), answered(item(CALL, right, tools=[], row=2))])
    assert m["tool_name_accuracy"] == m["parameter_accuracy"] == m["argument_recall"] == 0.5
    assert {"schema_valid_rate", "hallucination_rate"} <= set(m["not_measured"])
    assert m["per_tool"]["set_lamp"]["recall"] == 0.5
    none = item(IRRELEVANT, tools=[])
    m = compute_metrics([answered(none), answered(none, right)])
    assert m["irrelevance_accuracy"] == m["tool_selection_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("schema", "unknown"),
    [
        ({"properties": {"a": {}}}, ["b"]),
        ({"properties": {"a": {}}, "additionalProperties": False}, ["b"]),
        ({"properties": {"a": {}}, "additionalProperties": True}, []),
        ({"properties": {"a": {}}, "additionalProperties": {}}, []),  # the same as true
        ({"properties": {"a": {}}, "additionalProperties": {"properties": {}}}, ["b.c"]),
        ({"properties": {}}, ["a", "b"]),
        ({}, []),
        ({"additionalProperties": False}, ["a", "b"]),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["x"]}]}, ["b"]),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, []),
        ({"properties": {"a": {}}, "$ref": "#/$defs/more"}, []),
        ({"patternProperties": {"^b": {}}, "additionalProperties": False, "properties": {"a": {}}}, []),
        ({"properties": [], "anyOf": 5}, []),
        ({"properties": {"a": {}}, "anyOf": 5}, ["b"]),
    ],
)
def test_unknown_arguments(schema, unknown):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}
    made = call("f", a=1, b={"c": 2})
    assert ToolSchemas([tool]).unknown_arguments(made) == unknown
    assert score(item(CALL, made, tools=[tool]), "", [made], [])["hallucinated"] is bool(unknown)


def test_score_ignores_an_invalid_schema():
    broken = {"type": "function", "function": {"name": "odd", "parameters": {"type": "no such type"}}}
    assert score(item(CALL, call("odd", a=1), tools=[broken]), "", [call("odd", a=1)], [])["schema_valid"]


def conversation() -> dict:
    def calling(name, **arguments):
        calls = [{"type": "function", "function": call(name, **arguments)}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Dim the hall and open door 1"},
            calling("set_lamp", room="hall"),
            {"role": "tool", "content": "ok"},
            calling("door", Assign={"1": {"open": True}}),
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "Both done."},
            {"role": "user", "content": "And the lamp?"},
            {"role": "assistant", "content": "Which lamp do you mean?"},
            {"role": "user", "content": "Tell me a joke"},
            {"role": "assistant", "content": "I have no tool for jokes."},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "a mistake", "train": False},
        ],
    }


def test_schema_draft_is_used_and_nothing_fetched(monkeypatch):
    def tool(**parameters):
        return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}

    pair = {"p": {"type": "array", "items": [{"type": "integer"}, {"type": "string"}]}}
    draft7 = ToolSchemas([tool(**{"$schema": "http://json-schema.org/draft-07/schema#"}, properties=pair)])
    assert draft7.is_valid({"name": "f", "arguments": {"p": [1, "a"]}}) is True
    assert draft7.is_valid({"name": "f", "arguments": {"p": ["a", 1]}}) is False
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("fetched"))
    foreign = ToolSchemas([tool(properties={"p": {"$ref": "http://127.0.0.1:9/schema.json"}})])
    assert foreign.is_valid({"name": "f", "arguments": {"p": 1}}) is None
    assert "cannot be evaluated" in foreign.problems({"name": "f", "arguments": {"p": 1}})[0]


def test_items_of_every_assistant_turn():
    items = items_of(conversation(), "rows", 5)
    assert [(i.turn, i.kind) for i in items] == [
        (1, CALL), (3, CALL), (5, ANSWER), (7, MISSING_PARAMETER), (9, IRRELEVANT),
    ]  # fmt: skip
    assert items[1].messages == conversation()["messages"][:3]
    assert items[1].expected_calls == [call("door", Assign={"1": {"open": True}})]
    assert items[2].expected_text == "Both done." and items[1].expected_text is None
    assert score(items[0], "", [], [])["step"] == 0 and score(items[1], "", [], [])["step"] == 1
    plain = {"tools": [], "messages": conversation()["messages"][8:10]}
    assert [i.kind for i in items_of(plain, "rows", 1)] == [QUESTION]
    named = items_of(conversation(), "rows", 5, category=MISSING_PARAMETER)
    assert [i.kind for i in named][-2:] == [MISSING_PARAMETER, MISSING_PARAMETER]


def test_metrics_computed_by_hand():
    right = call("set_lamp", room="hall", level=3)
    scored = [
        answered(item(CALL, right, row=1), right),
        answered(item(CALL, right, row=2), call("set_lamp", room="hall", level=4)),
        answered(item(CALL, right, row=3), call("door", Assign={})),
        answered(item(CALL, right, row=4), text="I dimmed it."),
        answered(item(IRRELEVANT, row=5, text="No."), text="No."),
        answered(item(IRRELEVANT, row=6, text="No."), call("lamp")),
        answered(item(MISSING_PARAMETER, row=7, text="Which room?"), text="Which one?", latency=3.0),
        answered(item(ANSWER, row=7, text="Done."), text="Done."),
    ]
    m = compute_metrics(scored)
    assert m["tool_name_accuracy"] == 2 / 4
    assert m["parameter_accuracy"] == 1 / 4
    # Made: room and level twice, and one leaf in {"Assign": {}}. Expected: two leaves in each of four items.
    assert m["argument_precision"] == pytest.approx(3 / 5)
    assert m["argument_recall"] == pytest.approx(3 / 8)
    assert m["argument_f1"] == pytest.approx(2 * 3 / (5 + 8), abs=1e-6)
    assert m["json_validity_rate"] == 3 / 4
    assert m["schema_valid_rate"] == 3 / 4
    assert m["hallucination_rate"] == 1 / 8
    assert m["irrelevance_accuracy"] == 1 / 2
    assert m["missing_parameter_accuracy"] == m["asks_back_rate"] == m["answer_accuracy"] == 1
    assert m["tool_selection_accuracy"] == pytest.approx(4 / 7, abs=1e-6)
    assert m["exact_match"] == 2 / 4
    assert m["latency_p50_s"] == 1.0 and m["latency_p95_s"] == pytest.approx(np.percentile([1] * 7 + [3], 95))
    assert (m["items"], m["rows"]) == (8, 7)
    assert "parallel_accuracy" not in m and "parallel_accuracy" in m["not_measured"]
    # door was called once for set_lamp; an undeclared tool is a class of its own.
    assert m["per_tool"]["set_lamp"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3, abs=1e-6),
        "support": 4,
    }
    assert m["per_tool"][NO_CALL]["recall"] == pytest.approx(2 / 3, abs=1e-6)
    table = m["confusion_matrix"]
    at = {label: i for i, label in enumerate(table["labels"])}
    assert table["matrix"][at["set_lamp"]][at["door"]] == 1
    assert table["matrix"][at["set_lamp"]][at[NO_CALL]] == 1
    assert table["matrix"][at[NO_CALL]][at[UNDECLARED]] == 1
    assert sum(map(sum, table["matrix"])) == 7
    low, high = m["intervals_95"]["tool_name_accuracy"]
    assert low < 0.5 < high


def test_metrics_are_finite_numbers():
    scored = [answered(item(CALL, call("set_lamp", room="hall")))]
    m = compute_metrics(scored)
    tables = {"counted", "intervals_95", "items_by_kind", "calls", "not_measured", "per_tool", "confusion_matrix"}
    assert all(isinstance(v, int | float) and math.isfinite(v) for k, v in m.items() if k not in tables)
    assert m["hallucination_rate"] == 0 and m["argument_precision"] == 0 and m["json_validity_rate"] == 0


def test_arguments_of_bfcl_are_not_counted():
    one = item(CALL, call("set_lamp", room="hall"), possible_answers=[{"set_lamp": {"room": ["hall", "the hall"]}}])
    m = compute_metrics([answered(one, call("set_lamp", room="the hall")), answered(one)])
    assert m["parameter_accuracy"] == 0.5
    assert {"argument_precision", "argument_recall"} <= set(m["not_measured"]) and "argument_f1" not in m


def test_interval_agrees_with_scipy():
    from scipy.stats import bootstrap

    right = call("set_lamp", room="hall")
    scored = [answered(item(CALL, right, row=i), *([right] if i % 3 else [])) for i in range(60)]
    ours = compute_metrics(scored, seed=1)["intervals_95"]["tool_name_accuracy"]
    hits = np.array([bool(i % 3) for i in range(60)], float)
    theirs = bootstrap((hits,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0))
    assert ours == pytest.approx([theirs.confidence_interval.low, theirs.confidence_interval.high], abs=0.02)


def test_interval_resamples_rows_not_items():
    """Two rows of ten turns, one all right and one all wrong: the interval is everything."""
    right = call("set_lamp", room="hall")
    scored = [answered(item(CALL, right, row=1 + i // 10), *([right] if i < 10 else [])) for i in range(20)]
    assert compute_metrics(scored)["intervals_95"]["tool_name_accuracy"] == [0.0, 1.0]


def test_paired_differences():
    from scipy.stats import binomtest

    right = call("set_lamp", room="hall")
    items = [item(CALL, right, row=i) for i in range(20)]
    base = [answered(one, *([right] if i < 4 else [])) for i, one in enumerate(items)]
    tuned = [answered(one, *([right] if i >= 2 else [])) for i, one in enumerate(items)]
    result = paired_differences(base, tuned)["tool_name_accuracy"]
    assert (result["base"], result["tuned"], result["difference"]) == (0.2, 0.9, 0.7)
    assert result["p_value"] == pytest.approx(binomtest(16, 18).pvalue)  # 16 gained, 2 lost
    assert 0.35 < result["interval_95"][0] < 0.7 < result["interval_95"][1] <= 1
    same = paired_differences(base, base)["tool_name_accuracy"]
    assert (same["difference"], same["interval_95"], same["p_value"]) == (0, [0, 0], 1)
    with pytest.raises(ValueError, match="same items"):
        paired_differences(base, tuned[::-1])


@pytest.mark.parametrize("binary", [True, False])
def test_registered_metric_reaches_every_table(binary):
    """McNemar's test is for binary metrics alone; all have a value, an interval and a row in the tables."""
    metric = Metric("long_answers", lambda scored: min(len(scored.text) / 4, 1.0), binary=binary, lower_is_better=True)
    texts = ["abcd" if i % 2 else ("" if binary else "ab") for i in range(20)]
    base = [answered(item(IRRELEVANT, row=i), text=text) for i, text in enumerate(texts)]
    tuned = [answered(one.item, text="abcd") for one in base]
    METRICS.append(metric)
    try:
        metrics = {"base": compute_metrics(base), "tuned": compute_metrics(tuned)}
        compared = paired_differences(base, tuned)
        table = comparison_markdown(metrics, compared, [])
    finally:
        METRICS.remove(metric)
    assert metrics["base"]["long_answers"] == (0.5 if binary else 0.75) and metrics["tuned"]["long_answers"] == 1
    result = compared["long_answers"]
    assert result["p_value"] == (pytest.approx(2 * 0.5**10) if binary else None)
    assert 0 < result["interval_95"][0] < result["difference"] < result["interval_95"][1]
    assert "| long_answers (lower is better) | 20 | 0." in table


def test_binary_metrics_have_no_fractional_values():
    """A metric with other values than 0 and 1 that is marked as binary would get a wrong p value."""
    scored = [
        answered(item(CALL, call("set_lamp", room="hall", level=3)), call("set_lamp", room="hall", level=4)),
        answered(item(IRRELEVANT, text="No tool can do that."), text="No, sorry."),
    ]
    ratios = {(m.name, m.ratio(one)) for m in METRICS if m.verdict is not None for one in scored}
    fractional = {name for name, ratio in ratios if ratio not in (None, (0, 1), (1, 1))}
    assert fractional == {metric.name for metric in METRICS if not metric.binary}


def test_confusion_pairs():
    one = item(CALL, call("set_lamp", room="hall"), call("door"))
    assert sorted(confusion_pairs(one, [call("door"), call("lamp")])) == [("door", "door"), ("set_lamp", UNDECLARED)]
    assert sorted(confusion_pairs(one, [call("door")])) == [("door", "door"), ("set_lamp", NO_CALL)]
    assert confusion_pairs(item(IRRELEVANT), []) == [(NO_CALL, NO_CALL)]
    assert sorted(confusion_pairs(one, [call("door")], 1)) == [("door", "door"), ("set_lamp", BROKEN)]
    assert confusion_pairs(item(IRRELEVANT), [], 1) == [(NO_CALL, BROKEN)]


def test_tool_table_counts_broken_calls():
    """The recall of "(no call)" equals irrelevance_accuracy: both count a broken call as a call."""
    broken = ("call 1: the JSON is cut off",)
    right = call("set_lamp", room="hall")
    m = compute_metrics(
        [
            answered(item(IRRELEVANT, row=1)),
            answered(item(IRRELEVANT, row=2), errors=broken),
            answered(item(CALL, right, row=3), errors=broken),
        ]
    )
    assert m["per_tool"][NO_CALL]["recall"] == m["irrelevance_accuracy"] == 0.5
    assert m["per_tool"][NO_CALL]["precision"] == 1.0
    assert m["confusion_matrix"]["labels"] == ["set_lamp", NO_CALL, UNDECLARED, BROKEN]
    assert m["confusion_matrix"]["matrix"][:2] == [[0, 0, 0, 1], [0, 1, 0, 1]]


def test_text_scores():
    assert exact_match("Paris, France!", "paris france") and not exact_match("Paris", "Lyon")
    assert not exact_match("👍", "👎") and exact_match("Gut 👍!", "gut 👍") and exact_match("❤", "❤\ufe0f")
    assert not exact_match("कि", "की") and tokenize("नमस्ते, दुनिया।") == ["नमस्ते", "दुनिया"]
    assert not exact_match("5 €", "5 £") and exact_match("Ⅳ a_b", "iv A_B") and exact_match("e\u0301", "é")
    assert token_f1("the cat sat", "the cat ran off") == pytest.approx(2 * 2 / 7)
    assert token_f1("", "") == 1 and token_f1("a", "") == 0
    # Longest common subsequence "서울 날씨 맑음": 3 of 3 and 3 of 4 words.
    assert rouge_l("서울 날씨 맑음", "서울 오늘 날씨 맑음") == pytest.approx(2 * 0.75 / 1.75)


@pytest.mark.parametrize(
    ("expected", "made"),
    [
        ("police killed the gunman", "the gunman kill police"),
        ("a b c d e", "e d c b a"),
        ("a a b", "a b a a"),
        ("Node 1 has been added.", "Node 1 was added at the origin (0, 0, 0)."),
        ("same words", "same words"),
        ("", "something"),
    ],
)
def test_rouge_l_agrees_with_rouge_score(expected, made):
    package = pytest.importorskip("rouge_score.rouge_scorer")
    theirs = package.RougeScorer(["rougeL"]).score(expected, made)["rougeL"].fmeasure
    assert rouge_l(expected, made) == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("Drink water every day.", True),
        ("yes", False),
        ("a b c", False),
        ("!!! ??? ...", False),
        ("Drink water", False),
    ],
)
def test_quality_rule(text, ok):
    assert quality_ok(text) is ok


def test_quality_rule_against_labels():
    def labelled(row, label, text):
        return answered(item(QUESTION, row=row, tools=[], label=label), text=text)

    good, bad = "Drink water every day.", "no"
    m = compute_metrics(
        [labelled(1, True, good), labelled(2, True, bad), labelled(3, False, good), labelled(4, False, bad)]
    )
    assert (m["quality_accuracy"], m["quality_precision"], m["quality_recall"], m["quality_f1"]) == (0.5, 0.5, 0.5, 0.5)
    assert m["quality_ok_rate"] == 0.5
    assert m["quality_confusion"]["matrix"] == [[1, 1], [1, 1]]
    three = compute_metrics([labelled(1, True, good), labelled(2, True, bad), labelled(3, False, good)])
    assert three["quality_confusion"]["matrix"] == [[1, 1], [1, 0]]
    assert "| tuned: not ok | 1 | 0 |" in comparison_markdown({"tuned": three}, {}, [])


def test_docs_define_every_metric():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [m.name for m in METRICS if m.verdict is not None and f"| `{m.name}` |" not in text] == []


def test_one_request_is_one_that_only_the_tuned_model_gets_right():
    lamp, door = call("set_lamp", room="hall"), call("door", Assign={"1": {"open": True}})
    items = [item(CALL, lamp, row=1), item(CALL, door, row=2)]
    base = [answered(items[0], lamp), answered(items[1], text="Sure!\x1b[2J")]
    tuned = [answered(items[0], lamp), answered(items[1], door)]
    lines = one_request({"base": base, "tuned": tuned}).splitlines()
    assert [line.split()[0] for line in lines] == ["request", "expected", "base", "tuned"]
    assert lines[0].endswith("Dim the kitchen") and lines[2].endswith("Sure!\ufffd[2J")
    assert lines[1].endswith('door {"Assign": {"1": {"open": true}}}') and lines[3].endswith(lines[1].split(None, 1)[1])
