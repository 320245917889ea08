"""Calls as text, for templates that write none."""

from __future__ import annotations

import copy

import pytest

from finetune.runs.saving import with_format
from formats import choose_format, encode, get_format
from formats.call_grammar import CallGrammar
from tests.formats.cases import CLOCK, MAIL, WEATHER, calls, result, row, says, system, user
from tests.formats.checks import assert_exact
from tests.formats.own_templates import STYLES, template
from tests.formats.public_templates import load, tokenizer_with

HARD = {"to": ["a", None, True], "body": 'it\'s "b"\n</x> \\ 한국', "options": {"retry": {}}}
ROWS = {
    "call": row(user("12?"), calls(("clock", {"zone": "UTC"})), result("12"), says("Noon."), tools=(CLOCK,)),
    "system": row(system("Be brief."), user("go"), calls(("mail", HARD)), tools=(MAIL, CLOCK)),
    "parallel": row(
        user("go"), calls(("clock", {}), ("weather_at", {"place": "Graz"}), text="Both."), result("12"),
        result('{"temp": 6}', 1), says("6 °C at noon."), user("ok"), says("Fine."), tools=(CLOCK, WEATHER),
    ),
    "no tools": row(user("hi"), says("hello")),
}  # fmt: skip
SHOWN = template("")
TOKENIZERS = {
    "function tags": (lambda: load("phi3", "bytes"), "<function=clock>"),
    "without a system message": (lambda: load("gemma3", "bytes"), "<function=clock>"),
    "tools shown, <tool_call>": (lambda: tokenizer_with("{#- <tool_call> #}" + SHOWN), '<tool_call>\n{"name": "clock"'),
    "tools shown, <|tool_call|>": (
        lambda: tokenizer_with("{#- <|tool_call|> #}" + SHOWN),
        '<|tool_call|>[{"name": "cl',
    ),
    "tools shown, Python": (lambda: tokenizer_with("{#- <|tool_call_start|> #}" + SHOWN), "<|tool_call_start|>[clock("),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_calls_are_text_and_read_back(name):
    make, written = TOKENIZERS[name]
    tokenizer = make()
    fmt = get_format("native-tools", tokenizer)
    for label, made in ROWS.items():
        encoded = encode(made, tokenizer, fmt)
        assert encoded.status in ("ok", "split"), (label, encoded.reason)
        assert_exact(made, encoded, tokenizer, fmt)
    assert written in encode(ROWS["call"], tokenizer, fmt).sequences[0].text
    assert encode(ROWS["call"], tokenizer, fmt).sequences[0].text.count('"clock"') >= 1


def test_auto_chooses_it_for_a_template_without_tools():
    fmt, why = choose_format(load("phi3", "bytes"))
    assert fmt.name == "native-tools" and "no place for tools" in why
    assert choose_format(TOKENIZERS["tools shown, Python"][0]())[0].vllm_parser == "lfm2"
    unknown = tokenizer_with(SHOWN)  # shows tools, and no known spelling of calls: not guessed
    fmt, why = choose_format(unknown)
    assert fmt.name == "native" and "writes no calls" in why
    assert encode(ROWS["call"], unknown, fmt).status == "refused"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_trained_model_is_loaded_alike(name):
    tokenizer = TOKENIZERS[name][0]()
    fmt = get_format("native-tools", tokenizer)
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = with_format(tokenizer, fmt).chat_template
    again = get_format("native-tools", trained)
    assert (again.read_calls, again.end_of_turn) == (fmt.read_calls, fmt.end_of_turn)
    for made in ROWS.values():
        ids = [[s.input_ids for s in encode(made, *pair).sequences] for pair in ((tokenizer, fmt), (trained, again))]
        assert ids[0] == ids[1]


def test_calls_of_a_template_that_shows_no_tools():
    """DeepSeek V3's template writes calls, of arguments as JSON text, and leaves the tools to the system message."""
    text = STYLES["arguments as added text"].replace("{% if tools %}", "{% if false %}")
    tokenizer = tokenizer_with(text)
    fmt, _ = choose_format(tokenizer)
    assert fmt.name == "native-tools" and isinstance(fmt.read_calls, CallGrammar)
    made = row(user("go"), calls(("clock", {"zone": "UTC"})), result("12"), says("Noon."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status == "ok", encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
    assert '<c>clock {"zone": "UTC"}</c>' in encoded.sequences[0].text and '"clock"' in encoded.sequences[0].text
    tokenizer.chat_template = fmt.pinned_template()  # as a trained model carries it
    assert encode(made, tokenizer, choose_format(tokenizer)[0]).sequences == encoded.sequences
    assert encode(made, tokenizer, get_format("native-tools", tokenizer)).sequences == encoded.sequences
