"""Our templates against the published ones, text for text and id for id."""

from __future__ import annotations

import pytest

from formats import FormatError, get_format, render
from formats.base import clean_messages
from tests import parts
from tests.formats.cases import CLOCK, ROWS, calls, result, row, says, system, user

# format, tokenizer, published template, its variables
PUBLISHED = [
    ("llama3", "llama3", "llama3_1", {}),
    ("llama3", "llama3", "llama3_2", {"date_string": "26 Jul 2024"}),
    ("qwen", "qwen2.5", "qwen2_5", {}),
    ("qwen", "qwen3", "qwen3", {"enable_thinking": False}),
    ("qwen", "qwen3", "qwen3", {}),
    ("qwen", "qwen3", "qwen3_instruct_2507", {}),
    ("qwen-xml", "qwen3", "qwen3_5_nothink", {"enable_thinking": False}),
    ("qwen-xml", "qwen3", "qwen3_5_think", {}),
    ("qwen-xml", "qwen3", "qwen3_6", {"enable_thinking": False}),
    ("qwen-xml", "qwen3", "qwen3_6", {}),
    ("qwen-xml", "qwen3", "qwen3_8", {}),
]


def published_text(tokenizer, made, prompt, **kwargs):
    try:
        return tokenizer.apply_chat_template(
            clean_messages(made["messages"]),
            tools=made["tools"] or None,
            add_generation_prompt=prompt,
            tokenize=False,
            **kwargs,
        )
    except Exception:  # the published template refuses the conversation
        return None


@pytest.mark.parametrize("prompt", [False, True], ids=["complete", "prompt"])
@pytest.mark.parametrize("name,vocabulary,reference,kwargs", PUBLISHED)
def test_text_equals_the_published_template(name, vocabulary, reference, kwargs, prompt):
    tokenizer = parts.fresh_tokenizer(vocabulary, parts.reference_template(reference))
    fmt = get_format(name, tokenizer)
    if "enable_thinking" in fmt.template_kwargs and "enable_thinking" not in kwargs:
        fmt = fmt.with_kwargs(enable_thinking=True)
    compared = 0
    for label, made in ROWS.items():
        wanted = published_text(tokenizer, made, prompt, **kwargs)
        if wanted is None:
            continue
        try:
            text = render(made, fmt, tokenizer, prompt)
        except FormatError:
            # Llama's template turns a greeting into the user's first message; ours says no.
            assert label in ("greets_first", "untrained_greeting")
            continue
        assert text == wanted, label
        compared += 1
    assert compared >= len(ROWS) - 5


@pytest.mark.parametrize("vocabulary", ["qwen2.5", "qwen3", "smollm2"])
def test_auto_renders_as_the_own_template(vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format("auto", tokenizer)
    for label in ("plain", "system", "turns", "korean", "empty_system", "two_systems", "late_system", "jinja"):
        own = tokenizer.apply_chat_template(ROWS[label]["messages"], tokenize=False)
        assert render(ROWS[label], fmt, tokenizer) == own, label


@pytest.mark.parametrize(
    "name,vocabulary", [("llama3", "llama3"), ("qwen", "qwen3"), ("chatml", "smollm2"), ("native", "qwen3")]
)
def test_pinned_template_needs_no_variables(name, vocabulary):
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format(name, tokenizer)
    saved = parts.fresh_tokenizer(vocabulary, fmt.pinned_template())
    for label, made in ROWS.items():
        for prompt in (False, True):
            try:
                wanted = render(made, fmt, tokenizer, prompt)
            except FormatError:
                continue
            assert published_text(saved, made, prompt) == wanted, label
    again = get_format(name, saved)
    assert dict(again.template_kwargs) == dict(fmt.template_kwargs) or name == "native"


def test_gemma_without_tools_equals_gemma_3():
    tokenizer = parts.fresh_tokenizer("llama3", parts.reference_template("gemma3"), parts.GEMMA_TOKENS)
    fmt = get_format("gemma", tokenizer)
    compared = 0
    for label, made in ROWS.items():
        # The published template has no place for tools and leaves calls out without a word.
        if made["tools"] or any(message.get("tool_calls") for message in made["messages"]):
            continue
        for prompt in (False, True):
            wanted = published_text(tokenizer, made, prompt)
            if wanted is None:
                with pytest.raises(FormatError):
                    render(made, fmt, tokenizer, prompt)
            else:
                assert render(made, fmt, tokenizer, prompt) == wanted, label
                compared += 1
    assert compared >= 20


KANANA = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>



You have access to the following functions:

Use the function 'clock' to 'Tells the time.'
{"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": \
{"zone": {"type": "string"}}, "required": ["zone"]}}


Think very carefully before calling functions.
If a you choose to call a function ONLY reply in the following format:
<{start_tag}={function_name}>{parameters}{end_tag}
where

start_tag => `<function`
parameters => a JSON dict with the function argument name as key and function argument value as value.
end_tag => `</function>`

Here is an example,
<function=example_function_name>{"example_name": "example_value"}</function>

Reminder:
- If looking for real time information use relevant functions before falling back to brave_search
- Function calls MUST follow the specified format, start with <function= and end with </function>
- Required parameters MUST be specified
- Only call one function at a time
- Put the entire function call reply on one line

<|eot_id|><|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Time?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Let me look.<function=clock>{"zone": "UTC"}</function><function=clock>{"zone": "서울"}</function><|eom_id|>\
<|start_header_id|>ipython<|end_header_id|>

12:00<|eot_id|><|start_header_id|>ipython<|end_header_id|>

21:00<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Noon.<|eot_id|>"""


def test_kanana_renders_as_it_is_served():
    """Kakao's serving template, written out: Functionary's v3-llama3.1 prompt without its date line."""
    tokenizer = parts.tokenizer("llama3")
    fmt = get_format("kanana", tokenizer)
    called = calls(("clock", {"zone": "UTC"}), ("clock", {"zone": "서울"}), text="Let me look.")
    messages = (system("Be brief."), user("Time?"), called, result("12:00", 0), result("21:00", 1), says("Noon."))
    assert render(row(*messages, tools=(CLOCK,)), fmt, tokenizer) == KANANA
    without = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n\n<|eot_id|>"
    assert render(row(user("hi")), fmt, tokenizer).startswith(without + "<|start_header_id|>user")


# Where the encoder goes beyond the template that the same package generates, which is what a server renders:
# it decodes results that are JSON, strips the end of an answer, leaves no space in something empty, completes a tool.
DIFFERENT = {
    *("call_and_result", "parallel", "steps", "spaces", "blank_answer", "empty_result", "empty_system", "bare_tool"),
}
MISTRAL = [
    ("mistral-v1", "tokenizer.model.v1"),
    ("mistral-v3", "mistral_instruct_tokenizer_240323.model.v3"),
    ("mistral-v7", "mistral_instruct_tokenizer_241114.model.v7"),
    ("mistral-tekken", "tekken_240911.json"),
]


@pytest.mark.parametrize("vocabulary,file", MISTRAL)
def test_mistral_ids_equal_mistral_common(vocabulary, file):
    """What the model's makers feed: mistral-common, which shares neither template nor tokenizer with ours."""
    folder = parts._package("mistral_common") / "data"
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    theirs = MistralTokenizer.from_file(str(folder / file), mode=ValidationMode.finetuning)
    tokenizer = parts.tokenizer(vocabulary)
    fmt = get_format("mistral", tokenizer)
    compared = []
    for label, made in ROWS.items():
        if made["messages"][-1]["role"] != "assistant" or label in DIFFERENT:
            continue
        messages = clean_messages(made["messages"], fmt)
        try:
            request = ChatCompletionRequest.from_openai(messages, made["tools"] or None)
            wanted = theirs.encode_chat_completion(request).tokens
            ours = tokenizer(render(made, fmt, tokenizer), add_special_tokens=False)["input_ids"]
        except Exception:  # neither may say more than the other: what one refuses is not compared
            continue
        assert ours == wanted, label
        compared.append(label)
    assert len(compared) >= 10
