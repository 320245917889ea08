"""Templates that no table has: every row is trained as the template renders it, or refused with the expected reason."""

from __future__ import annotations

import json

import pytest

from formats import choose_format, encode
from formats.probing import DATE
from tests.formats.cases import ROWS
from tests.formats.checks import assert_exact, spans
from tests.formats.invented import INVENTED
from tests.formats.public_templates import tokenizer_with

ALWAYS_REFUSED = {"nobody_answers", "greets_first"}


def renderings(tokenizer, messages: list[dict], tools: list[dict], **variables) -> set[str]:
    """What plain Transformers renders, for arguments as objects and as text, and results with and without a name."""
    names = {call["id"]: call["function"]["name"] for m in messages for call in m.get("tool_calls", [])}
    found = set()
    for as_text in (False, True):
        spelled = []
        for message in messages:
            copy = {key: value for key, value in message.items() if key != "train"}
            if copy["role"] == "tool":
                copy["name"] = names[copy["tool_call_id"]]
            if as_text and "tool_calls" in copy:
                copy["tool_calls"] = [
                    {**call, "function": {**call["function"], "arguments": json.dumps(
                        call["function"]["arguments"], ensure_ascii=False)}}
                    for call in copy["tool_calls"]
                ]  # fmt: skip
            spelled.append(copy)
        try:
            found.add(tokenizer.apply_chat_template(spelled, tools=tools or None, tokenize=False,
                                                    strftime_now=DATE.strftime, **variables))  # fmt: skip
        except Exception:  # templates raise anything; then the other spelling counts
            continue
    return found


def assert_as_rendered(row: dict, encoded, tokenizer, fmt) -> None:
    """The prompt is what the published template renders, and the trained text what it ends an answer with."""
    turns = [n for n, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("train", True)]
    modes = [fmt.template_kwargs, *([{**fmt.template_kwargs, fmt.thinking: True}] if fmt.thinking else [])]
    parts = [(s, a, b) for s in encoded.sequences for a, b in spans(s.labels)]
    for turn, (sequence, start, end) in zip(turns, parts, strict=True):
        prompt, answer = tokenizer.decode(sequence.input_ids[:start]), tokenizer.decode(sequence.input_ids[start:end])
        messages, closing = row["messages"], fmt.opened_reasoning[1]
        written = answer.split(closing)[-1] if closing else answer
        prompts = [renderings(tokenizer, messages[:turn], row["tools"], add_generation_prompt=True, **m) for m in modes]
        assert any(prompt in some for some in prompts), turn
        complete = set().union(*(renderings(tokenizer, messages[: turn + 1], row["tools"], **m) for m in modes))
        unwritten = fmt.unwritten_ends[bool(messages[turn].get("tool_calls"))]
        if not messages[turn].get("reasoning_content"):  # some templates have no place for it
            assert any((text.rstrip() + unwritten).endswith(written.rstrip()) for text in complete), (turn, answer)


@pytest.mark.parametrize("name", INVENTED)
def test_invented_template_is_exact_or_refused(name):
    template, expected = INVENTED[name]
    tokenizer = tokenizer_with(template)
    fmt, why = choose_format(tokenizer)
    assert fmt.name == "native", why
    refused = {label: reason for reason, labels in expected.items() for label in labels.split()}
    for label, row in ROWS.items():
        encoded = encode(row, tokenizer, fmt)
        assert_exact(row, encoded, tokenizer, fmt)
        if label in ALWAYS_REFUSED:
            continue
        reason = refused.get(label)
        assert (encoded.status == "refused") == (reason is not None), (label, encoded.reason)
        if reason is None:
            assert_as_rendered(row, encoded, tokenizer, fmt)
        else:
            assert reason in encoded.reason, (label, encoded.reason)
