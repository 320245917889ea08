"""The kinds of input that tests/fuzz.py tries: how a case is made, and what must hold when it is read."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.json_schema import ToolSchemas, schema_errors, unchecked_keywords
from finetune.reading.normalize import normalize_row
from finetune.reading.row_files import RowError
from finetune.reading.tool_schemas import load_tools_file, normalize_tools
from formats import FormatError, get_format
from tests.formats.cases import ALL_ATTACKS
from tests.formats.fuzz import FRAGMENTS
from tests.fuzz_inputs import edited, mutated, parts
from tests.fuzz_rows import PAIRS, check_file, check_row, file_case, load_pairs, loaded_pair, row_case, seeds
from tests.fuzz_runs import check_config, check_log, check_results, config_case, log_case, results_case


@dataclass(frozen=True)
class Kind:
    """One kind of input; `check` raises AssertionError or what must not be raised. `share`: its part of the cases."""

    name: str
    text: str
    share: int
    make: Callable[[random.Random], Any]
    check: Callable[[Any, Path], None]
    prepare: Callable[[], Any] = tuple  # what takes longer than a case may


TOOL = {
    "name": "dim", "description": "Dim a lamp", "parameters": {"type": "object", "properties": {
        "pct": {"type": "integer", "minimum": 0, "maximum": 100}, "room": {"type": "string", "pattern": "^[a-z]+$"},
        "modes": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
        "when": {"anyOf": [{"type": "string", "format": "date"}, {"$ref": "#/$defs/t"}]},
        "more": {"type": "object", "additionalProperties": {"type": ["number", "null"]}}},
        "required": ["pct"], "$defs": {"t": {"type": "object", "properties": {"at": {"$ref": "#/$defs/t"}}}}},
}  # fmt: skip
_KEYWORDS = (
    "type", "properties", "items", "anyOf", "allOf", "oneOf", "not", "if", "then", "$ref", "$defs", "required", "enum",
    "const", "pattern", "format", "patternProperties", "additionalProperties", "uniqueItems", "minimum", "multipleOf",
    "nullable", "dependentSchemas", "propertyNames", "$schema", "$id", "$dynamicRef", "contains", "minItems", "default",
    "unevaluatedItems",
)  # fmt: skip
_SCHEMA_VALUES = (
    "object", "any", "List[int]", "#", "#/$defs/t", "http://x.example/s", "^(a+)+$", "(", "\\p{L}", -1, 0.0, "draft",
    "http://json-schema.org/draft-04/schema#", {"$ref": "#"}, [{"$ref": "#"}], {}, True,
)  # fmt: skip


def schema_case(chance: random.Random) -> dict[str, Any]:
    tool = copy.deepcopy(TOOL)
    for _ in range(chance.randint(1, 4)):
        if chance.random() < 0.5:
            holder = chance.choice([one for one in parts(tool).values() if isinstance(one, dict)])
            holder[chance.choice(_KEYWORDS)] = copy.deepcopy(chance.choice(_SCHEMA_VALUES))
        else:
            tool = mutated(tool, chance, [TOOL], 1)
        if not isinstance(tool, dict):
            break
    arguments = mutated(
        {"pct": 5, "room": "hall", "modes": ["a"], "when": {"at": {}}, "more": {"x": 1}}, chance, seeds()
    )
    return {"tool": tool, "arguments": arguments if isinstance(arguments, dict) else {"pct": arguments}}


def check_schema(case: dict[str, Any], folder: Path) -> None:
    path = folder / "tools.json"
    path.write_text(json.dumps([case["tool"]]), encoding="utf-8")
    with contextlib.suppress(UserError):
        load_tools_file(path)
    try:
        tools = normalize_tools([case["tool"]])
    except RowError:
        return
    call = {"name": tools[0]["function"]["name"], "arguments": case["arguments"]}
    schema = tools[0]["function"].get("parameters")
    schemas = ToolSchemas(tools)
    assert schemas.is_valid(call) in (True, False, None)
    schemas.problems(call)
    if schema:
        schema_errors(schema, case["arguments"])
        unchecked_keywords(schema)
    for name in ("qwen-xml", "chatml"):
        get_format(name).parse(
            f"<tool_call>\n<function={call['name']}>\n<parameter=pct>\n5\n</parameter>\n</function>", tools
        )
    from finetune.synthetic.generate import generate

    with contextlib.suppress(UserError):
        generate(tools, per_tool=2)


@cache
def answer_seeds(pair: int) -> list[str]:
    """Answers as a format writes them."""
    from formats import encode

    tokenizer, fmt, *_ = loaded_pair(pair)
    texts = ["Hello", "", '{"name": "dim", "parameters": {"pct": 5}}', "[dim(pct=5, room='a')]"]
    for row in seeds():
        with contextlib.suppress(RowError):
            for sequence in encode(normalize_row(row), tokenizer, fmt, allow_unreadable_calls=True).sequences:
                trained = [label for label in sequence.labels if label >= 0]
                texts.append(tokenizer.decode(trained))
    return texts


def text_case(chance: random.Random) -> dict[str, Any]:
    pair = chance.randrange(len(PAIRS))
    text = chance.choice(answer_seeds(pair))
    for _ in range(chance.randint(1, 5)):
        at, other = chance.randint(0, len(text)), chance.choice(answer_seeds(pair))
        new = chance.choice((chance.choice(FRAGMENTS), other, text[: chance.randint(0, 40)], ALL_ATTACKS))
        new *= chance.choice((1, 1, 1, 1, 50))
        text = text[:at] + new + text[at + chance.choice((0, 1, 5, 30)) :]
    return {"pair": pair, "text": text, "tools": mutated([TOOL], chance, seeds(), 1)}


def check_text(case: dict[str, Any], folder: Path) -> None:
    _, fmt, *_ = loaded_pair(case["pair"])
    try:
        tools = normalize_tools(case["tools"])
    except RowError:
        tools = normalize_tools([TOOL])
    from formats.registry import FORMATS

    others = [one for one in FORMATS.values() if one.read_calls is not None]
    for one in (fmt, others[len(case["text"]) % len(others)]):
        parsed = one.parse(case["text"], tools)
        assert isinstance(parsed.content, str)
        for call in parsed.tool_calls:
            assert set(call) == {"name", "arguments"}, f"{one.name}: a call is {call}"
            assert isinstance(call["name"], str) and call["name"].strip() and isinstance(call["arguments"], dict)
        json.dumps(parsed.tool_calls, allow_nan=False)
        assert all(isinstance(error, str) and error and "\n" not in error for error in parsed.errors), parsed.errors


YAML = 'start: "<call>"\nseparator: "|"\nend: "</call>"\ntools: system\n'


def yaml_case(chance: random.Random) -> dict[str, Any]:
    if chance.random() < 0.5:
        return {"data": edited(YAML.encode(), chance)}
    value = mutated({"start": "<call>", "separator": "|", "end": "</call>", "tools": "system"}, chance, seeds(), 3)
    return {"data": json.dumps(value).encode("utf-8", "replace")}


def check_yaml(case: dict[str, Any], folder: Path) -> None:
    path = folder / "own.yaml"
    path.write_bytes(case["data"])
    tokenizer = loaded_pair(0)[0]
    try:
        fmt = get_format(str(path), tokenizer)
    except FormatError as error:
        assert str(path) in str(error)
        return
    from formats import encode

    assert fmt.parse("<call>dim|{}</call>") is not None
    with contextlib.suppress(FormatError):
        encode(
            {"messages": [{"role": "user", "content": "Dim"}, {"role": "assistant", "content": "Done"}]}, tokenizer, fmt
        )


KINDS = (
    Kind("rows", "rows of every shape, encoded", 47, row_case, check_row, load_pairs),
    Kind("files", "JSONL, JSON, CSV, Parquet and Arrow files", 15, file_case, check_file),
    Kind("texts", "generated text, every format's parser", 15, text_case, check_text, load_pairs),
    Kind("schemas", "tool schemas and arguments", 10, schema_case, check_schema),
    Kind("configs", "run folders, recipes, sweeps", 3, config_case, check_config, load_pairs),
    Kind("logs", "training_log.csv", 2, log_case, check_log),
    Kind("results", "files of an evaluation", 4, results_case, check_results),
    Kind("formats", "format YAML", 4, yaml_case, check_yaml, load_pairs),
)
