"""Does a template drop something? Templates omit calls, text beside calls, tool results and tools without an error."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from formats.base import Format, call_of, place, render_messages, split_reasoning
from formats.tokens import tokens_of

MAX_CACHED_PROBES = 20_000
MAX_PROBED_MESSAGES = 64
DROPS_TEXT = "the template drops its text"
DROPS_CALLS = "the template drops its tool calls"


def lost_in_answer(answer: dict, completion: str, tools: list[dict], fmt: Format) -> tuple[str | None, str | None]:
    """(what the rendered answer lost, what it legitimately omits), each None when there is nothing to report.

    With a parser the answer must parse back to what it was; without one its parts must be found in the text.
    """
    reasoning, content = reasoning_of(answer, fmt), answer["content"]
    if not answer.get("reasoning_content"):
        content = split_reasoning(content, fmt.reasoning)[1]
    calls = [call_of(call) for call in answer.get("tool_calls", [])]
    warning = None
    if reasoning and reasoning not in completion:
        warning = "the template has no place for its reasoning (qwen-xml's has one)"
    if fmt.read_calls is None:
        return _missing(content, calls, completion), warning
    return _not_parsed_back(content, calls, completion, tools, fmt), warning


def reasoning_of(answer: dict, fmt: Format) -> str:
    """An answer's reasoning, from its field or from the start of its text; "" for none."""
    return (answer.get("reasoning_content") or split_reasoning(answer["content"], fmt.reasoning)[0] or "").strip()


def _not_parsed_back(content: str, calls: list[dict], completion: str, tools: list[dict], fmt: Format) -> str | None:
    parsed = fmt.parse(completion, tools)
    if parsed.errors:
        return f"its text does not parse back: {parsed.errors[0]}"
    if _comparable(parsed.tool_calls, fmt.untyped) != _comparable(calls, fmt.untyped):
        if calls and not parsed.tool_calls and calls[0]["name"] not in completion:
            return DROPS_CALLS
        return "its tool calls do not parse back to what they are" if calls else "its text would be read as a tool call"
    as_reasoning = bool(calls) and not parsed.content and parsed.reasoning_content == content.strip()  # gpt-oss
    if parsed.content.strip() != content.strip() and not as_reasoning:
        return "its text does not parse back to what it is" if parsed.content.strip() else DROPS_TEXT
    return None


def _comparable(calls: list[dict[str, Any]], untyped: bool) -> list[tuple[str, Any]]:
    return [(call["name"], _untyped(call["arguments"]) if untyped else _exact(call["arguments"])) for call in calls]


def _exact(value: Any) -> str:
    """JSON text, which tells 7, 7.0, "7" and true apart; templates may sort keys (Gemma 4)."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _untyped(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """Arguments as a format without types writes them; Python's spelling of constants equals JSON's."""
    constants = {"True": "true", "False": "false", "None": "null"}
    texts = {key: value if isinstance(value, str) else _exact(value) for key, value in arguments.items()}
    return sorted((key, constants.get(text, text)) for key, text in texts.items())


def _missing(content: str, calls: list[dict], completion: str) -> str | None:
    if not _contains(completion, content):
        return DROPS_TEXT
    texts = [text for call in calls for text in (call["name"], *_strings(call["arguments"]))]
    return None if all(_contains(completion, text) for text in texts) else DROPS_CALLS


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


@lru_cache(maxsize=64)
def _bare(text: str) -> str:
    """Text without white space, quotes, backslashes and entities: equal for a string and its JSON spelling."""
    return re.sub(r"\\[ntr]|&#\d+;|[\s\"'\\]", "", text)


def _contains(text: str, content: str) -> bool:
    stripped = content.strip()
    # JSON has a spelling of its own for control characters, such as a terminal's colours in a tool's output.
    return stripped in text or json.dumps(stripped, ensure_ascii=False)[1:-1] in text or _bare(content) in _bare(text)


def lost_in_prompt(
    messages: list[dict],
    tools: list[dict],
    prompt: str,
    fmt: Format,
    tokenizer: Any,
    checked: tuple[str, int] = ("", 0),
) -> str | None:
    """What a prompt lost of the messages and tools that it is made of, or None.

    Two checks: every content is found in the prompt, and (once for each shape of conversation) a probe of that shape,
    with a different word in every place, keeps all its words. The probe also finds the loss of a text that occurs
    somewhere else as well.

    checked  an earlier prompt of the same conversation, and the number of its messages that were found in it
    """
    at, number = (len(checked[0]), checked[1]) if prompt.startswith(checked[0]) else (0, 0)
    rest = prompt[at:]
    for index, message in enumerate(messages[number:], number):
        content = message["content"]
        if message["role"] == "assistant":
            content = split_reasoning(content, fmt.reasoning)[1]
        if not _contains(rest, content) and not (at and _contains(prompt, content)):
            return f"{place(index, message['role'])}: {DROPS_TEXT}"
    probed = _probed_messages(messages)
    shape = tuple(
        (message["role"], bool(message["content"].strip()), len(message.get("tool_calls", []))) for _, message in probed
    )
    key = (fmt.template, tuple(fmt.template_kwargs.items()), shape, bool(tools))
    known = tokens_of(tokenizer).probed
    if key not in known:
        if len(known) > MAX_CACHED_PROBES:
            known.clear()
        known[key] = _probe([message for _, message in probed], tools, fmt, tokenizer)
    if (lost := known[key]) is None:
        return None
    position, reason = lost
    if position is None:
        return reason
    index, message = probed[position]
    return f"{place(index, message['role'])}: {reason}"


def _probed_messages(messages: list[dict]) -> list[tuple[int, dict]]:
    """(index, message) of those that are probed: of a long conversation its system messages and its last turns.

    The turns before them were probed when their own answers were checked.
    """
    numbered = list(enumerate(messages))
    if len(messages) <= MAX_PROBED_MESSAGES:
        return numbered
    begin = next((index for index, message in numbered if message["role"] != "system"), 0)
    first = len(messages) - MAX_PROBED_MESSAGES
    cut = next((index for index, message in numbered[first:] if message["role"] == "user"), begin)
    return numbered[:begin] + numbered[max(cut, begin) :]


def _probe(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> tuple[int | None, str] | None:
    """(position of the message that loses something, or None for the tools; what it loses); None if nothing is lost."""
    probes: list[dict] = []
    words: list[tuple[str, int | None, str]] = []
    for position, message in enumerate(messages):
        probe = dict(message)
        if message["content"].strip():
            probe["content"] = f"wq{position}zk"
            words.append((probe["content"], position, DROPS_TEXT))
        if calls := message.get("tool_calls"):
            names = [(f"fq{position}x{number}zk", f"vq{position}x{number}zk") for number in range(len(calls))]
            probe["tool_calls"] = [
                {**call, "function": {"name": name, "arguments": {"a": value}}}
                for call, (name, value) in zip(calls, names, strict=True)
            ]
            words += [(word, position, DROPS_CALLS) for pair in names for word in pair]
        probes.append(probe)
    if tools:
        schema = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
        tools = [{"type": "function", "function": {"name": "tq0zk", "description": "d", "parameters": schema}}]
        words.append(("tq0zk", None, f"format {fmt.name}: the template does not show the model its tools"))
    try:
        text = render_messages(probes, tools, fmt, tokenizer, add_generation_prompt=True)
    except Exception:  # the template depends on the contents, so only the first check applies
        return None
    return next(((position, reason) for word, position, reason in words if word not in text), None)
