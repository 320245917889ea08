"""Choosing formats, user formats, and what start-up refuses."""

from __future__ import annotations

import copy

import pytest

from formats import FORMATS, FormatError, check_tokenizer, choose_format, encode, get_format, render
from tests import parts
from tests.formats import fuzz
from tests.formats.cases import CLOCK, ROWS, calls, result, row, says, user
from tests.formats.checks import assert_exact
from tests.formats.pairs import PAIRS

FOUR = 'start: "<call>"\nseparator: "|"\nend: "</call>"\ntools: {place}\n'


@pytest.mark.parametrize(
    "vocabulary,name",
    [
        ("llama3", "llama3"),
        ("qwen2.5", "qwen"),
        ("qwen3", "qwen"),
        ("smollm2", "chatml"),
        ("mistral-v3", "mistral"),
        ("mistral-v1", "mistral"),
    ],
)
def test_auto_chooses_with_a_reason(vocabulary, name):
    fmt, reason = choose_format(parts.tokenizer(vocabulary))
    assert fmt.name == name and "the tokenizer" in reason


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.format != "native"], ids=str)
def test_auto_recognises_the_template_of_a_trained_model(pair):
    """A merged model is a plain one: only its template says how it was trained."""
    tokenizer, trained = pair.load()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = trained.pinned_template()
    fmt, reason = choose_format(tokenizer)
    assert fmt.name == trained.name or (fmt.name == "mistral" and trained.name.startswith("mistral-"))
    assert "carries our template" in reason
    for name in ("end_of_turn", "template_kwargs", "thinking", "reasoning", "tokens"):
        assert getattr(fmt, name) == getattr(trained, name), name
    assert render(ROWS["plain"], fmt, tokenizer) == render(ROWS["plain"], trained, tokenizer)
    for other in ("{# more #}", "{%- if x is not defined %}{%- set x = y %}{%- endif %}"):
        assert trained.pinned_in(other + trained.template) is None


def test_format_that_does_not_fit_is_refused():
    with pytest.raises(FormatError, match=r"<\|eot_id\|> is \d+ tokens .*--format auto"):
        check_tokenizer(parts.tokenizer("qwen2.5"), FORMATS["llama3-function"])
    assert check_tokenizer(parts.tokenizer("llama3"), FORMATS["kanana"]) == [128009, 128008]
    assert check_tokenizer(parts.tokenizer("smollm2"), FORMATS["chatml"]) == [2]
    with pytest.raises(FormatError, match="unknown format 'qwem'"):
        get_format("qwem")
    with pytest.raises(FormatError, match="no chat template"):
        get_format("native", parts.tokenizer("llama3"))


def test_end_of_turn_ignores_a_wrong_eos_token():
    tokenizer = parts.fresh_tokenizer("smollm2", None, ("<|unused|>",))
    tokenizer.eos_token = "<|im_start|>"  # as the GGUF reader sets it
    assert get_format("native", tokenizer).end_of_turn == ("<|im_end|>",)
    with pytest.raises(FormatError, match="both start and end"):
        get_format("plain", tokenizer)


@pytest.mark.parametrize("place", ["system", "first_user", "last_user"])
@pytest.mark.parametrize("vocabulary", ["smollm2", "qwen2.5", "llama3"])
def test_yaml_format(tmp_path, place, vocabulary):
    path = tmp_path / "mine.yaml"
    path.write_text(FOUR.format(place=place), encoding="utf-8")
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format(str(path), tokenizer)
    statuses = {}
    for label in ("plain", "single_call", "parallel", "text_and_call", "steps", "nested_arguments", "korean_call"):
        encoded = encode(ROWS[label], tokenizer, fmt)
        assert_exact(ROWS[label], encoded, tokenizer, fmt)
        statuses[label] = encoded.status
    assert "refused" not in statuses.values()
    assert '<call>weather_at|{"place": "Turin", "unit": "C"}</call>' in render(ROWS["single_call"], fmt, tokenizer)
    assert get_format(str(path)).parse('a<call>f|{"x": 1}</call>').tool_calls == [{"name": "f", "arguments": {"x": 1}}]


def test_yaml_separator_may_be_a_newline(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('start: "```tool\\n"\nseparator: "\\n"\nend: "\\n```"\ntools: system\n', encoding="utf-8")
    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format(str(path), tokenizer)
    encoded = encode(ROWS["text_and_call"], tokenizer, fmt)
    assert_exact(ROWS["text_and_call"], encoded, tokenizer, fmt)
    assert encoded.status == "ok" and '```tool\nclock\n{"zone": "Asia/Seoul"}\n```' in encoded.sequences[0].text


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ raise_exception('not today') }}", r"cannot render an answer \(not today\)"),
        ("{% for %}", "cannot render an answer .*Expected an expression"),
        ("{{ messages[1].content }}", "ends an answer with no token"),
    ],
)
def test_unusable_own_template_says_why(template, message):
    tokenizer = parts.fresh_tokenizer("smollm2")
    tokenizer.chat_template = template
    with pytest.raises(FormatError, match=message):
        get_format("native", tokenizer)


@pytest.mark.parametrize(
    "text,message",
    [
        ("start: a\n", "exactly the four strings"),
        (FOUR.format(place="nowhere"), "tools must be one of"),
        ('start: ""\nseparator: "|"\nend: x\ntools: system\n', "start must not be empty"),
        ("start: [", "is not valid YAML"),
    ],
)
def test_wrong_yaml_format_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        get_format(str(path))
    with pytest.raises(FormatError, match=r"absent\.yaml"):
        get_format(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.format}-{pair.vocabulary}{pair.template}")
def test_generated_conversations_are_exact(pair):
    counts, wrong = fuzz.run(pair, 25)
    assert wrong == []
    assert sum(counts.values()) == 25 and counts["ok"] + counts["split"] > 0


@pytest.mark.parametrize(
    ("content", "written"),
    [("12", "12"), ("0.5", "0.5"), ("nan", '"nan"'), ("inf", '"inf"'), ("-inf", '"-inf"'), ("1e999", '"1e999"')],
)
def test_mistral_writes_only_numbers_of_json_as_numbers(content, written):
    tokenizer = parts.tokenizer("mistral-v3")
    made = row(user("Weigh."), calls(("clock", {"zone": "UTC"})), result(content), says("So."), tools=(CLOCK,))
    encoded = encode(made, tokenizer, get_format("mistral", tokenizer))
    assert encoded.status == "ok" and f'{{"content": {written}, ' in encoded.sequences[0].text
