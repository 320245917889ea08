"""The template that the tokenizer carries, whatever it is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from formats import calls, llama3
from formats.base import Format, FormatError
from formats.probing import USER, own_text, thinks
from formats.tokens import added_tokens

ANSWER = "wq1zk"
DATE = "26 Jul 2024"


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """The format of the tokenizer's own template: its end of turn and its calls are found by rendering.

    Raises FormatError when there is no template or no token that ends an answer.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = tokenizer.get_chat_template()
    if not template:
        raise FormatError(
            "this tokenizer carries no chat template; choose a format by name (--format chatml, llama3, …)"
        )
    kwargs: dict[str, Any] = {}
    if "date_string" in template:
        kwargs["date_string"] = DATE
    hybrid = thinks(tokenizer)
    if hybrid:
        kwargs["enable_thinking"] = False
    ends = _ends_of_turn(tokenizer, kwargs)
    added = added_tokens(tokenizer)
    control = tuple(text for text in ("[INST]", "[/INST]", "<tool_response>", "</tool_response>") if text in template)
    name, markers, parse = _call_style(tokenizer, template, kwargs)
    return replace(
        fmt,
        template=template,
        end_of_turn=ends,
        control_tokens=tuple(dict.fromkeys((*ends, *control))),
        call_markers=tuple(marker for marker in markers if marker not in added),
        template_kwargs=kwargs,
        read_calls=parse,
        thinking="enable_thinking" if hybrid else None,
        vllm_parser=name,
    )


def _ends_of_turn(tokenizer: Any, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The first added token behind an answer, for a plain answer and for one with a call."""
    call = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": {"a": "vq0zk"}}}
    answers = [
        ({"role": "assistant", "content": ANSWER}, ANSWER),
        ({"role": "assistant", "content": "", "tool_calls": [call]}, "vq0zk"),
    ]
    added = sorted(added_tokens(tokenizer), key=len, reverse=True)
    ends: list[str] = []
    for answer, last in answers:
        text = own_text(tokenizer, [USER, answer], **kwargs)
        tail = text.rpartition(last)[2] if text and last in text else ""
        found = [(at, -len(token), token) for token in added if (at := tail.find(token)) >= 0]
        # Behind a call its own closing tags come first; a turn's end is the last special token's neighbour.
        special = [item for item in found if item[2] in tokenizer.all_special_tokens or item[2].startswith("<|")]
        if special or found:
            ends.append(min(special or found)[2])
    if not ends:
        raise FormatError(
            "the tokenizer's own template ends an answer with no token, so generation would not stop; "
            "choose a format by name"
        )
    return tuple(dict.fromkeys(ends))


def _call_style(tokenizer: Any, template: str, kwargs: dict[str, Any]) -> tuple[str | None, tuple[str, ...], Any]:
    """(vLLM parser, call markers, parse) of the style in which the template writes a call; parse None if unknown."""
    arguments = {"a": "vq0zk"}
    call = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": arguments}}
    text = own_text(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], **kwargs) or ""
    written = json.dumps(arguments)
    if f'<tool_call>\n{{"name": "fq0zk", "arguments": {written}}}\n</tool_call>' in text:
        return "hermes", ("<tool_call>", "</tool_call>"), calls.parse_hermes
    if f"<function=fq0zk>{written}</function>" in text:
        return None, ("<function=", "</function>"), calls.parse_function_tag
    if f'{{"name": "fq0zk", "parameters": {written}}}' in text:
        return "llama3_json", (), llama3.parse
    return None, (), None


FORMAT = Format("native", "", (), adapt=adapt)
