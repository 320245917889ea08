"""No row, schema or file of others hangs a command or fills the memory: each is rejected with its reason."""

import contextlib
import gzip
import json

import pytest

from finetune.errors import UserError
from finetune.files import read_data
from finetune.json_schema import limits as json_schema
from finetune.json_schema import schema_errors, unchecked_keywords, validator_of
from finetune.preparing.checks import check_conversation
from finetune.reading import size_limits
from finetune.reading.normalize import normalize_row
from finetune.reading.row_files import RowError, Unreadable
from finetune.reading.sources import read_rows
from finetune.reading.tool_schemas import load_tools_file
from formats import FormatError, get_format
from formats.safe_yaml import load_yaml
from tests.fuzz import time_limit

EVIL_TEXT = "a" * 40 + "!"


def one_property(**schema):
    return {"type": "object", "properties": {"x": schema}}


def ref_bomb(depth=60, keyword="allOf"):
    """Each definition refers to the next one twice."""
    definitions = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    definitions[f"d{depth}"] = {"type": "string"}
    return {"$defs": definitions, "properties": {"x": {"$ref": "#/$defs/d0"}}}


@pytest.mark.parametrize("pattern", [r"^(a+)+$", r"^(a|a)*$", r"^(a|aa)+$", r"^([a-z]+)*\d$", r"^(.*a){25}$"])
@pytest.mark.parametrize("place", ["pattern", "patternProperties", "unevaluatedProperties", "propertyNames"])
def test_slow_pattern_is_a_broken_schema(pattern, place, monkeypatch):
    monkeypatch.setattr(json_schema, "MAX_PATTERN_SECONDS", 0.05)
    monkeypatch.setattr(json_schema, "_SLOW_PATTERNS", set())
    schema, arguments = {
        "pattern": (one_property(pattern=pattern), {"x": EVIL_TEXT}),
        "patternProperties": ({"patternProperties": {pattern: {}}, "additionalProperties": False}, {EVIL_TEXT: 1}),
        "unevaluatedProperties": ({"unevaluatedProperties": False, "patternProperties": {pattern: {}}}, {EVIL_TEXT: 1}),
        "propertyNames": ({"propertyNames": {"pattern": pattern}}, {EVIL_TEXT: 1}),
    }[place]
    errors, broken = schema_errors(schema, arguments)
    assert (errors, "takes more than" in (broken or "")) == ([], True) or errors  # the engine may find it fast


def test_slow_pattern_below_another_dialect(monkeypatch):
    monkeypatch.setattr(json_schema, "MAX_PATTERN_SECONDS", 0.05)
    for dialect in ("http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"):
        inner = one_property(pattern=r"^(a|a)*$") | {"$schema": dialect}
        for schema in (inner, {"properties": {"y": inner}} | {"$schema": dialect}):
            arguments = {"x": EVIL_TEXT} if schema is inner else {"y": {"x": EVIL_TEXT}}
            assert "takes more than" in schema_errors(schema, arguments)[1]


def test_slow_pattern_waits_once(monkeypatch):
    schema = one_property(pattern=r"^(b|b)*$")
    monkeypatch.setattr(json_schema, "MAX_PATTERN_SECONDS", 0.05)
    assert schema_errors(schema, {"x": "b" * 40 + "!"})[1]
    monkeypatch.setattr("regex.search", lambda *_, **__: pytest.fail("matched again"))
    assert "takes more than" in schema_errors(schema, {"x": "b" * 40 + "!"})[1]


def test_long_text_in_a_pattern_is_not_searched():
    for pattern in ("a" * 4000, "[a]" * 3000):
        assert "more than 1,000 characters" in schema_errors(one_property(pattern=pattern), {"x": "a" * 9000})[1]
    words = "|".join(f"word{number:04}" for number in range(1000))
    assert schema_errors(one_property(pattern=words), {"x": "word0999"}) == ([], None)


def test_good_patterns_still_work():
    schema = one_property(pattern=r"^\d{4}-\d{2}-\d{2}$")
    assert schema_errors(schema, {"x": "2026-11-28"}) == ([], None)
    assert schema_errors(schema, {"x": "today"})[0]
    assert schema_errors(one_property(pattern="("), {"x": "a"}) == ([], None)
    assert "pattern '('" in unchecked_keywords(one_property(pattern="("))[0]


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_ref_bomb_is_a_broken_schema(keyword, monkeypatch):
    monkeypatch.setattr(json_schema, "MAX_CHECKS", 3000)
    schema = ref_bomb(keyword=keyword)
    assert "more than 3,000 checks" in schema_errors(schema, {"x": 1})[1]
    monkeypatch.setattr(json_schema, "MAX_CHECKS", 10**9)
    assert schema_errors(schema, {"x": 1})[1]  # known by now


MANY = [f"p{n}" for n in range(3000)]
OBJECTS = [{"a": 1}] * 20_000


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ([[n] for n in range(4000)], {"items": {"enum": [[n] for n in range(4000)]}}),
        ([[*range(300)]] * 3000, {"items": {"enum": [[*range(300), n] for n in range(300)] * 10}}),
        (OBJECTS, {"items": {"properties": {key: {} for key in MANY}}}),
        (OBJECTS, {"items": {"required": MANY}}),
        (OBJECTS, {"items": {"dependentRequired": {key: ["a"] for key in MANY}}}),
        (dict.fromkeys(MANY, 1), {"patternProperties": {f"^q{n}": {} for n in range(1000)}}),
        (
            dict.fromkeys(MANY, 1),
            {"patternProperties": {f"^q{n}$": {} for n in range(999)}, "unevaluatedProperties": 0},
        ),
        (["text " * 200_000], {"items": {"allOf": [{"type": "integer"}] * 3000}}),
        ("a" * 200_000, {"allOf": [{"pattern": f"(a|b)*{n}$"} for n in range(300)]}),
    ],
    ids=[
        "enum",
        "enum of lists",
        "properties",
        "required",
        "dependent",
        "patterns",
        "unevaluated",
        "messages",
        "search",
    ],
)
def test_work_of_keywords_is_limited(value, schema, monkeypatch):
    """With a limit on the number of keywords alone, each of these takes seconds to minutes."""
    monkeypatch.setattr(json_schema, "MAX_CHECKS", 9000)
    errors, broken = schema_errors(one_property(**schema), {"x": value})
    assert errors == [] and "more than 9,000 checks" in broken


def test_ref_to_itself_is_a_broken_schema():
    for reference in ("$ref", "$dynamicRef"):
        for schema in ({reference: "#"}, {"type": "object", reference: "#"}, {"allOf": [{reference: "#"}]}):
            assert "nested deeper than 200 levels" in schema_errors(schema, {})[1]


def test_deep_value_of_a_recursive_schema_is_checked():
    node = {"type": "object", "properties": {"k": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    value = {}
    for _ in range(30):
        value = {"k": [value]}
    assert schema_errors({"$defs": {"node": node}, "$ref": "#/$defs/node"}, value) == ([], None)


def test_large_value_stays_within_the_limits():
    schema = one_property(type="array", items={"type": "object", "properties": {"n": {"type": "integer"}}})
    assert schema_errors(schema, {"x": [{"n": n} for n in range(20_000)]}) == ([], None)


def test_unique_items_in_linear_time():
    schema = one_property(type="array", uniqueItems=True)
    items = [{"n": n, "inner": [n, {"m": n}]} for n in range(20_000)]
    assert schema_errors(schema, {"x": items}) == ([], None)
    assert schema_errors(schema, {"x": [*items, items[0]]})[0]


@pytest.mark.parametrize(
    ("items", "unique"),
    [([1, True], True), ([0, False], True), ([1, 1.0], False), ([[1], [True]], True), ([{"a": 1}, {"a": 1.0}], False),
     ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], False), (["1", 1], True), ([[], {}], True), ([None, None], False)],
)  # fmt: skip
def test_unique_items_compares_as_json_schema(items, unique):
    assert (not schema_errors(one_property(uniqueItems=True), {"x": items})[0]) is unique


def test_validator_still_names_its_draft():
    validator, reason = validator_of(
        json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"})
    )
    assert reason is None and list(validator.iter_errors([]))


def test_row_with_a_slow_pattern_is_rejected(monkeypatch):
    monkeypatch.setattr(json_schema, "MAX_PATTERN_SECONDS", 0.05)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "c" * 40 + "!"}}}
    conversation = {
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": one_property(pattern=r"^(c|c)*$")}}],
    }
    problem = check_conversation(conversation)[0]
    assert problem.error and problem.kind == "broken schema" and "takes more than" in problem.text


LIST_START = "Here is a list of functions in JSON format that you can invoke"
FUNCTIONS = "with access to the following functions."
LONG = 100_000


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("system", LIST_START + " " * LONG + "x"),
        ("system", LIST_START + "[]" + "very " * LONG),
        ("system", LIST_START + "[]" + "x [func(" * LONG),
        ("system", "You are a function calling AI model." * LONG),
        ("system", "You are a function calling AI model.</tools>" + "<tools>[" * LONG),
        ("system", "<|im_system|>tool_declare<|im_middle|>" * LONG),
        ("system", "You are a " * LONG + "{}"),
        ("system", FUNCTIONS + " Use them" + " " * LONG + "x{}"),
        ("type", "a" + " " * LONG + "b"),
        ("type", "optional[" * LONG),
        ("answer", "Tool: f\nParameters: ```" + " " * LONG + "x```"),
        ("answer", "Tool: f\nParameters: ```" + " " * LONG + "x"),
        ("answer", "<tool_call>f\n<arg_key>" + "</arg_key><arg_value>" * LONG),
        ("answer", "[f(" + " " * LONG + "a)]"),
        ("answer", "```" + " " * LONG + "x"),
    ],
    ids=lambda text: text[:20],
)
def test_long_texts_are_read_in_linear_time(place, text):
    """In less than a second; patterns with several repetitions took minutes to days for the same texts."""
    system = text if place == "system" else f'{LIST_START} [{{"name": "f", "parameters": {{}}}}]'
    schema = one_property(type=text if place == "type" else "string")
    row = {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": text if place == "answer" else "ok"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }
    with time_limit(5), contextlib.suppress(RowError):
        assert check_conversation(normalize_row(row)) is not None


def test_many_objects_over_several_lines_are_read_in_linear_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + "".join(f'{{\n "prompt": "{"x" * 300}",\n "n": {n}\n}}\n' for n in range(30_000)))
    with time_limit(5):
        numbers = [number for _, number, _ in read_rows(path)]
    assert numbers == list(range(3, 3 + 4 * 30_000, 4))


def yaml_bomb(levels=12):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_yaml_alias_bomb_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml_bomb())
    with pytest.raises(UserError, match="aliases expand to more than"):
        read_data("config", tmp_path / "recipe.yaml")
    with pytest.raises(FormatError, match="aliases expand to more than"):
        get_format(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "&a [*a]"])
def test_yaml_that_contains_itself_is_refused(text):
    with pytest.raises(ValueError, match="contains it"):
        load_yaml(text)


def test_yaml_with_merge_keys_and_aliases():
    text = "base: &b {rank: 4}\nother: {<<: *b, lr: 1}\nmore: {<<: [*b, *b]}\nlist: [*b]"
    assert load_yaml(text)["other"] == {"rank": 4, "lr": 1}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!x y",
        "!!timestamp x",
        "!!int x",
        "!!bool x",
        "!!float x",
        "!!binary é",
        "!!set x",
        "[" * 9999,
    ],
)
def test_yaml_of_wrong_or_own_types_is_refused(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"start: {text}", encoding="utf-8")
    with pytest.raises(ValueError):
        load_yaml(path.read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="not valid YAML"):
        read_data("config", path)
    with pytest.raises(FormatError):
        get_format(str(path))


def test_duplicate_yaml_key_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text('start: "a"\nstart: "b"\nseparator: "|"\nend: "e"\ntools: system')
    with pytest.raises(FormatError, match="duplicate key"):
        get_format(str(path))


def long_row(kind):
    """A row whose reading took time with the square of its length."""
    ask, say = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    ids = [f"c{n}" for n in range(20_000)]
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in ids]
    results = [{"role": "tool", "tool_call_id": name, "content": "1"} for name in reversed(ids)]
    tags = {"role": "tool", "content": "<tool_response>" * 200_000}
    call = {"role": "assistant", "tool_calls": calls[:1]}
    return {
        "unclosed tags": [ask, call, tags, say],
        "parallel calls": [ask, {"role": "assistant", "tool_calls": calls}, *results, say],
        "messages of one turn": [ask, *({"role": "assistant", "content": "word " * 20} for _ in range(20_000))],
        "thoughts of one turn": [ask, *({"role": "assistant", "content": "<think>x</think>y"} for _ in range(20_000))],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "messages"),
    [("unclosed tags", 4), ("parallel calls", 20_003), ("messages of one turn", 2), ("thoughts of one turn", 2)],
)
def test_long_rows_are_read(kind, messages):
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    conversation = normalize_row({"messages": long_row(kind), "tools": tools})
    assert len(conversation["messages"]) == messages
    assert not [problem for problem in check_conversation(conversation) if problem.error]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_long_line_is_one_rejected_row(name, tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr("finetune.reading.row_files.MAX_ROW_BYTES", 100)
    monkeypatch.setattr(size_limits, "_CHUNK", 7)
    fits = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(fits) == 100
    lines = b"\n".join([b'{"a":1}', b'{"a":"' + b"x" * 93 + b'"}', fits, b'{"a":"' + b"x" * 500 + b'"}', b'{"a":2}'])
    (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb").write(lines)
    rows = [row for _, _, row in read_rows(tmp_path / name)]
    assert [isinstance(row, Unreadable) for row in rows] == [False, True, False, True, False]
    assert rows[1].reason == "is longer than 100 bytes" and rows[4] == {"a": 2}


def test_last_line_without_a_break_may_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "MAX_ROW_BYTES", 10)
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":1}\n{"a":12345}')
    rows = [row for _, _, row in read_rows(tmp_path / "rows.jsonl")]
    assert rows[0] == {"a": 1} and isinstance(rows[1], Unreadable)


@pytest.mark.parametrize("suffix", [".json.gz", ".parquet.gz"])
def test_gzip_bomb_is_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "MIN_GZIP_BYTES", 1000)
    path = tmp_path / f"rows{suffix}"
    with gzip.open(path, "wb") as file:
        file.write(b"[" + b" " * 5_000_000 + b"]")
    with pytest.raises(UserError, match="expands to more than 200 times"):
        list(read_rows(path))


def test_long_csv_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "MAX_ROW_BYTES", 100)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n" + "x" * 200 + ",3\n")
    with pytest.raises(UserError, match="line 3 is longer"):
        list(read_rows(tmp_path / "rows.csv"))


def test_damaged_offsets_of_an_arrow_file(tmp_path):
    """They would be read from anywhere in memory."""
    import pyarrow

    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 2_000_000_000, 4)))
    texts = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"abcd"))
    batch = pyarrow.RecordBatch.from_arrays([texts], ["text"])
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, batch.schema) as out:
        out.write_batch(batch)
    with pytest.raises(UserError, match="not an Arrow file"):
        list(read_rows(tmp_path / "rows.arrow"))


@pytest.mark.parametrize("depth", [70, 200, 500, 900, 990, 100_000])
def test_deeply_nested_tools(depth, tmp_path):
    """Python's own limit is met in other places, depending on the depth."""
    path = tmp_path / "tools.json"
    schema = '{"properties": {"a": ' * (depth // 2) + "{}" + "}}" * (depth // 2)
    path.write_text(f'[{{"function": {{"name": "f", "parameters": {schema}}}}}]')
    with pytest.raises(UserError, match=r"nested|not valid JSON"):
        load_tools_file(path)
