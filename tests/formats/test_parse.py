"""Generated text back to content and calls."""

from __future__ import annotations

import pytest

from formats import FORMATS
from formats.builtin.llama3 import parse as parse_llama3
from formats.calls import parse_function_tag, parse_hermes

HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": {"b": "}</tool_call>"}}}\n</tool_call>'
FUNCTION = '<function=f>{"a": {"b": "}</function>"}}</function>'
F = {"name": "f", "arguments": {"a": {"b": "}</tool_call>"}}}
G = {"name": "f", "arguments": {"a": {"b": "}</function>"}}}


@pytest.mark.parametrize(
    "parse,text,content,tool_calls,errors",
    [
        (parse_hermes, HERMES, "", [F], 0),
        (parse_hermes, f"See.\n{HERMES}\n{HERMES} ok", "See.\n\n ok", [F, F], 0),
        (
            parse_hermes,
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            "",
            [{"name": "f", "arguments": {}}],
            0,
        ),
        (parse_hermes, '<tool_call>\n{"name": "f", "arg', None, [], 1),
        (parse_hermes, '<tool_call>\n{"name": "f", "arguments": {}}', None, [], 1),
        (parse_hermes, "<tool_call>\n{'name': 'f'}\n</tool_call>", None, [], 1),
        (parse_hermes, '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>', None, [], 1),
        (parse_hermes, '<tool_call>\n{"name": "f", "arguments": {"x": NaN}}\n</tool_call>', None, [], 1),
        (parse_hermes, f"<tool_call>\nbroken\n{HERMES}", "<tool_call>\nbroken", [F], 1),
        (parse_hermes, "no call", "no call", [], 0),
        (parse_hermes, "", "", [], 0),
        (parse_function_tag, FUNCTION, "", [G], 0),
        (parse_function_tag, f"네. {FUNCTION}{FUNCTION}", "네.", [G, G], 0),
        (
            parse_function_tag,
            "<function=POST /db/node>{}</function>",
            "",
            [{"name": "POST /db/node", "arguments": {}}],
            0,
        ),
        (parse_function_tag, '<function=f>{"a": 1', None, [], 1),
        (parse_function_tag, '<function=f>{"a": 1}', None, [], 1),
        (parse_function_tag, "<function=f", None, [], 1),
        (parse_function_tag, "<function=>{}</function>", None, [], 1),
        (parse_function_tag, "<function=f>[1]</function>", None, [], 1),
        (parse_function_tag, "<function=f>{a}</function> then " + FUNCTION, "<function=f>{a}</function> then", [G], 1),
        (parse_llama3, '{"name": "f", "parameters": {"a": {}}}', "", [{"name": "f", "arguments": {"a": {}}}], 0),
        (parse_llama3, '<|python_tag|>{"name": "f", "parameters": {}}', "", [{"name": "f", "arguments": {}}], 0),
        (
            parse_llama3,
            '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}',
            "",
            [{"name": "f", "arguments": {}}] * 2,
            0,
        ),
        (
            parse_llama3,
            '{"type": "function", "name": "f", "parameters": {}}',
            "",
            [{"name": "f", "arguments": {}}],
            0,
        ),
        (parse_llama3, '{"type": "function", "name": "f", "param', None, [], 1),
        (parse_llama3, '{"type": "river", "name": "Rhine"}', '{"type": "river", "name": "Rhine"}', [], 0),
        (parse_llama3, '{"name": "f", "parameters": {"a": ', None, [], 1),
        (parse_llama3, '{"name": "f", "parameters": {}} trailing', None, [], 1),
        (parse_llama3, '{"city": "Oslo"}', '{"city": "Oslo"}', [], 0),
        (parse_llama3, '{"name": "Oslo"}', None, [], 1),
    ],
)
def test_parse(parse, text, content, tool_calls, errors):
    parsed = parse(text)
    assert parsed.tool_calls == tool_calls
    assert len(parsed.errors) == errors
    assert parsed.content == (text.strip() if content is None else content)


@pytest.mark.parametrize(
    "name,text",
    [
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'),
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
        ("llama3-function", '<function=f>{"a": {"b": 1, "b": 1}}</function>'),
        ("llama3", '{"name": "f", "name": "g", "parameters": {}}'),
        (
            "qwen-xml",
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        ),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1, "a": 2}'),
        ("gemma", "[f(a=1, a=2)]"),
        ("llama3-pythonic", "[f(a={'x': 1, 'x': 2})]"),
        ("llama3-pythonic", "[f(a=1e999)]"),
        ("llama3-pythonic", f"[f(a=-0x{'f' * 4000})]"),
        ("gemma", f"[f(a={'[' * 64}{']' * 64})]"),
        ("qwen", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("qwen", r'<tool_call>{"name": "f", "arguments": {"a": "\ud83d"}}</tool_call>'),
        ("llama3", r'{"name": "f", "parameters": {"\ude00": "\ud83d\ude00"}}'),
        ("gemma", r"[f(a='\ud83d')]"),
        ("phi4-mini", "<|tool_call|>[]<|/tool_call|>"),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}] and then?'),
    ],
)
def test_ambiguous_calls_are_errors(name, text):
    """What two parsers could read differently."""
    parsed = FORMATS[name].parse(text)
    assert (parsed.tool_calls, parsed.content, len(parsed.errors)) == ([], text, 1)


def test_surrogate_pair_is_one_character():
    parsed = FORMATS["qwen"].parse(r'<tool_call>{"name": "f", "arguments": {"a": "\ud83d\ude00"}}</tool_call>')
    assert (parsed.errors, parsed.tool_calls[0]["arguments"]) == ([], {"a": "😀"})


@pytest.mark.parametrize(
    "name,opening,closing", [("phi4-mini", "<|tool_call|>", "<|/tool_call|>"), ("mistral", "[TOOL_CALLS] ", "")]
)
def test_all_lists_of_calls_are_parsed(name, opening, closing):
    one = f'{opening}[{{"name": "f", "arguments": {{}}}}]{closing}'
    parsed = FORMATS[name].parse(f"So. {one}{one}")
    assert (parsed.content, parsed.tool_calls, parsed.errors) == ("So.", [{"name": "f", "arguments": {}}] * 2, [])
    parsed = FORMATS[name].parse(f"{one}{opening}[{{")
    assert (parsed.content, len(parsed.tool_calls), len(parsed.errors)) == (f"{opening}[{{", 1, 1)


def test_untyped_values_follow_the_schema():
    properties = {
        "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "b": {"enum": ["1", "2"]},
        "c": {"type": ["integer", "null"]},
        "d": {"type": "number"},
        "e": {"type": [{}]},
    }
    values = {"a": "7", "b": "1", "c": "null", "d": "NaN", "e": "07"}
    tools = [{"name": "f", "parameters": {"properties": properties}}, {"name": "g", "parameters": []}]
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>" for key, text in values.items())
    parsed = FORMATS["qwen-xml"].parse(f"<tool_call><function=f>{body}</function></tool_call>", tools)
    assert parsed.tool_calls[0]["arguments"] == {"a": "7", "b": "1", "c": None, "d": "NaN", "e": "07"}


def test_parse_stops_at_end_of_turn_and_splits_reasoning():
    parsed = FORMATS["qwen"].parse(f"<think>\nwhy\n</think>\n\nSo.\n{HERMES}<|im_end|>\n<|im_start|>user")
    assert (parsed.reasoning_content, parsed.content, parsed.tool_calls) == ("why", "So.", [F])
    # A lone closing tag ends reasoning where the prompt opens it, and is text elsewhere.
    assert FORMATS["qwen-xml"].parse("why\n</think>\n\nSo.").reasoning_content == "why"
    assert FORMATS["chatml"].parse("why\n</think>\n\nSo.").reasoning_content is None
    assert FORMATS["qwen"].parse("Write <think> and </think>.").content == "Write <think> and </think>."


@pytest.mark.parametrize("parse,opening", [(parse_hermes, "<tool_call>"), (parse_function_tag, "<function=")])
def test_many_malformed_calls_are_all_reported(parse, opening):
    parsed = parse(opening * 20_000)
    assert len(parsed.errors) == 20_000 and parsed.content == opening * 20_000
