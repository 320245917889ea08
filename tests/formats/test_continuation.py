"""An answer behind the prompt that a server feeds, where a template writes the two differently."""

from __future__ import annotations

import pytest

from formats import choose_format, encode
from formats.continuation import continuation
from tests.formats import own_templates as own
from tests.formats.cases import CLOCK, calls, result, row, says, system, user
from tests.formats.checks import assert_exact, spans
from tests.formats.public_templates import tokenizer_with

TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    "prompt,upto,answer",
    [
        ("<u>hi<a>", "<u>hi<a>Yes.<e>", "Yes.<e>"),
        ("<u>hi<a>\n", "<u>hi<a>Yes.<e>", "Yes.<e>"),  # a line break at the end of the template
        ("<u>hi<e>\n<a>\n\n", "<u>hi<e><a>\n\nYes.", "Yes."),  # one between the turns
        ("<s>[INST]Be brief.\n\nhi[/INST]", "<s>[INST]hi[/INST]Yes.</s>", "Yes.</s>"),  # Mistral
        ("<u>hi<a><think></think>", "<u>hi<a>Yes.<e>", "Yes.<e>"),  # Gemma 4
        ("<u>hi<a><think>\n\n</think>\n\n", "<u>hi<a><tool>Yes.<e>", "<tool>Yes.<e>"),
        ("<u>hi<a><think>\n", "<u>hi<a>Yes.<e>", None),  # the answer would be inside of the reasoning
        ("<u>Be brief.<u>hi<a>", "<u>you<a>Yes.<e>", None),  # another question
        ("<u>hi<a>", "<u>hi<e>", None),
    ],
)
def test_answer_behind_a_prompt(prompt, upto, answer):
    assert continuation(prompt, upto, "hi", TAGS) == answer
    assert continuation(prompt, prompt + "x", "hi", ("", "")) == "x"


def test_system_message_only_at_the_last_user():
    """Mistral's templates: the prompt has the system message, past turns do not."""
    text = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% if tools %}T{{ tools }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ s + ' ' if s and loop.last }}{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}<r>{{ m.content }}</r>{% elif m.role == 'assistant' %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<c>{{ c.function.name }} {{ c.function.arguments | tojson }}</c>{% endfor %}"
        "</s>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(text)
    fmt, _ = choose_format(tokenizer)
    made = row(system("Brief."), user("one?"), says("First."), user("two?"), calls(("clock", {})), tools=(CLOCK,))
    encoded = encode(made, tokenizer, fmt)
    assert encoded.status == "split", encoded.reason
    assert_exact(made, encoded, tokenizer, fmt)
    first, second = (tokenizer.decode(sequence.input_ids) for sequence in encoded.sequences)
    assert first.endswith("[INST]Brief. one?[/INST]First.</s>")
    assert second.endswith("[INST]one?[/INST]First.</s>[INST]Brief. two?[/INST]<c>clock {}</c></s>")
    lost = row(system("Brief."), user("go"), calls(("clock", {})), result("12"), says("Noon."), tools=(CLOCK,))
    assert "message 1 (system): the template drops its text" in encode(lost, tokenizer, fmt).reason


def test_answer_is_not_left_inside_of_reasoning():
    """Nemotron Nano v2 opens reasoning in the prompt and before the last answer, and closes it in neither."""
    text = own.ALWAYS_THINKS.replace(
        "{% elif m.role == 'assistant' %}", "{% elif m.role == 'assistant' %}{{ '<think>\n' if loop.last }}"
    )
    tokenizer = tokenizer_with(text)
    fmt, _ = choose_format(tokenizer)
    assert fmt.opened_reasoning == ("<think>\n", "\n</think>\n\n")
    made = row(user("a"), says("b", reasoning_content="Easy."), user("c"), says("d"))
    encoded = encode(made, tokenizer, fmt)
    assert_exact(made, encoded, tokenizer, fmt)
    trained = [tokenizer.decode(s.input_ids[a:b]) for s in encoded.sequences for a, b in spans(s.labels)]
    assert trained == [f"Easy.\n</think>\n\nb{own.END}", f"\n</think>\n\nd{own.END}"]


def test_results_take_the_names_of_their_calls():
    """Templates that require a result's name get that of its call: by id, else in order."""
    text = own.template("<c>{{ f.name }} {{ f.arguments | tojson }}</c>").replace(
        "{% else %}{{ m.content }}", "{% elif m.role == 'tool' %}{{ m.name + '=' + m.content }}" + own.END
        + "{% else %}{{ m.content }}",
    )  # fmt: skip
    tokenizer = tokenizer_with(text)
    fmt, _ = choose_format(tokenizer)
    asked = calls(("clock", {"zone": "UTC"}), ("day", {}))
    for results in ((result("Monday", 1), result("12", 0)), ({"role": "tool", "content": "12"},)):
        made = row(user("go"), asked, *results, says("Noon."), tools=(CLOCK,))
        encoded = encode(made, tokenizer, fmt)
        assert encoded.status == "ok", encoded.reason
        shown = encoded.sequences[0].text
        assert ("day=Monday" in shown) == (len(results) == 2) and "clock=12" in shown
