"""An answer that reaches its maximum length: no half call in its content, wherever it is cut."""

import pytest

from tests.formats.pairs import PAIRS
from tests.formats.test_response_template import answers
from tests.helpers import lazy

reply = lazy("finetune.chat.reply")
TOOLS = [{"type": "function", "function": {"name": "any"}}]
CHOSEN = {
    "qwen", "qwen-xml", "llama3", "llama3-pythonic", "llama3-function", "mistral-v13", "mistral", "gemma",
    "tool-reasoning",
}  # fmt: skip
ONE_EACH = list({pair.format: pair for pair in PAIRS if pair.format in CHOSEN}.values())


@pytest.mark.parametrize("pair", ONE_EACH, ids=str)
def test_half_call_is_not_content(pair):
    tokenizer, fmt = pair.load()
    cuts = 0
    for _, text in answers(fmt, tokenizer):
        text = text[: min([at for end in fmt.end_of_turn if (at := text.find(end)) >= 0], default=len(text))]
        whole = fmt.parse(text, TOOLS)
        if not whole.tool_calls:
            continue
        for cut in range(1, len(text), 1 + len(text) // 40):
            parsed = reply.parsed_answer(text[:cut], TOOLS, tokenizer, fmt, is_cut=True)
            assert whole.content.startswith(parsed.content.strip()), text[:cut]
            assert parsed.tool_calls == whole.tool_calls[: len(parsed.tool_calls)]
            cuts += 1
    assert cuts > 50


@pytest.mark.parametrize("text", ['{"temperature": 20, "unit', "[1, 2, 3", "The list: a, b", "x < y"])
def test_cut_text_that_is_no_call_stays(text):
    tokenizer, fmt = next(pair for pair in PAIRS if pair.format == "chatml").load()
    assert reply.parsed_answer(text, TOOLS, tokenizer, fmt, is_cut=True).content == text


def test_cut_json_without_tools_stays():
    tokenizer, fmt = next(pair for pair in PAIRS if pair.format == "llama3").load()
    for text in ('{"na', "[TOO", '{"name": "Ann", "age'):
        assert reply.parsed_answer(text, [], tokenizer, fmt, is_cut=True).content == text


def test_calls_on_lines_are_not_shown_as_text():
    tokenizer, fmt = next(pair for pair in PAIRS if pair.format == "tool-reasoning").load()
    for text, shown in (("Tool: f\nParameters: {}\nReasoning: So.", ""), ("Two.\nTool: f\nParameters: {}", "Two.")):
        live = reply.LiveText(tokenizer, fmt, TOOLS)
        assert "".join(live.feed(letter) for letter in text) == shown
        rest, parsed = live.finish()
        assert shown + rest == parsed.content and parsed.tool_calls == [{"name": "f", "arguments": {}}]
    live = reply.LiveText(tokenizer, fmt, TOOLS)
    assert "".join(live.feed(letter) for letter in "Tools are\ngood.") == "Tools are\ngood."
