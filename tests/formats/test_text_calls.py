"""Calls as text, for templates that write none."""

from __future__ import annotations

import copy

import pytest

from finetune.runs.saving import with_format
from formats import choose_format, encode, get_format
from formats.call_grammar import CallGrammar
from tests import parts
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


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}CALLS{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITES_CALLS = TURNS.replace(
    "CALLS",
    "{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' + c.function.arguments | tojson + "
    "'</function>' }}{% endfor %}",
)
NAMES_THEM = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '\nAnswer with <function=name>{…}</function>"
    "<|im_end|>\n' }}{% endif %}" + TURNS.replace("CALLS", "")
)


@pytest.mark.parametrize(("own", "why"), [(WRITES_CALLS, "no place for tools"), (NAMES_THEM, "writes no calls")])
def test_auto_keeps_every_call_of_a_template_that_has_function_tags(own, why):
    """A template that writes calls without showing tools, and one that only tells the model how to write them."""
    tokenizer = tokenizer_with(own)
    fmt, said = choose_format(tokenizer)
    assert fmt.name == "native-tools" and why in said
    for made in ROWS.values():
        encoded = encode(made, tokenizer, fmt)
        assert encoded.status == "ok", encoded.reason
        assert_exact(made, encoded, tokenizer, fmt)
    assert "<function=clock>" in encode(ROWS["call"], tokenizer, fmt).sequences[0].text


def test_tags_with_parameters_inside_are_not_guessed():
    """In <function=name><parameter=key> the arguments are not JSON."""
    fmt, _ = choose_format(tokenizer_with(NAMES_THEM.replace("name>{…}", "name><parameter=key>")))
    assert fmt.name == "native"


LINES = "Tool: clock\nParameters: {}"
PARSED_LINES = [
    (f"{LINES}\nReasoning: so\nthat</s> more", [("clock", {})], "so\nthat", 0),
    (f"  {LINES}", [("clock", {})], "", 0),
    (f"{LINES}\nReason", [("clock", {})], "", 0),
    (f"First.\n{LINES}\nReasoning: so", [("clock", {})], "First.\n\nso", 0),
    ('Tool: a b\n\nParameters:\n{"x": "\\nTool: y"}\nTool: c\nParameters: {}',
     [("a b", {"x": "\nTool: y"}), ("c", {})], "", 0),
    ("The best Tool: a hammer.\nReasoning: it is cheap", [], "The best Tool: a hammer.\nReasoning: it is cheap", 0),
    ("Tool: clock\nReasoning: so", [], "Tool: clock\nReasoning: so", 1),
    ("Tool: clock\nParameters: [1]", [], "Tool: clock\nParameters: [1]", 1),
    ('Tool: clock\nParameters: {"a": 1', [], 'Tool: clock\nParameters: {"a": 1', 1),
    ("Tool:\nParameters: {}", [], "Tool:\nParameters: {}", 1),
    ("Tool: see\nbelow\nParameters: {}", [], "Tool: see\nbelow\nParameters: {}", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "called", "content", "errors"), PARSED_LINES)
def test_calls_on_lines_are_parsed(text, called, content, errors):
    parsed = get_format("tool-reasoning").parse(text)
    assert [(call["name"], call["arguments"]) for call in parsed.tool_calls] == called
    assert (parsed.content, len(parsed.errors)) == (content, errors)


def test_a_file_without_an_end_is_the_same_format(tmp_path):
    path = tmp_path / "lines.yaml"
    text = 'start: "Tool: "\nseparator: "\\nParameters: "\nend: ""\nreasoning: "\\nReasoning: "\ntools: '
    path.write_text(text + "system\n", encoding="utf-8")
    tokenizer = parts.tokenizer("mistral-v1")
    own, named = get_format(str(path), tokenizer), get_format("tool-reasoning", tokenizer)
    assert own.template == named.template and own.read_calls == named.read_calls
    path.write_text(text + "last_user\n", encoding="utf-8")
    made = row(user("Hi."), says("Hello."), user("12?"), calls(("clock", {}), text="A time."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, get_format(str(path), tokenizer))
    first, _, last = encoded.sequences[-1].text.partition("Hello.")
    assert '"clock"' in last and '"clock"' not in first and "Reasoning: A time.</s>" in last


def test_system_text_without_a_place_joins_the_user():
    """Mistral 7B v0.2 knows users and answers only: the system text, the tools and results are in the users' turns."""
    tokenizer = parts.fresh_tokenizer("mistral-v1", parts.MISTRAL_7B_V02_TEMPLATE)
    fmt = get_format("tool-reasoning", tokenizer)
    asked = (user("12?"), calls(("clock", {"zone": "UTC"}), text="A time."), result("12"), says("Noon."))
    made = row(system("Be brief."), *asked, tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert_exact(made, encoded, tokenizer, fmt)
    text = encoded.sequences[0].text
    assert text.startswith("<s>[INST] Be brief.\n\nYou have access") and "12? [/INST]Tool: clock\n" in text
    assert "A time.</s>[INST] <result>12</result> [/INST]Noon.</s>" in text
    thought = calls(("clock", {}), reasoning_content="A time.")
    encoded = encode(row(user("12?"), thought, tools=(CLOCK,)), tokenizer, fmt)
    assert encoded.sequences[0].text.endswith("Parameters: {}\nReasoning: A time.</s>") and not encoded.warnings
    broken = encode(row(user("Which?"), says("Tool: hammer")), tokenizer, fmt)
    assert broken.status == "refused" and "does not parse back" in broken.reason
    quoted = encode(row(user("Which?"), says("Both.\nTool: hammer")), tokenizer, fmt)
    assert (quoted.status, quoted.escaped) == ("ok", 1)


def test_an_exported_model_reads_its_lines():
    """Without its run, a model carries only the template: its calls are still found."""
    tokenizer = parts.fresh_tokenizer("mistral-v1", parts.MISTRAL_7B_V02_TEMPLATE)
    fmt = get_format("tool-reasoning", tokenizer)
    exported = copy.deepcopy(tokenizer)
    exported.chat_template = with_format(tokenizer, fmt).chat_template
    found, _ = choose_format(exported)
    assert (found.read_calls, found.end_of_turn) == (fmt.read_calls, fmt.end_of_turn)
    for used in (found, get_format("tool-reasoning", exported)):
        for made in ROWS.values():
            ids = [
                [s.input_ids for s in encode(made, *pair).sequences] for pair in ((tokenizer, fmt), (exported, used))
            ]
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
