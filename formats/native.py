"""Format `native`: the template that the tokenizer carries; its end of turn and its calls are found by rendering."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from formats.base import Format, FormatError
from formats.builtin import mistral
from formats.probing import CALL_NAME, USER, call_message, own_text, thinks
from formats.registry import FORMATS
from formats.tokens import added_tokens

ANSWER = {"role": "assistant", "content": "wq1zk"}
DATE = "26 Jul 2024"


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """The format of the tokenizer's own template.

    Raises FormatError when there is no template or no token that ends an answer.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = tokenizer.get_chat_template()
    if not template:
        raise FormatError(
            "this tokenizer carries no chat template; choose a format by name (--format chatml, llama3, …)"
        )
    kwargs: dict[str, Any] = {"date_string": DATE} if "date_string" in template else {}
    hybrid = thinks(tokenizer)
    if hybrid:
        kwargs["enable_thinking"] = False
    ends = _ends_of_turn(tokenizer, kwargs)
    added = added_tokens(tokenizer)
    control = [text for text in ("[INST]", "[/INST]", "<tool_response>", "</tool_response>") if text in template]
    style = _call_style(tokenizer, kwargs, ends)
    return replace(
        fmt,
        template=template,
        end_of_turn=ends,
        control_tokens=tuple(dict.fromkeys((*ends, *control))),
        call_markers=tuple(marker for marker in style.call_markers if marker not in added) if style else (),
        template_kwargs=kwargs,
        read_calls=style.read_calls if style else None,
        thinking="enable_thinking" if hybrid else None,
        reasoning="</think>" in template,
        vllm_parser=style.vllm_parser if style else None,
        untyped=style is not None and style.untyped,
        prepare=mistral.prepare if _requires_mistral_ids(tokenizer, kwargs) else None,
    )


def _ends_of_turn(tokenizer: Any, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The first added token after an answer, for a plain answer and for one with a call."""
    answers = [(ANSWER, ANSWER["content"]), (call_message({"a": "vq0zk"}), "vq0zk")]
    added = sorted(added_tokens(tokenizer), key=len, reverse=True)
    ends: list[str] = []
    for answer, last in answers:
        text = own_text(tokenizer, [USER, answer], **kwargs)
        tail = text.rpartition(last)[2] if text and last in text else ""
        found = [(at, -len(token), token) for token in added if (at := tail.find(token)) >= 0]
        # A call's own closing tags come before the end of the turn; they are rarely special tokens.
        special = [item for item in found if item[2] in tokenizer.all_special_tokens or item[2].startswith("<|")]
        if special or found:
            ends.append(min(special or found)[2])
    if not ends:
        _raise_if_broken(tokenizer, kwargs)
        raise FormatError(
            "the tokenizer's own template ends an answer with no token, so generation would not stop; "
            "choose a format by name"
        )
    return tuple(dict.fromkeys(ends))


def _raise_if_broken(tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Raise FormatError with the template's own message when it cannot even render a question and its answer."""
    try:
        tokenizer.apply_chat_template([USER, ANSWER], tokenize=False, **kwargs)
    except Exception as error:  # templates raise anything
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            f"the tokenizer's own template cannot render an answer ({reason}); choose a format by name"
        ) from error


def _call_style(tokenizer: Any, kwargs: dict[str, Any], ends: tuple[str, ...]) -> Format | None:
    """The format whose parser reads back a call that the template has written; None when none does."""
    arguments = {"a": "vq0zk", "b": {"c": [1, True]}}
    prompt = own_text(tokenizer, [USER], add_generation_prompt=True, **kwargs)
    text = own_text(tokenizer, [USER, call_message(arguments)], **kwargs)
    if prompt is None or text is None or not text.startswith(prompt):
        return None
    written = text[len(prompt) :]
    written = written[: min((at for end in ends if (at := written.find(end)) >= 0), default=len(written))]
    for fmt in FORMATS.values():
        if fmt.read_calls and fmt.read_calls(written, None).tool_calls == [{"name": CALL_NAME, "arguments": arguments}]:
            return fmt
    return None


def _requires_mistral_ids(tokenizer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the template raises for call ids that do not have nine characters, as Mistral's do."""
    nine, *others = (
        own_text(tokenizer, [USER, call_message(call_id=call_id)], **kwargs)
        for call_id in ("callid000", "call_1", "call_0123456789")
    )
    return nine is not None and others == [None, None]


def detect(added: Set[str], template: str) -> str | None:
    return "the tokenizer carries a template of its own" if template else None


FORMAT = Format("native", "", (), adapt=adapt, detect=detect, detect_order=1_000)
