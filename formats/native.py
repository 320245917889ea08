"""The template that the tokenizer carries, whatever it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats import kanana, llama3, llama3_pythonic, mistral, phi4_mini, qwen, qwen_xml
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
    parser, markers, parse, untyped = _call_style(tokenizer, kwargs, ends)
    if _wants_ids_of_nine(tokenizer, kwargs):
        fmt = replace(fmt, prepare=mistral.prepare)
    return replace(
        fmt,
        template=template,
        end_of_turn=ends,
        control_tokens=tuple(dict.fromkeys((*ends, *control))),
        call_markers=tuple(marker for marker in markers if marker not in added),
        template_kwargs=kwargs,
        read_calls=parse,
        thinking="enable_thinking" if hybrid else None,
        reasoning="</think>" in template,
        vllm_parser=parser,
        untyped=untyped,
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
        _refuse_broken(tokenizer, kwargs)
        raise FormatError(
            "the tokenizer's own template ends an answer with no token, so generation would not stop; "
            "choose a format by name"
        )
    return tuple(dict.fromkeys(ends))


def _refuse_broken(tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """FormatError with the template's own words, where it cannot even render a question and its answer."""
    try:
        messages = [USER, {"role": "assistant", "content": ANSWER}]
        tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates raise anything
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            f"the tokenizer's own template cannot render an answer ({reason}); choose a format by name"
        ) from error


def _call_style(tokenizer: Any, kwargs: dict[str, Any], ends: tuple[str, ...]) -> tuple[str | None, tuple, Any, bool]:
    """(vLLM parser, call markers, parse, untyped) of the known spelling in which the template writes calls.

    Every known parser is tried on a call that the template has written; parse is None when none reads it back.
    """
    arguments = {"a": "vq0zk", "b": {"c": [1, True]}}
    call = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = own_text(tokenizer, [USER], add_generation_prompt=True, **kwargs)
    text = own_text(tokenizer, [USER, answer], **kwargs)
    if prompt is None or text is None or not text.startswith(prompt):
        return None, (), None, False
    written = text[len(prompt) :]
    written = written[: min((at for end in ends if (at := written.find(end)) >= 0), default=len(written))]
    for module in (qwen, qwen_xml, kanana, llama3, mistral, phi4_mini, llama3_pythonic):
        fmt = module.FORMAT
        if fmt.read_calls(written).tool_calls == [{"name": "fq0zk", "arguments": arguments}]:
            return fmt.vllm_parser, fmt.call_markers, fmt.read_calls, fmt.untyped
    return None, (), None, False


def _wants_ids_of_nine(tokenizer: Any, kwargs: dict[str, Any]) -> bool:
    """Mistral's own templates raise for a call whose id has not nine characters, and for one without an id."""
    calls = [
        {"type": "function", "id": name, "function": {"name": "fq0zk", "arguments": {}}}
        for name in ("callid000", "call_1", "call_0123456789")
    ]
    texts = [
        own_text(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], **kwargs)
        for call in calls
    ]
    return texts[0] is not None and texts[1:] == [None, None]


FORMAT = Format("native", "", (), adapt=adapt)
