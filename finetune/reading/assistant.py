"""One raw assistant message -> the canonical one: its text, reasoning and calls, wherever the row holds them."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from finetune.reading.bracket_calls import bracket_calls
from finetune.reading.calls_in_text import call_tag, given_arguments, split_calls
from finetune.reading.raw_calls import (
    CALL_KEYS,
    bare_json_calls,
    calls_under_other_keys,
    is_call_type,
    plain_call,
    read_channel,
    refuse_hidden_calls,
    same_calls,
)
from finetune.reading.row_files import EMPTY, RowError, decode_json, json_type
from finetune.reading.tool_lines import split_tool_lines
from finetune.reading.training_marks import TRAINING_MARKS
from formats.base import split_reasoning

Message = dict[str, Any]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def read_assistant(
    message: Message, content: str, tools: list[dict[str, Any]], names: set[str], notes: Counter, *, only_calls: bool,
    answered: bool,
) -> tuple[Message, set[str]]:  # fmt: skip
    """(canonical message, further keys that were read). Raises RowError; the caller adds the message's number.

    names       those of the tools
    only_calls  a message of the role `tool_call` or `function_call`
    answered    the next message is a tool's result
    """
    read = set()
    if message.get("channel") is not None or message.get("recipient") is not None:
        message = message | read_channel(message, content, names)
        content = message["content"]
        read |= {"channel", "recipient", "content_type"}
    calls: list[dict[str, Any]] = []
    if only_calls:
        content, calls, keys = _call_turn(message, content, tools, notes)
        read |= keys
    calls += _tool_calls(message, notes)
    others, held = calls_under_other_keys(message)
    if others:
        found = [_call(call, notes) for call in others]
        if calls and not same_calls(calls, found):
            raise RowError(f"the calls under {next(iter(held))} are not those beside it; write all into tool_calls")
        if not calls:
            calls = found
            notes[f"{next(iter(held))[:40]} -> tool_calls"] += 1
    read |= held.keys()
    if any(key.startswith("additional_kwargs.") for key in held):
        rest = {k: v for k, v in message["additional_kwargs"].items() if f"additional_kwargs.{k}" not in held}
        refuse_hidden_calls(rest, names)
        notes.update(f"not read, key {key[:40]!r} of additional_kwargs" for key in rest if rest[key] not in EMPTY)
        read.add("additional_kwargs")
    if not calls and content.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            found = bracket_calls(content, sorted(names, key=len, reverse=True))
            if found:
                content, calls = "", [{"type": "function", "function": call} for call in found]
                notes["bracket calls in the text -> tool_calls"] += 1
    if not calls and (lines := split_tool_lines(content, names)):
        content, calls = lines[0], [{"type": "function", "function": call} for call in lines[1]]
        notes["lines Tool:, Parameters:, Reasoning: -> tool_calls"] += 1
    elif not calls and call_tag(content):
        content, calls = _tagged_calls(content, tools, names, notes)
    elif not calls and answered:
        thought, rest = split_thought(content)
        if bare := bare_json_calls(rest, names):
            content, calls = thought, [_call(call, notes) for call in bare]
            notes["call written as JSON in front of a result -> tool_calls"] += 1
    if content != content.strip():
        notes["assistant text stripped"] += 1
    result: Message = {"role": "assistant", "content": content.strip()}
    for name in REASONING_KEYS:
        value = message.get(name)
        if value and not isinstance(value, str):
            raise RowError(f"{name} is a JSON {json_type(value)}, not text")
        if value and value.strip() and result.setdefault("reasoning_content", value.strip()) != value.strip():
            notes[f"{name} not read: the message has another reasoning"] += 1
    if calls:
        result["tool_calls"] = calls
    return result, read


def split_thought(content: str) -> tuple[str, str]:
    """(`<think>…</think>` at the beginning of a text, the rest); ("", text) without one."""
    if split_reasoning(content)[0] is None:
        return "", content.strip()
    head, closing, rest = content.partition("</think>")
    return (head + closing).strip(), rest.strip()


def _tagged_calls(
    content: str, tools: list[dict[str, Any]], names: set[str], notes: Counter
) -> tuple[str, list[dict[str, Any]]]:
    found = split_calls(content, tools)
    # After other text, a tag is a call only if it calls a declared tool; it may just be mentioned.
    if found and (not found[0] or all(call["name"] in names for call in found[1])):
        notes["calls written in the text -> tool_calls"] += 1
        return found[0], [{"type": "function", "function": call} for call in found[1]]
    notes["call tag in the text left as text (it does not parse cleanly)"] += 1
    return content, []


def _call_turn(
    message: Message, content: str, tools: list[dict[str, Any]], notes: Counter
) -> tuple[str, list[dict[str, Any]], set[str]]:
    """(text in front, calls, keys read) of a `tool_call` message.

    The calls are JSON of one or of a list of them, or tagged calls, in the content, perhaps behind
    `<think>…</think>`; or the message itself has the keys `name` and `arguments`.
    """
    if not content.strip() and isinstance(message.get("name"), str):
        keys = {key for key in ("name", "arguments", "parameters", "id") if key in message}
        return "", [_call({key: message[key] for key in keys}, notes)], keys
    if not content.strip() and any(message.get(key) not in EMPTY for key in ("tool_calls", "function_call")):
        return "", [], set()
    thought, rest = split_thought(content)
    found = split_calls(rest, tools)
    if found and not found[0]:
        return thought, [{"type": "function", "function": call} for call in found[1]], set()
    calls = decode_json(rest, "the function call")
    return thought, [_call(item, notes) for item in (calls if isinstance(calls, list) else [calls])], set()


def _tool_calls(message: Message, notes: Counter) -> list[dict[str, Any]]:
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if calls in EMPTY and legacy in EMPTY:
        return []
    calls, legacy = decode_json(calls, "tool_calls"), decode_json(legacy, "function_call")
    if legacy not in EMPTY:
        notes["function_call not read: the message has tool_calls" if calls else "function_call -> tool_calls"] += 1
        calls = calls or [legacy]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError(f"tool_calls: a JSON {json_type(calls)}, not a list")
    return [_call(call, notes) for call in calls]


def _call(item: Any, notes: Counter) -> dict[str, Any]:
    item = plain_call(item)
    function = item["function"] if isinstance(item.get("function"), dict) else item
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError("a tool call has no name")
    if item.get("name") not in (None, name):
        raise RowError(f"a tool call has two names, {name} and {item['name']}; keep one of them")
    try:
        arguments = given_arguments(item) if function is item else given_arguments(function, item)
    except RowError as error:
        raise RowError(f"call of {name}: {error}") from error
    held = {key: value for key, value in item.items() if value is not function} | function
    unread = [key for key, value in held.items() if key not in CALL_KEYS and value not in EMPTY]
    unread += ["type"] if not all(is_call_type(holder.get("type")) for holder in (item, function)) else []
    if unread and arguments is None:
        raise RowError(f"call of {name} has no arguments but {', '.join(unread)}; rename it to arguments")
    if marks := [key for key in unread if key in TRAINING_MARKS]:
        raise RowError(f"call of {name} has {marks[0]}; a turn is trained completely or not at all: mark the message")
    notes.update(f"not read, key {key[:40]!r} of calls" for key in unread)
    call: dict[str, Any] = {"type": "function"}
    if item.get("id") is not None:
        call["id"] = str(item["id"])
    return call | {"function": {"name": name, "arguments": arguments or {}}}
