"""Checks name the problem and its place; near-duplicates stay together; splits have the given shares."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.preparing.checks import called_tool, check_conversation, exact_key
from finetune.preparing.related_rows import own_texts
from finetune.preparing.splits import SPLITS, near_duplicate_groups, parse_ratios, shingles, split_conversations
from finetune.reading.conversations import normalize_row
from tests.rows import LAMP, chat


def call(name="set_lamp", arguments=None, **extra) -> dict:
    function = {"name": name, "arguments": {"room": "hall"} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function, **extra}]}


SAY = {"role": "assistant", "content": "Done."}
ASK = {"role": "user", "content": "And now?"}


def problems(*messages, tools=(LAMP,)) -> dict[str, bool]:
    found = check_conversation(normalize_row(chat(*messages, tools=list(tools))))
    return {problem.kind: problem.error for problem in found}


TWO = call(id="a") | {"tool_calls": call(id="a")["tool_calls"] + call(id="b")["tool_calls"]}


def result(call_id: str) -> dict:
    return {"role": "tool", "content": call_id, "tool_call_id": call_id}


def test_good_conversation_has_no_problem():
    assert problems(TWO, result("a"), result("b"), SAY) == {}
    assert problems(call(id="a"), {"role": "tool", "content": "1", "tool_call_id": "a", "name": "set_lamp"}, SAY) == {}


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([ASK], "nothing to train"),
        ([SAY | {"train": False}], "nothing to train"),
        ([{"role": "assistant", "content": " "}], "empty answer"),
        ([call("set_lmap")], "undeclared tool"),
        ([call(arguments={"level": 3})], "arguments against the schema"),
        ([call(arguments={"room": "a", "level": "3"})], "arguments against the schema"),
        ([{"role": "tool", "content": "1"}, SAY], "orphan result"),
        ([SAY, {"role": "tool", "content": "1"}, SAY], "orphan result"),
        ([call(), {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, SAY], "orphan result"),
        ([call(id="a"), {"role": "tool", "content": "1", "tool_call_id": "b"}, SAY], "orphan result"),
        ([call(), {"role": "tool", "content": "1", "name": "other"}, SAY], "orphan result"),
    ],
)
def test_errors(messages, kind):
    assert problems(*messages).get(kind) is True


CALLS_IN_OTHER_NOTATIONS = (
    '<|python_tag|>set_lamp.call(room="hall")', "[set_lamp('hall')]", 'set_lamp(room="hall")',
    'Thought: dim.\nAction: set_lamp\nAction Input: {}', "<start_function_call>call:set_lamp{}",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>set_lamp",
    '[{"name": "set_lamp", "arguments": {"room": 1}}]',
    '<|channel|>commentary to=functions.set_lamp <|message|>{"room": "hall"}', "<tool_call>{broken</tool_call>",
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        *("I called set_lamp (as you see).", "Use set_lamp(room) for it.", '{"name": "Ada"}', "[see](a=b)"),
        '{"name": "Ada", "age": 7, "input": "x"}',
    ],
)
def test_mention_of_a_tool_is_not_a_call(text):
    assert problems({"role": "assistant", "content": text}) == {}


@pytest.mark.parametrize(
    "text",
    [
        "[{'api': 'tides', 'parameters': {'bay': 'Orm'}, 'responses': []}]",
        "{'name':terminal, 'parameters':{'commands': ['mkdir a']}}",
        '```json\n{"tool": "tides", "args": {}}\n```',
        '{"action": "tides", "action_input": "Orm"}',
        "[tides.at(bay='Orm')]",
    ],
)
def test_calls_in_the_text_without_tools_are_named(text):
    assert problems({"role": "assistant", "content": text}, tools=[]) == {"call left in the text": False}


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([call(), SAY], "two assistant messages in a row"),
        ([ASK, SAY], "two user messages in a row"),
        ([SAY, {"role": "system", "content": "x"}, ASK, SAY], "system message in the middle"),
        ([SAY, ASK], "ends without an answer"),
        ([call(), {"role": "tool", "content": "1"}, ASK, SAY], "result without an answer"),
        ([call(), ASK, SAY], "call without a result"),
        ([TWO, result("b"), {"role": "tool", "content": "?"}, SAY], "results in another order than their calls"),
        *(([{"role": "assistant", "content": text}], "call left in the text") for text in CALLS_IN_OTHER_NOTATIONS),
    ],
)
def test_warnings(messages, kind):
    assert problems(*messages).get(kind) is False


def test_problem_names_message_tool_and_value():
    row = normalize_row(chat(SAY, ASK, call(arguments={"room": "a", "level": "3"}), tools=[LAMP]))
    assert [p.text for p in check_conversation(row)] == [
        "message 4: call of set_lamp, level: '3' is not of type 'integer'"
    ]


def test_broken_schemas_and_duplicate_tools_are_errors():
    broken = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": 7}}}}
    assert problems(call("f", {}), tools=[broken]) == {"broken schema": True}
    dangling = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}}
    assert problems(call("f", {"a": 1}), tools=[dangling]) == {"broken schema": True}
    assert problems(SAY, tools=[LAMP, LAMP]) == {"tool declared twice": True}


def test_schema_reference_is_not_fetched(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("fetched a URL from a row"))
    remote = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    assert problems(call("f", {"a": 1}), tools=[{"name": "f", "parameters": remote}]) == {"broken schema": True}


def test_schema_definitions_are_resolved():
    tool = {
        "name": "f",
        "parameters": {
            "type": "object",
            "$defs": {"n": {"type": "integer", "maximum": 3}},
            "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
        },
    }
    assert problems(call("f", {"a": None}), tools=[tool]) == {}
    assert problems(call("f", {"a": 4}), tools=[tool]) == {"arguments against the schema": True}


def test_schema_draft_is_the_one_it_names():
    pair = {"type": "array", "items": [{"type": "number"}, {"type": "string"}]}
    parameters = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"a": pair}}
    tool = {"name": "f", "parameters": parameters}
    assert problems(call("f", {"a": [1, "x"]}), tools=[tool]) == {}
    assert problems(call("f", {"a": ["x", 1]}), tools=[tool]) == {"arguments against the schema": True}
    for unknown in ("https://example.org/own", 7, []):
        known = problems(call("f", {}), tools=[{"name": "f", "parameters": {"$schema": unknown, "type": "object"}}])
        assert known == ({} if isinstance(unknown, str) else {"schema keyword not checked": False})


def test_exact_key_ignores_call_ids_and_key_order_only():
    one = normalize_row(chat(call(arguments={"room": "a", "level": 1}, id="x"), tools=[LAMP]))
    two = normalize_row(chat(call(arguments={"level": 1, "room": "a"}, id="y"), tools=[LAMP]))
    three = normalize_row(chat(call(arguments={"level": 2, "room": "a"}), tools=[LAMP]))
    assert exact_key(one) == exact_key(two) != exact_key(three)


# near-duplicates and splits


def asking(text: str, tool: str | None = None) -> dict:
    answer = call(tool, {}) if tool else SAY
    return normalize_row({"messages": [{"role": "user", "content": text}, answer]})


BASE = "Please create a rectangular beam section with a width of three hundred and a height of six hundred millimetres"


def test_near_duplicates_share_a_group():
    texts = [
        BASE,
        BASE + " now",
        "Which load cases are defined?",
        BASE.upper(),
        BASE.replace("Please", "Kindly"),
        "Undo",
    ]
    groups = near_duplicate_groups([asking(text) for text in texts])
    assert groups == [0, 0, 2, 0, 0, 5]
    assert near_duplicate_groups([asking(""), asking(" "), asking("")]) == [0, 1, 2]


def test_longer_texts_of_few_words_are_compared_by_words():
    """Texts of the same few words have the same pieces of characters, and yet are not alike."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(BASE.split(), k=120)) for _ in range(20)]
    assert len(set(near_duplicate_groups([asking(text) for text in texts]))) == 20
    assert len(set(near_duplicate_groups([asking(texts[0]), asking(texts[0] + " now")]))) == 1
    without_spaces = "가나다라마바사" * 100
    assert len(set(near_duplicate_groups([asking(without_spaces), asking(without_spaces + "아")]))) == 1


def test_groups_equal_comparison_of_all_pairs():
    rng = random.Random(7)
    words = BASE.split()
    texts = []
    for _ in range(150):
        chosen = list(words)
        for _ in range(rng.randrange(6)):
            chosen[rng.randrange(len(chosen))] = rng.choice(["red", "blue", "seven", "eight", "wall", "slab"])
        texts.append(" ".join(chosen))
    distinct = list(dict.fromkeys(text.lower() for text in texts))
    own = dict(zip(distinct, own_texts(distinct), strict=True))
    sets = [shingles(own[text.lower()]) for text in texts]
    parent = list(range(len(texts)))

    def find(i):
        return i if parent[i] == i else find(parent[i])

    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j]):
                parent[max(find(i), find(j))] = min(find(i), find(j))
    expected = [find(i) for i in range(len(texts))]
    assert 5 < len(set(expected)) < 145  # the data has both pairs and single rows
    assert near_duplicate_groups([asking(text) for text in texts]) == expected


def test_thousands_of_near_duplicates_are_one_group():
    rows = [asking(f"{BASE} number {i}") for i in range(3000)]
    assert set(near_duplicate_groups(rows)) == {0}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=120),
    st.integers(0, 5),
)
def test_splits_keep_groups_together(items, seed):
    rows = [asking(f"q{i}", tool) for i, (_, tool) in enumerate(items)]
    groups = [group for group, _ in items]
    splits = split_conversations(rows, groups, (0.8, 0.1, 0.1), seed)
    where = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        where[group].add(split)
    assert all(len(found) == 1 for found in where.values())
    largest = max(Counter(groups).values())
    counts = Counter(splits)
    for name, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(counts[name] - share * len(rows)) <= largest + 1


def test_each_tool_is_split_in_the_given_shares():
    tools = ["a"] * 100 + ["b"] * 60 + ["c"] * 40
    rows = [asking(f"{tool} {i}", tool) for i, tool in enumerate(tools)]
    groups = list(range(len(rows)))
    splits = split_conversations(rows, groups, (0.8, 0.1, 0.1), seed=1)
    table = Counter(zip(map(called_tool, rows), splits, strict=True))
    assert table == {
        (t, s): round(n * share)
        for t, n in (("a", 100), ("b", 60), ("c", 40))
        for s, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True)
    }
    assert splits == split_conversations(rows, groups, (0.8, 0.1, 0.1), seed=1)
    assert splits != split_conversations(rows, groups, (0.8, 0.1, 0.1), seed=2)


def test_split_with_share_zero_is_empty():
    rows = [asking(f"q{i}") for i in range(20)]
    assert set(split_conversations(rows, list(range(20)), (0.9, 0.1, 0.0))) == {"train", "validation"}


@pytest.mark.parametrize("text", ["nan/1/1", "inf/1/1", "1/nan/1", "-1/1/1", "0/1/1", "80/20", "a/b/c", ""])
def test_invalid_ratios_are_refused(text):
    with pytest.raises(UserError, match="three shares"):
        parse_ratios(text)


def test_ratios():
    assert parse_ratios("80/10/10") == (0.8, 0.1, 0.1) and parse_ratios("1/0/0") == (1, 0, 0)
