"""What can be wrong with a conversation that has the right shape: order of turns, calls, results, empty answers.

An error sets the row aside, a warning is counted and shown. Calls are checked against their tool's JSON Schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finetune.encoding.rows import empty_answer
from finetune.json_schema import validator_of
from finetune.reading.calls_in_text import call_tag


@dataclass(frozen=True)
class Problem:
    """`kind` is short and fixed, for counting; `text` names message, tool and value."""

    kind: str
    text: str
    error: bool


def check_conversation(conversation: dict[str, Any]) -> list[Problem]:
    """All problems of one canonical conversation, errors first."""
    messages, tools = conversation["messages"], conversation["tools"]
    problems: list[Problem] = []

    def add(kind: str, text: str, error: bool = True) -> None:
        problems.append(Problem(kind, text, error))

    names = Counter(tool["function"]["name"] for tool in tools)
    for name, number in names.items():
        if number > 1:
            add("tool declared twice", f"tool {name} is declared {number} times")
    if not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
        add("nothing to train", "there is no assistant message to train")
    if not any(m["role"] == "user" for m in messages):
        add("no user message", "there is no user message", error=False)
    _check_order(messages, add)
    _check_results(messages, add)
    if empty := empty_answer(conversation):
        add("empty answer", empty)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for number, message in enumerate(messages, start=1):
        if (
            message["role"] == "assistant"
            and not message.get("tool_calls")
            and (mark := call_left_in_text(message.get("content") or "", schemas))
        ):
            says = f"message {number}: {mark!r} looks like a call, but not as calls are read here; it stays text"
            add("call left in the text", says, error=False)
        for call in message.get("tool_calls", ()):
            _check_call(call["function"], number, schemas, add)
    return sorted(problems, key=lambda problem: not problem.error)


# Openings of calls as other models write them: Llama 3.1's built-in tools, DeepSeek, gpt-oss, Phi, Command R.
_CALL_MARKS = ("<|python_tag|>", "<｜tool▁call", "<|channel|>commentary", "<|tool_call|>", "<|START_ACTION|>")


def call_left_in_text(text: str, names: Iterable[str]) -> str:
    """What in an assistant's text looks like a call that reading did not take for one; empty when nothing does.

    A mark of some model's format, a text that begins as a Python call of a declared tool, or JSON that names one.
    """
    if mark := next((mark for mark in _CALL_MARKS if mark in text), "") or call_tag(text):
        return mark
    if not (declared := "|".join(map(re.escape, names))):
        return ""
    found = re.match(rf"\s*\[?\s*(?:{declared})\(", text) or re.search(
        rf"""["'](?:name|tool|function|action)["']\s*:\s*["'](?:{declared})["']""", text
    )
    return found[0].strip() if found else ""


def _check_order(messages: list[dict[str, Any]], add) -> None:
    roles = [message["role"] for message in messages]
    begin = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[begin:]:
        add("system message in the middle", f"message {begin + roles[begin:].index('system') + 1}: system", error=False)
    if begin > 1:
        add("several system messages", f"the conversation begins with {begin} system messages", error=False)
    if roles[begin : begin + 1] == ["assistant"]:
        add("assistant speaks first", f"message {begin + 1}: the assistant speaks before any user", error=False)
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == before and role in ("user", "assistant"):
            add(f"two {role} messages in a row", f"messages {number - 1} and {number}: both {role}", error=False)
        if before == "tool" and role == "user":
            add("result without an answer", f"message {number}: a user message right after a tool result", error=False)
    if roles and roles[-1] != "assistant":
        add("ends without an answer", f"the last message is of the {roles[-1]}: it is context for nothing", error=False)


def _check_results(messages: list[dict[str, Any]], add) -> None:
    """Each result must answer a call of the assistant message before it, by id where both sides have ids."""
    calls: list[dict[str, Any]] = []
    results = 0
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            if calls and results == 0:
                add("call without a result", f"message {number}: the calls before it got no result", error=False)
            calls, results = message.get("tool_calls", []), 0
        elif message["role"] == "tool":
            results += 1
            ids = {call["id"] for call in calls if "id" in call}
            if not calls:
                add("orphan result", f"message {number}: a tool result, but nothing was called")
            elif ids and message.get("tool_call_id") and message["tool_call_id"] not in ids:
                add(
                    "orphan result",
                    f"message {number}: tool_call_id {message['tool_call_id']!r} is of no call before it",
                )
            elif results > len(calls):
                add("orphan result", f"message {number}: {results} results for {len(calls)} calls")
            elif message.get("name") and message["name"] not in {call["function"]["name"] for call in calls}:
                add("orphan result", f"message {number}: a result of {message['name']}, which was not called")
            elif ids and message.get("tool_call_id") not in (None, calls[results - 1].get("id")):
                kind = "results in another order than their calls"  # without ids in the text they answer the wrong ones
                add(kind, f"message {number}: {message['tool_call_id']!r} comes out of turn", error=False)


def _check_call(function: dict[str, Any], number: int, schemas: dict[str, Any], add) -> None:
    name, arguments = function["name"], function["arguments"]
    if name not in schemas:
        declared = ", ".join(schemas) or "none"
        add("undeclared tool", f"message {number}: calls {name}, which is not declared (declared: {declared[:200]})")
        return
    if not schemas[name]:
        return
    validator, broken = validator_of(json.dumps(schemas[name]))
    if broken:
        add("broken schema", f"the parameters of tool {name} are no JSON Schema: {broken}")
        return
    try:
        error = next(iter(validator.iter_errors(arguments)), None)
    except Exception as failure:  # an unresolvable $ref or a wrong regular expression inside the schema
        add("broken schema", f"the parameters of tool {name} cannot be checked: {str(failure).splitlines()[0][:200]}")
        return
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "arguments"
        add("arguments against the schema", f"message {number}: call of {name}, {where}: {error.message[:300]}")


def exact_key(conversation: dict[str, Any]) -> bytes:
    """Equal for conversations with equal messages and tools, whatever the order of keys and the ids of calls."""
    messages = [{k: v for k, v in message.items() if k != "tool_call_id"} for message in conversation["messages"]]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    text = json.dumps([messages, conversation["tools"]], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).digest()


def called_tool(conversation: dict[str, Any]) -> str:
    """The tool that is called first, for balance and stratified splits; "(no call)" if none is."""
    for message in conversation["messages"]:
        for call in message.get("tool_calls", ()):
            return call["function"]["name"]
    return "(no call)"
