"""The Go templates for Ollama, rendered by Go's text/template, against the Jinja templates."""

from __future__ import annotations

import json
import random

import pytest

from finetune.export.ollama import go_template, known_format, modelfile, stop_strings
from formats import FORMATS, FormatError, get_format
from formats.base import clean_messages, render_messages
from tests import ollama, parts
from tests.formats import fuzz
from tests.formats.cases import ROWS, calls, result, row, says, system, tool, user

SERVED = [name for name, fmt in FORMATS.items() if fmt.ollama and not fmt.ollama.refused]
# What our template refuses and a chat had better not: an empty answer, an answer before any question.
LENIENT = {"empty_answer", "greets_first", "untrained_greeting"}
TRIMMING = {"llama3", "qwen-xml"}
THINKING = {"reasoning", "think_in_content", "half_think"}  # reasoning is off under Ollama

SCHEMAS = tool(
    "plan",
    'Plans "it" <soon> & well, até logo \u200b😀',
    depth={"type": ["integer", "null"], "description": "Level"},
    kind={"type": "string", "enum": ["a<b", 1, 2.5, None, True]},
    list={"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    nested={
        "type": "object",
        "properties": {"z": {"type": "string"}, "a": {"type": "array", "items": {"type": "string"}}},
        "required": ["z"],
    },
    none={"type": "object"},
    other={"anyOf": [{"type": "string"}, {"type": "object", "properties": {"k": {"type": "boolean"}}}]},
)
HARD = {
    "schemas": row(system("S"), user("plan"), tools=(SCHEMAS, SCHEMAS)),
    "arguments": row(
        user("go"),
        calls(("plan", {"a": {}, "b": [], "c": [[], {}], "d": None, "e": "\b\f\r\t\x01\\ \"<&>' é 😀", "f": [1, 0.5]})),
        result('say "<b>" & \\ \n end'),
        tools=(SCHEMAS,),
    ),
    "long": row(
        user("a"), says("b"), user("c"), calls(("plan", {"depth": 1})), result("007"), result("x"), says("  d \n"),
        user("\n e 끝 "), tools=(SCHEMAS,),
    ),
}  # fmt: skip


def prompts(name: str) -> list[tuple[str, dict]]:
    """(case, row that ends where the assistant answers) of hand-written and generated conversations."""
    cases = {**ROWS, **HARD}
    if name in THINKING or name.startswith("qwen"):
        cases = {case: given for case, given in cases.items() if case not in THINKING}
    for seed in range(40):
        made = fuzz.conversation(seed)
        if "think>" not in json.dumps(made) and _exact_numbers(made) and (name not in TRIMMING or _plain_ends(made)):
            cases[f"seed {seed}"] = made
    found = []
    for case, given in cases.items():
        messages = list(given["messages"])
        # Cut at a random answer.
        ends = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i] or [len(messages)]
        messages = messages[: random.Random(case).choice(ends)]
        if messages[-1]["role"] != "assistant":
            found.append((case, {"messages": clean_messages(messages), "tools": given["tools"]}))
    return found


def _plain_ends(given: dict) -> bool:
    """Whether no content begins or ends with non-ASCII white space, which the Go templates do not trim."""
    texts = [message["content"] for message in given["messages"]]
    return all(text.strip() == text.strip(" \t\n\r\v\f\x1c\x1d\x1e\x1f") for text in texts)


def _exact_numbers(given: dict) -> bool:
    """Whether there is no float: Go writes exponents differently."""
    numbers: list[float] = []

    def walk(value) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, float):
            numbers.append(value)

    walk(given["messages"])
    return not numbers


@pytest.mark.parametrize("name", SERVED)
def test_go_template_renders_as_our_own(name):
    tokenizer = parts.tokenizer("smollm2")
    fmt = FORMATS[name]
    cases = prompts(name)
    theirs = ollama.render(go_template(fmt), [given for _, given in cases])
    compared = 0
    for (case, given), text in zip(cases, theirs, strict=True):
        if name == "plain" and given["tools"]:
            continue  # Ollama refuses tools where the template does not mention them
        same = ollama.normalized(given)
        try:
            ours = render_messages(
                same["messages"], same["tools"], fmt, tokenizer, True, bos_token="", eos_token=fmt.end_of_turn[0]
            )
        except Exception:  # templates raise anything
            ours = None
        if ours is None and text is not None:
            if name.startswith("mistral"):
                continue  # only our template checks the order of roles
            assert case in LENIENT, case
            continue
        assert text == ours, case
        compared += ours is not None
    assert compared >= (20 if name in ("plain", "mistral-v1") else 40)


@pytest.mark.parametrize("name", ["gemma", "llama3-pythonic"])
def test_formats_without_json_calls_are_refused(name):
    with pytest.raises(FormatError, match="Ollama reads calls only where they are JSON"):
        go_template(FORMATS[name])


def test_modelfile_stops_at_every_end_of_turn():
    fmt = get_format("kanana", parts.tokenizer("llama3"))
    text = modelfile(fmt, "m-q8_0.gguf", context=4096)
    assert text.startswith('FROM ./m-q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|eom_id|>"\n' in text
    assert "PARAMETER num_ctx 4096\n" in text
    assert text.count('"""') == 2
    assert stop_strings(FORMATS["plain"])[1:] == ["\nUser:", "\nAssistant:", "\nSystem:"]


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("chatml", "qwen3"),
        ("qwen", "qwen3"),
        ("qwen-xml", "qwen3-coder"),
        ("mistral-v13", "ministral"),
        ("mistral-v3", None),
        ("mistral-v11", None),
        ("llama3", None),
    ],
)
def test_modelfile_names_ollama_parsers(name, parser):
    lines = [line for line in modelfile(FORMATS[name], "m.gguf").splitlines() if line.startswith("PARSER")]
    assert lines == ([f"PARSER {parser}"] if parser else [])


def test_native_template_is_served_by_its_equal():
    tokenizer = parts.tokenizer("qwen2.5")
    assert known_format(get_format("native", tokenizer), tokenizer).name == "qwen"


def test_template_of_another_version_is_refused():
    from dataclasses import replace

    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    older = replace(fmt, template=fmt.template.replace("You can call functions.", "You may call functions."))
    with pytest.raises(FormatError, match="another version of the chatml template"):
        known_format(older, tokenizer)
    with pytest.raises(FormatError, match="like no format with an Ollama template"):
        known_format(get_format("native", tokenizer), tokenizer)
