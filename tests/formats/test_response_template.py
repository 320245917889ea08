"""Transformers' own parser with the response template of a format, against `Format.parse`."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import pytest

from finetune.runs.saving import checked_response_template, with_format
from formats import FORMATS, FormatError, get_format
from formats.base import clean_messages, render_messages
from formats.escape import escape_conversation
from formats.response_template import example_answers, response_template
from tests import parts
from tests.formats import own_templates
from tests.formats.cases import ROWS
from tests.formats.fuzz import conversation
from tests.formats.pairs import PAIRS, Pair
from tests.formats.public_templates import tokenizer_with
from tests.helpers import lazy
from tests.scripts import ROOT

chat_parsing = lazy("transformers.utils.chat_parsing")

# Values without types need the tools' schemas, which servers do not pass; Python lists are not JSON.
INEXPRESSIBLE = {"qwen-xml", "gemma", "llama3-pythonic", "tool-reasoning"}


def answers(fmt, tokenizer, rows=None):
    """(prompt, answer) of every assistant turn of the conversations that the format can write."""
    for made in rows or ROWS.values():
        for index, message in enumerate(made["messages"]):
            if message["role"] != "assistant":
                continue
            try:
                messages = clean_messages(made["messages"][: index + 1], fmt)
                prompt = render_messages(messages[:-1], made["tools"], fmt, tokenizer, add_generation_prompt=True)
                text = render_messages(messages, made["tools"], fmt, tokenizer)
            except Exception:  # a template that cannot express the row raises anything
                continue
            if text.startswith(prompt):
                yield prompt, text[len(prompt) :]


def read(text: str, template: dict, prefix: str = "", pieces: bool = False) -> tuple[list[dict], str]:
    """(calls, content without differences of white space) as Transformers reads them."""
    if not pieces:
        message = chat_parsing.parse_response(text, template, prefix=prefix)
    else:
        parser = chat_parsing.ResponseParser(template, prefix=prefix)
        for start in range(0, len(text), 3):
            parser.feed(text[start : start + 3])
        message, _ = parser.finalize()
    assert all(call["type"] == "function" for call in message.get("tool_calls", []))
    return [call["function"] for call in message.get("tool_calls", [])], " ".join(message.get("content", "").split())


def own(text: str, fmt) -> tuple[list[dict], str]:
    parsed = fmt.parse(text)
    return parsed.tool_calls, " ".join(parsed.content.split())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_transformers_reads_what_parse_reads(pair: Pair):
    tokenizer, fmt = pair.load()
    template = response_template(fmt, tokenizer)
    if fmt.name in INEXPRESSIBLE or fmt.untyped:
        assert template is None
        return
    assert checked_response_template(fmt, tokenizer) == template
    assert json.loads(json.dumps(template)) == template
    turns = list(answers(fmt, tokenizer))
    assert len(turns) > 20
    for prompt, text in turns:
        assert read(text, template, prompt) == own(text, fmt), text


CHATML_TEXTS = [
    '<tool_call>{"name": "f", "arguments": {"a": "</tool_call> {"}}</tool_call>',
    'So.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
    '{"name": "g", "arguments": {"x": [1.5]}}\n</tool_call> Done.<|im_end|>\n<|im_end|>',
    '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>',
    "<tool_call>[1]</tool_call> and <tool_call>",
    'First <tool_call>{"name": "f"</tool_call> then <tool_call>{"name": "g", "arguments": {}}</tool_call>',
    "Plain <b>text</b> with { and }.<|im_end|>",
    "",
]


@pytest.mark.parametrize("pieces", [False, True], ids=["complete", "streamed"])
@pytest.mark.parametrize("text", CHATML_TEXTS)
def test_malformed_calls_stay_in_the_content(text, pieces):
    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    template = response_template(fmt, tokenizer)
    assert read(text, template, pieces=pieces) == own(text, fmt)


def test_reasoning_is_a_field_of_its_own():
    tokenizer = parts.tokenizer("qwen3")
    fmt = get_format("qwen", tokenizer)
    template = response_template(fmt, tokenizer)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    message = chat_parsing.parse_response("<think>\nwhy\n</think>\n\nSo.<|im_end|>", template, prefix=prompt)
    assert (message["thinking"], message["content"]) == ("why", "So.")
    message = chat_parsing.parse_response("So.<|im_end|>", template, prefix=prompt + "<think>\n\n</think>\n\n")
    assert message == {"role": "assistant", "content": "So."}


def test_custom_format_has_a_template(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('start: "<<"\nseparator: " with "\nend: ">>"\ntools: system\n', encoding="utf-8")
    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format(str(path), tokenizer)
    template = checked_response_template(fmt, tokenizer)
    for text in ('Now <<f with {"a": ">>"}>><|im_end|>', "<<f with {>>", '<<f.g with {}>><<h with {"b": {}}>>'):
        assert read(text, template) == own(text, fmt)


@pytest.mark.parametrize("style", ["name before JSON", "JSON list", "a list for each call", "tagged XML"])
def test_derived_calls_have_a_template(style):
    """JSON calls can be expressed; values without JSON cannot, and then there is no template."""
    tokenizer = tokenizer_with(own_templates.STYLES[style])
    fmt = get_format("native", tokenizer)
    template = checked_response_template(fmt, tokenizer)
    if style == "tagged XML":
        assert template is None
        return
    turns = list(answers(fmt, tokenizer))
    assert len(turns) > 20
    for prompt, text in turns:
        assert read(text, template, prompt) == own(text, fmt), text


FIRST = [pair for pair in {pair.format: pair for pair in reversed(PAIRS)}.values() if pair.format not in INEXPRESSIBLE]


@pytest.mark.parametrize("pair", FIRST, ids=str)
def test_generated_answers_read_alike(pair: Pair):
    """Hostile texts, names and values, with the control tokens of the contents marked as `decode` marks them."""
    tokenizer, fmt = pair.load()
    template = response_template(fmt, tokenizer)
    for seed in range(5):
        made = conversation(seed)
        try:
            messages = clean_messages(made["messages"], fmt)
        except FormatError:  # a row that the format cannot express
            continue
        messages, tools, _ = escape_conversation(messages, made["tools"], tokenizer, fmt)
        for prompt, text in answers(fmt, tokenizer, [{"messages": messages, "tools": tools}]):
            assert read(text, template, prompt) == own(text, fmt), text


def test_vllm_reads_alike(monkeypatch):
    """vLLM's copy of the parser, in the environment that `make test-servers` builds."""
    found = next(ROOT.glob(".cache/vllm/lib/python3*/site-packages/vllm/parser/chat_parsing/__init__.py"), None)
    if found is None:
        pytest.skip("vLLM is not installed: make test-servers")
    spec = importlib.util.spec_from_file_location("vllm_chat_parsing", found)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
    monkeypatch.setitem(globals(), "chat_parsing", sys.modules[spec.name])
    for pair in FIRST:
        tokenizer, fmt = pair.load()
        template = response_template(fmt, tokenizer)
        for prompt, text in answers(fmt, tokenizer):
            for pieces in (False, True):
                assert read(text, template, prompt, pieces) == own(text, fmt), (pair, text)


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_stale_template_of_the_base_is_not_kept(name, tmp_path):
    """It is among the tokenizer's attributes and among what save_pretrained copies."""
    tokenizer = copy.deepcopy(parts.tokenizer("smollm2"))
    stale = {"start_anchor": "<old>", "fields": {"content": {"content": "text"}}}
    tokenizer.response_template = stale
    tokenizer.init_kwargs["response_template"] = stale
    tokenizer.save_pretrained(tmp_path / "base")
    base = type(tokenizer).from_pretrained(tmp_path / "base")
    assert base.response_template == stale
    fmt = get_format("chatml", tokenizer) if name == "chatml" else FORMATS["gemma"]
    with_format(base, fmt).save_pretrained(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text("utf-8")).get("response_template")
    assert written == (None if name == "gemma" else response_template(fmt, tokenizer))
    assert base.response_template == stale  # the caller's own


def test_control_tokens_are_named_for_servers(tmp_path):
    tokenizer = parts.tokenizer("qwen3")
    with_format(tokenizer, get_format("qwen", tokenizer)).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_control_tokens"]
    assert {"<tool_call>", "</tool_response>", "<think>"} <= set(named) and "<|im_end|>" not in named


def test_example_answers_hold_calls():
    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    texts = [fmt.parse(text) for _, text in example_answers(fmt, tokenizer)]
    assert [parsed.content for parsed in texts] == ["It is 7.", "", ""]
    assert [[call["name"] for call in parsed.tool_calls] for parsed in texts] == [[], ["f1"], ["f1", "f2"]]
