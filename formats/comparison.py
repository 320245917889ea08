"""Does a format render what the tokenizer's own chat template renders?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from formats.base import Format, clean_messages, render_messages
from formats.derivation import NAMES, TEXT, TOOLS, VALUES, answer, call
from formats.probing import own_template, own_text
from formats.reasoning import REASONING

SYSTEM = {"role": "system", "content": "sq0zk"}
USER, AGAIN = {"role": "user", "content": "wq0zk"}, {"role": "user", "content": "xq0zk"}
RESULTS = [{"role": "tool", "tool_call_id": f"callid00{n}", "name": NAMES[n], "content": f"rq{n}zk"} for n in (0, 1)]
LAST = answer("zq0zk")
REASONED = {**LAST, "reasoning_content": REASONING}


class Comparison(NamedTuple):
    """difference: the first conversation that the two render differently; None: they agree on all that could be
    compared, an answer among them. with_tools: whether a conversation with tools was among these."""

    difference: str | None
    with_tools: bool


def compare(fmt: Format, tokenizer: Any) -> Comparison:
    """Compare `fmt` with the tokenizer's own template on conversations of all kinds.

    Conversations that the own template cannot render, or loses a part of, are skipped. Calls of a template that does
    not show tools are compared without tools. Both get the format's variables: a pinned date is no difference.
    """
    answered, with_tools = False, False
    tools_shown = TOOLS if shows_tools(tokenizer) else None
    for label, messages, tools, words in _conversations(tools_shown):
        prompted = messages[-1]["role"] != "assistant"
        thinks = {fmt.thinking: True} if fmt.thinking and "reasoning" in label else {}
        variables = {**fmt.template_kwargs, **thinks}
        own = own_text(tokenizer, messages, tools=tools, add_generation_prompt=prompted, **variables)
        if own is None or not all(word in own for word in words):
            continue
        try:
            ours = render_messages(clean_messages(messages, fmt), tools, fmt, tokenizer, prompted, **thinks)
        except Exception:  # templates raise anything
            ours = None
        if ours != own:
            return Comparison(label, with_tools)
        answered, with_tools = answered or not prompted, with_tools or tools is not None
    return Comparison(None if answered else "every answer", with_tools)


def shows_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's own template writes the tools into a prompt."""
    return NAMES[0] in (own_text(tokenizer, [USER], tools=TOOLS, add_generation_prompt=True) or "")


def own_difference(fmt: Format, tokenizer: Any) -> str | None:
    """One line on what `fmt` renders differently from the tokenizer's own template; None: nothing, or it has none."""
    if not own_template(tokenizer) or (difference := compare(fmt, tokenizer).difference) is None:
        return None
    return f"renders {difference} differently from the tokenizer's own template"


def _conversations(
    tools: list[dict] | None,
) -> Iterator[tuple[str, list[dict[str, Any]], list[dict] | None, list[str]]]:
    """(label, messages, tools, words that the rendering must hold); calls come with `tools`."""
    calls = {
        "a call": [USER, answer("", call()), RESULTS[0], LAST],
        "parallel calls": [USER, answer("", call(), call(1)), *RESULTS, LAST],
        "a text with a call": [USER, answer(TEXT, call()), RESULTS[0], LAST, AGAIN, LAST],
        "a result": [USER, answer("", call()), RESULTS[0]],
    }
    plain = {
        "a question": [USER],
        "an answer": [USER, LAST],
        "a second turn": [USER, LAST, AGAIN, LAST],
        "a question that needs reasoning": [USER],
        "reasoning": [USER, REASONED, AGAIN, REASONED],
    }
    if tools:
        plain["white space around texts"] = [_padded(USER), _padded(LAST), _padded(AGAIN)]
    for start, before in (("", []), (" behind a system message", [SYSTEM])):
        for label, messages in plain.items():
            yield f"{label}{start}", before + messages, None, _words(before + messages)
        for label, messages in {"a question": [USER], **calls}.items():
            words = [*_words(before + messages), *(NAMES if tools else ())]
            yield f"{label}{start}, {'with' if tools else 'without'} tools", before + messages, tools, words


def _padded(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": f"\n {message['content']} \n"}


def _words(messages: list[dict[str, Any]]) -> list[str]:
    words = [message["content"].strip() for message in messages if message["content"]]
    words += [message["reasoning_content"] for message in messages if "reasoning_content" in message]
    calls = [entry["function"] for message in messages for entry in message.get("tool_calls", [])]
    return words + [one["name"] for one in calls] + (list(VALUES) if calls else [])
