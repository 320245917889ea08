"""The parser plugin for vLLM, loaded from an exported folder with fakes of vLLM's base classes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shlex
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.export.vllm import parser_of, serve_command, served_base, write_plugin
from finetune.export.vllm_rules import PARSER_TOKENS, check_adapter, max_lora_rank
from finetune.models.bundled import smollm2_dir
from finetune.runs.find import Run
from formats import FORMATS, IGNORE_INDEX, choose_format, encode, get_format
from tests import parts
from tests.formats import own_templates
from tests.formats.cases import CLOCK, calls, row, says, tool, user
from tests.formats.public_templates import load, tokenizer_with

# Modules of vLLM's messages and base class, newest layout first.
LAYOUTS = {
    "0.32": ("vllm.entrypoints.generate.base.protocol", "vllm.tool_parsers.abstract_tool_parser"),
    "0.31": ("vllm.entrypoints.generate.base.protocol", "vllm.tool_parsers.abstract_tool_parser"),
    "2026": ("vllm.entrypoints.openai.engine.protocol", "vllm.tool_parsers.abstract_tool_parser"),
    "2025": ("vllm.entrypoints.openai.protocol", "vllm.entrypoints.openai.tool_parsers.abstract_tool_parser"),
}


class Record(types.SimpleNamespace):
    """A message of vLLM: keyword arguments become attributes."""


class ToolParser:
    """Constructor and state of vLLM's base class; `tools` was added in 2026."""

    def __init__(self, tokenizer, tools=None):
        self.prev_tool_call_arr, self.streamed_args_for_tool = [], []
        self.current_tool_id, self.current_tool_name_sent = -1, False
        self.model_tokenizer, self.tools = tokenizer, tools

    def adjust_request(self, request):
        return request


class ToolParserManager:
    found: dict = {}  # noqa: RUF012

    @classmethod
    def register_module(cls, name=None, force=True, module=None):
        cls.found[name] = module


@pytest.fixture
def vllm(monkeypatch):
    """A function that installs the fakes in one layout."""

    def install(layout: str) -> None:
        protocol, base = LAYOUTS[layout]
        call_ids = "vllm.renderers.chat_utils" if layout == "0.32" else "vllm.entrypoints.chat_utils"
        numbers = itertools.count()
        contents = {
            call_ids: {"make_tool_call_id": lambda: f"id{next(numbers)}"},
            protocol: dict.fromkeys(
                ("DeltaFunctionCall", "DeltaMessage", "DeltaToolCall", "ExtractedToolCallInformation", "FunctionCall",
                 "ToolCall"), Record,
            ),
            base: {"ToolParser": ToolParser, "ToolParserManager": ToolParserManager},
        }  # fmt: skip
        for name, members in contents.items():
            parents = name.split(".")
            for depth in range(1, len(parents) + 1):
                full = ".".join(parents[:depth])
                if full not in sys.modules:
                    module = types.ModuleType(full)
                    module.__path__ = []
                    monkeypatch.setitem(sys.modules, full, module)
                if depth > 1:
                    setattr(sys.modules[".".join(parents[: depth - 1])], parents[depth - 1], sys.modules[full])
            vars(sys.modules[name]).update(members)

    return install


def load_plugin(folder: Path):
    spec = importlib.util.spec_from_file_location("sandwich_tool_parser", folder / "sandwich_tool_parser.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return ToolParserManager.found["sandwich"]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
REQUEST = Record(tools=TOOLS, tool_choice="auto", skip_special_tokens=True)

FUNCTION_TEXTS = [
    "Just text, with < and <func and </function> in it.",
    '<function=f>{"a": 1}</function>',
    'Let me look.\n<function=f>{"a": "x>y</function>"}</function>',
    '<function=f>{}</function><function=g.h>{"ü": ["<function=", {"b": null}]}</function> Done.',
    '<function=f>{"a": 1}</function>\n and\n<function=f>{"a": 2}</function>',
    '<function=f>{"a": 1</function> then <function=f>{"a": 2}</function>',
    "<function=f>[1]</function>",
    "<function=>{}</function>",
    '<function=f>{"a": 1}',
    '<function=f>{"a": "cut',
    "<function=f",
    '<function=POST /db/node>{"Assign": {"1": {"X": 0.5}}}</function>',
    '<function=f>{"a": 1} x</function>',
    "",
]
HERMES_TEXTS = [
    "Just text, with < and <tool and </tool_call> in it.",
    '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> {"}}\n</tool_call>',
    'So.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
    '{"name": "g", "arguments": {"x": [1.5]}}\n</tool_call> Done.',
    '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>, <tool_call>{"name": "g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1',
    "<tool_call>[1]</tool_call> and <tool_call>",
]
TEXTS = {
    "llama3-function": FUNCTION_TEXTS,
    "kanana": [*FUNCTION_TEXTS, '<|python_tag|>{"code": "1"}', 'so <|python_tag|>{"code": "1"} ok', "<|python_tag|>{"],
    "chatml": HERMES_TEXTS,
    "qwen": HERMES_TEXTS,
    "phi4-mini": [
        "No call.",
        '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]<|/tool_call|>',
        'Text <|tool_call|>[{"name": "f", "arguments": {"a": "]<|/tool_call|>"}}]<|/tool_call|> more',
        '<|tool_call|>[{"name": "f"}]<|/tool_call|>',
        "<|tool_call|>[]<|/tool_call|> none",
        '<|tool_call|>[{"name": "f", "arguments": {}}',
    ],
    "mistral-v11": [
        "Just text, with [TOOL] in it.",
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": "[ARGS]"}[TOOL_CALLS]g[CALL_ID]abcdefghj[ARGS]{}',
        'Let me look.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}',
        "Let me look.[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{",
    ],
    # vLLM's own parser takes only names of ASCII letters for calls.
    "llama3-pythonic": [
        "Just text, with [f(a=1)] in it.",
        "[예약하기(인원=2, 날짜='3월 1일'), _f(_x=None)]",
        "[1, 2] are numbers",
        "[f(a=1)",
        "<|python_tag|>[f(a=[1.5, true])]",
    ],
}  # fmt: skip


def plugin_for(name: str, folder: Path):
    write_plugin(folder, Run("x", None, None), FORMATS[name])
    return load_plugin(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEXTS)
def test_plugin_finds_what_parse_finds(name, layout, vllm, tmp_path):
    vllm(layout)
    parser_class = plugin_for(name, tmp_path)
    tokenizer = Record(convert_tokens_to_ids=len, chat_template=None, added_tokens_decoder={})
    fmt = FORMATS[name]
    rng = random.Random(0)
    for text in TEXTS[name]:
        parsed = fmt.parse(text)
        complete = parser_class(tokenizer).extract_tool_calls(text, REQUEST)
        # vLLM 0.32 returns the raw text unless "tools_called" is set, and looks at the calls for the finish reason.
        assert complete.tools_called == bool(parsed.tool_calls or (layout == "0.32" and parsed.content != text))
        assert [(c.function.name, json.loads(c.function.arguments)) for c in complete.tool_calls] == [
            (call["name"], call["arguments"]) for call in parsed.tool_calls
        ]
        assert (complete.content or "") == parsed.content
        for end in ("", fmt.end_of_turn[0]):
            content, calls, early = streamed(parser_class(tokenizer, TOOLS), text, end, rng, fmt)
            assert calls == parsed.tool_calls, text
            if end:  # after the end token, all content is final
                assert content == parsed.content, text
            assert parsed.content.startswith(content)
            if not parsed.tool_calls and not parsed.errors and text.strip("[") == text and "<" not in text and text:
                assert early, "plain text is streamed at once"


def test_plugin_reads_calls_on_lines(vllm, tmp_path):
    """Calls without an end: in a stream their reason, and a text that only begins like one, wait for the end."""
    vllm("0.32")
    parser_class = plugin_for("tool-reasoning", tmp_path)
    tokenizer = parts.tokenizer("mistral-v1")
    fmt = get_format("tool-reasoning", tokenizer)
    rng = random.Random(0)
    for text in (
        'Tool: f\nParameters: {"a": "x"}\nReasoning: It is one.',
        'First.\nTool: f\nParameters: {}\nTool: g h\nParameters: {"b": [1]}\nReasoning: Two.',
        "Tool: hammer, and no call",
        "Just text,\nTo be long.",
        "Tool: f\nParameters: {",
    ):
        parsed = fmt.parse(text)
        complete = parser_class(tokenizer).extract_tool_calls(text, REQUEST)
        assert (complete.content or "", len(complete.tool_calls)) == (parsed.content, len(parsed.tool_calls))
        content, calls, early = streamed(parser_class(tokenizer, TOOLS), text, "</s>", rng, fmt)
        assert (content, calls) == (parsed.content, parsed.tool_calls)
        assert early == text.startswith(("First", "Just"))


def test_reasoning_that_the_prompt_opened_is_no_content(vllm, tmp_path):
    vllm("0.32")
    tokenizer = tokenizer_with(own_templates.ALWAYS_THINKS)
    write_plugin(tmp_path, Run("x", None, None), get_format("native", tokenizer))
    parser = load_plugin(tmp_path)(tokenizer, TOOLS)
    text = "Look at <c>f {</c>.\n</think>\n\nSo: <c>f {}</c>"
    content, found, _ = streamed(parser, text, own_templates.END, random.Random(0), parser.format)
    assert (content, found) == ("So:", [{"name": "f", "arguments": {}}])
    answer = parser.extract_tool_calls("Look.\n</think>\n\nSo.", REQUEST)
    assert (answer.content, answer.tool_calls, answer.tools_called) == ("So.", [], True)  # or vLLM returns the raw text


@pytest.mark.parametrize("style", ["cohere", "gptoss", "lfm2_v2", "glm4moe", *own_templates.STYLES])
def test_derived_calls_are_streamed(style, vllm, tmp_path):
    vllm("0.32")
    text = own_templates.STYLES.get(style)
    tokenizer = tokenizer_with(text) if text else load(style, "bytes")
    fmt, _ = choose_format(tokenizer)
    write_plugin(tmp_path, Run("x", None, None), fmt)
    plugin, rng = load_plugin(tmp_path), random.Random(0)
    one, two = ("clock", {"zone": "U, {T}C"}), ("job_run", {"n": 7})
    tools = (CLOCK, tool("job_run", n={"type": "integer"}))
    for answer in (says("It is [noon]."), calls(one), calls(one, two), calls(one, text="Let me look.")):
        made = encode(row(user("go"), answer, tools=tools), tokenizer, fmt)
        for sequence in made.sequences:
            ids = [label for label in sequence.labels if label != IGNORE_INDEX]
            text, end = tokenizer.decode(ids[:-1]), tokenizer.decode(ids[-1:])
            parsed = fmt.parse(text, list(tools))
            content, found, _ = streamed(plugin(tokenizer, list(tools)), text, end, rng, fmt)
            assert (content, found) == (parsed.content, parsed.tool_calls), text
            assert len(found) == len(answer.get("tool_calls", []))


def streamed(parser, text: str, end: str, rng: random.Random, fmt) -> tuple[str, list[dict], bool]:
    """(content, calls, whether content came before the last piece) of a text streamed in random pieces."""
    at, previous, content, calls, early = 0, "", "", [], False
    while at < len(text) or end:
        size = rng.randint(1, 7)
        piece, at = text[at : at + size], at + size
        ids = []
        if not piece:  # vLLM passes the end token's id, not its text
            ids, end = [parser.model_tokenizer.convert_tokens_to_ids(end)], ""
        delta = parser.extract_tool_calls_streaming(previous, previous + piece, piece, [], ids, ids, REQUEST)
        previous += piece
        if delta is None:
            continue
        early = early or bool(delta.content and at < len(text))
        content += delta.content or ""
        for call in delta.tool_calls:
            assert call.index == len(calls) and call.id and call.type == "function"
            calls.append({"name": call.function.name, "arguments": json.loads(call.function.arguments)})
    assert [call["name"] for call in parser.prev_tool_call_arr] == [call["name"] for call in calls]
    return content, calls, early


def test_special_tokens_are_kept_for_the_parser(vllm, tmp_path):
    vllm("0.32")
    parser = plugin_for("kanana", tmp_path)(Record(convert_tokens_to_ids=len))
    request = Record(tools=TOOLS, tool_choice="auto", skip_special_tokens=True)
    assert parser.adjust_request(request).skip_special_tokens is False


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (4, 8), (12, 16), (16, 16), (100, 128), (257, 320)])
def test_max_lora_rank_holds_the_adapter(rank, wanted):
    assert max_lora_rank(rank) == wanted


def test_too_large_rank_is_refused():
    with pytest.raises(UserError, match="--mode merged"):
        max_lora_rank(1024)


# The valid --tool-call-parser names.
KNOWN_PARSERS = {"llama3_json", "mistral", "qwen3_coder", "sandwich", None}


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.template])
def test_command_for_every_format(name):
    fmt = FORMATS[name]
    tokens = {token for names in PARSER_TOKENS.values() for token in names}
    parser = parser_of(fmt, tokens)
    assert parser in KNOWN_PARSERS
    command = shlex.join(serve_command(name="my model", model="org/base", parser=parser, adapter="./adapter", rank=12))
    assert "--chat-template ./chat_template.jinja --chat-template-content-format string" in command
    assert "--host 127.0.0.1" in command
    assert "--enable-lora --lora-modules 'my model=./adapter' --max-lora-rank 16" in command
    assert ("--enable-auto-tool-choice" in command) == fmt.has_tools
    assert "--generation-config ./adapter" in command  # its ends of turn, not the base's
    assert ("--tool-parser-plugin" in command) == (name in (*TEXTS, "gemma", "mistral-v13"))


@pytest.mark.parametrize(
    ("name", "vocabulary", "parser"),
    [
        ("llama3", {"<|python_tag|>"}, "llama3_json"),
        ("llama3", set(), "sandwich"),
        ("mistral-v3", {"[TOOL_CALLS]"}, "mistral"),
        ("mistral-v3", set(), "sandwich"),  # vLLM does not start
        ("mistral-v3", {"[TOOL_CALLS]", "[ARGS]"}, "sandwich"),  # vLLM would read calls as v11 writes them
        ("mistral-v11", {"[TOOL_CALLS]", "[ARGS]"}, "sandwich"),  # vLLM would append a call's id to its name
        ("mistral-v13", {"[TOOL_CALLS]"}, "sandwich"),
        ("mistral-v13", {"[TOOL_CALLS]", "[ARGS]"}, "sandwich"),  # vLLM would return forced calls as text
        ("chatml", set(), "sandwich"),
        ("llama3-pythonic", set(), "sandwich"),
        ("gemma", set(), "sandwich"),
        ("mistral-v1", set(), None),  # it has no tools
        ("plain", set(), None),
        ("tool-reasoning", set(), "sandwich"),
    ],
)
def test_parser_that_the_vocabulary_can_load(name, vocabulary, parser):
    assert parser_of(FORMATS[name], vocabulary) == parser


def test_plugin_path_is_no_relative_import():
    """vLLM 0.32 imports the path as a module first, and takes it for a file only after a ModuleNotFoundError."""
    command = serve_command(name="m", model="org/base", parser="sandwich")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(command[command.index("--tool-parser-plugin") + 1])


def test_name_with_separators_becomes_json():
    """vLLM would split NAME=PATH at every "="."""
    odd = serve_command(name="lr=2e-4, it's", model="org/base", adapter="./adapter", rank=12)
    assert json.loads(odd[odd.index("--lora-modules") + 1]) == {"name": "lr=2e-4, it's", "path": "./adapter"}
    assert shlex.split(shlex.join(odd)) == odd


def test_native_format_gets_the_parser_of_its_calls():
    tokenizer = load("qwen3_6", "bytes")
    fmt = get_format("native", tokenizer)
    assert parser_of(fmt, tokenizer.get_vocab()) == "qwen3_coder"
    opened = replace(fmt, opened_reasoning=("<think>\n", "</think>"))
    assert parser_of(opened, tokenizer.get_vocab()) == "sandwich", "its reasoning would be content"


def test_base_becomes_its_folder(tmp_path, monkeypatch):
    """vLLM knows neither the bundled model's name nor a path relative to another working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own base").mkdir()
    assert served_base("smollm2-135m") == served_base("SmolLM2-135M") == str(smollm2_dir().resolve())
    assert served_base("own base") == str(tmp_path / "own base")
    assert served_base("org/base-1.5b") == "org/base-1.5b"
    with pytest.raises(UserError, match="is neither a folder nor a Hub id"):
        served_base("own base/moved/away")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "has trained embed_tokens, lm_head completely"),
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "has trained biases"),
        ({"init_lora_weights": "pissa"}, "initialization pissa changes the base"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    ],
)
def test_adapter_that_vllm_refuses_is_named(changes, reason, tmp_path):
    with pytest.raises(UserError, match=f"{reason}.*; use --mode merged$") as error:
        check_adapter(tmp_path, {"r": 8, "bias": "none", "init_lora_weights": "gaussian", **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "is_served"),
    [
        ("model.layers.0.mlp.up_proj.lora_A.weight", True),
        ("model.embed_tokens.lora_embedding_B", True),
        ("model.embed_tokens.base_layer.weight", True),  # a copy of frozen embeddings
        ("model.embed_tokens.weight", False),  # resized embeddings
    ],
)
def test_weights_that_vllm_refuses_are_named(name, is_served, tmp_path):
    from safetensors.numpy import save_file

    save_file({f"base_model.model.{name}": np.zeros((2, 2))}, tmp_path / "adapter_model.safetensors")
    if is_served:
        check_adapter(tmp_path, {})
        return
    with pytest.raises(UserError, match=rf"holds base_model\.model\.{name}, not weights of a LoRA layer"):
        check_adapter(tmp_path, {})
