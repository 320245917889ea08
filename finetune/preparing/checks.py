"""Problems of a canonical conversation: order of turns, calls, results, empty answers.

An error rejects the row; a warning is counted and shown. Calls are checked against their tool's JSON Schema.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from typing import Any

from finetune.encoding.rows import empty_answer
from finetune.json_schema import schema_errors, unchecked_keywords
from finetune.progress import counted
from finetune.reading.calls_in_text import call_tag


@dataclass(frozen=True)
class Problem:
    """`kind` is short and fixed, for counting; `text` names message, tool and value."""

    kind: str
    text: str
    error: bool = True


# Kind of an error -> the words after a number of rows.
ERROR_KINDS = {
    "tool declared twice": "with a tool declared twice",
    "nothing to train": "without an answer to train",
    "empty answer": "with an empty answer",
    "orphan result": "with a result that belongs to no call",
    "undeclared tool": "with calls of undeclared tools",
    "broken schema": "with a broken schema",
    "arguments against the schema": "with arguments against the schema",
}


# Errors of rows that are not trained as they are -> what to do. Training stops at them, encoding refuses the row.
STOPPING = {
    "undeclared tool": "give the tools with --tools FILE, or in a column named tools",
    "orphan result": "remove the result, or add its call",
}


def refusal(conversation: dict[str, Any]) -> str:
    """Why a conversation is not trained as it is, and what to do; "" if it may be."""
    problems = (problem for problem in check_conversation(conversation) if problem.kind in STOPPING)
    return next((f"{problem.text}; {STOPPING[problem.kind]}" for problem in problems), "")


def _warning(kind: str, text: str) -> Problem:
    return Problem(kind, text, error=False)


def check_conversation(conversation: dict[str, Any]) -> list[Problem]:
    """All problems of one canonical conversation, errors first."""
    return sorted(_problems(conversation), key=lambda problem: not problem.error)


def _problems(conversation: dict[str, Any]) -> Iterator[Problem]:
    messages, tools = conversation["messages"], conversation["tools"]
    for name, number in Counter(tool["function"]["name"] for tool in tools).items():
        if number > 1:
            yield Problem("tool declared twice", f"tool {name} is declared {number} times")
    if not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
        yield Problem("nothing to train", "there is no assistant message to train")
    if not any(m["role"] == "user" for m in messages):
        yield _warning("no user message", "there is no user message")
    yield from _check_order([message["role"] for message in messages])
    yield from _check_results(messages)
    if empty := empty_answer(conversation):
        yield Problem("empty answer", empty)
    described = cache(partial(_described_from, messages))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls", ())
        if message["role"] == "assistant" and not calls and (mark := unread_call(message["content"], schemas)):
            yield _warning("call left in the text", f"message {number}: {mark!r} looks like a call; it stays text")
        for call in calls:
            name = call["function"]["name"]
            if not tools and described(name) < number:
                yield _warning("tools described only in the text", f"message {number}: calls {name}")
            else:
                yield from _check_call(call["function"], number, schemas)


_TOOL_WORD = re.compile(r"\b(?:tool|function)s?\b|도구|함수", re.IGNORECASE)


def _described_from(messages: list[dict[str, Any]], name: str) -> float:
    """Number of the first system's or user's message that speaks of tools and names this one: it has its own list."""
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    for number, message in enumerate(messages, start=1):
        text = message["content"] if message["role"] in ("system", "user") else ""
        if word.search(text) and _TOOL_WORD.search(text):
            return number
    return math.inf


# Opening tags of calls in other formats: Llama 3.1's built-in tools, DeepSeek, gpt-oss, Phi, Command R, Gemma, Kimi.
_CALL_TAGS = (
    *("<|python_tag|>", "<｜tool▁call", "<|channel|>commentary", "<|tool_call|>", "<|START_ACTION|>"),
    *("<start_function_call>", "<|tool_calls_section_begin|>"),
)

# `{"name": "f", "arguments": …` and `[f(a=` at the beginning of a text, whatever is declared.
_CALL_OBJECT = re.compile(
    r"""\s*+(?:```\w*+\s*+)?\[?\s*+(?:\{\s*["'](?:name|api|api_name|tool|tool_name|function|action)["']\s*:\s*["']?[\w./-]+["']?"""
    r"""\s*,\s*["'](?:parameters|arguments|args|input|action_input|tool_input)["']\s*:|(?<=\[)[A-Za-z_][\w.]*\(\w+\s*=)"""
)


def unread_call(text: str, names: Iterable[str]) -> str:
    """The part of an assistant's text that looks like a call but was not read as one; "" if there is none.

    It may be a tag of some model's format, a Python call of a declared tool, or JSON that names a declared tool.
    """
    if tag := next((tag for tag in _CALL_TAGS if tag in text), "") or call_tag(text):
        return tag
    if found := _CALL_OBJECT.match(text):
        return found[0].strip()
    if not (declared := "|".join(map(re.escape, names))):
        return ""
    found = re.match(rf"\s*+\[?\s*+(?:{declared})\(", text) or re.search(
        rf"""["'](?:name|tool|function|action)["']\s*:\s*["'](?:{declared})["']|^(?:Action|Tool):\s*(?:{declared})\s*$""",
        text,
        re.MULTILINE,
    )
    return found[0].strip() if found else ""


def _check_order(roles: list[str]) -> Iterator[Problem]:
    begin = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[begin:]:
        at = begin + roles[begin:].index("system") + 1
        yield _warning("system message in the middle", f"message {at}: a system message after other messages")
    if begin > 1:
        yield _warning("several system messages", f"the conversation begins with {begin} system messages")
    if roles[begin : begin + 1] == ["assistant"]:
        yield _warning("assistant speaks first", f"message {begin + 1}: the assistant speaks before any user")
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == before and role in ("user", "assistant"):
            yield _warning(f"two {role} messages in a row", f"messages {number - 1} and {number}: both {role}")
        if before == "tool" and role == "user":
            yield _warning("result without an answer", f"message {number}: a user message right after a tool result")
    if roles and roles[-1] != "assistant":
        yield _warning("ends without an answer", f"the last message has the role {roles[-1]}, not assistant")


def _check_results(messages: list[dict[str, Any]]) -> Iterator[Problem]:
    """Each result must answer a call of the assistant message before it, by id where both sides have ids."""
    calls: list[dict[str, Any]] = []
    results = 0
    ids: set[str] = set()  # of the calls
    names: set[str] = set()
    answered: set[str] = set()  # ids with a result
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            if results < len(calls):
                which = "have no result" if results == 0 else f"are {len(calls)}, with {counted(results, 'result')}"
                yield _warning("call without a result", f"message {number}: the calls before it {which}")
            calls, results, answered = message.get("tool_calls", []), 0, set()
            ids = {call["id"] for call in calls if "id" in call}
            names = {call["function"]["name"] for call in calls}
        elif message["role"] == "tool":
            results += 1
            if orphan := _orphan(message, len(calls), ids, names, results):
                yield Problem("orphan result", f"message {number}: {orphan}")
                continue
            given, expected = message.get("tool_call_id"), calls[results - 1].get("id")
            if given is not None and given in answered:
                yield Problem("orphan result", f"message {number}: a second result for the call {given!r}")
                continue
            answered.add(given)
            if given not in (None, expected) and ids:
                kind = "results in another order than their calls"  # formats without ids rely on the order
                yield _warning(kind, f"message {number}: {given!r} is out of order")


def _orphan(message: dict[str, Any], calls: int, ids: set[str], names: set[str], results: int) -> str:
    """Why a result, the `results`-th after `calls` calls, belongs to none of them; "" if it does."""
    if not calls:
        return "a tool result, but nothing was called"
    if ids and message.get("tool_call_id") and message["tool_call_id"] not in ids:
        return f"no call before it has the tool_call_id {message['tool_call_id']!r}"
    if results > calls:
        return f"{counted(results, 'result')} for {counted(calls, 'call')}"
    if message.get("name") and message["name"] not in names:
        return f"a result of {message['name']}, which was not called"
    return ""


def _check_call(function: dict[str, Any], number: int, schemas: dict[str, Any]) -> Iterator[Problem]:
    name, arguments = function["name"], function["arguments"]
    if name not in schemas:
        declared = ", ".join(islice(schemas, 50))[:200] or "none"
        yield Problem(
            "undeclared tool", f"message {number}: calls {name}, which is not declared (declared: {declared})"
        )
        return
    if not schemas[name]:
        return
    errors, broken = schema_errors(schemas[name], arguments)
    if broken:
        yield Problem("broken schema", f"the schema of tool {name} {broken}")
        return
    for keyword in unchecked_keywords(schemas[name]):
        yield _warning("schema keyword not checked", f"tool {name}: {keyword}")
    if errors:
        where = "/".join(map(str, errors[0].absolute_path)) or "arguments"
        text = f"message {number}: call of {name}, {where}: {errors[0].message[:300]}"
        yield Problem("arguments against the schema", text)


def exact_key(conversation: dict[str, Any]) -> bytes:
    """Equal for conversations with equal messages and tools, whatever the order of keys and the ids of calls."""
    messages = [{k: v for k, v in message.items() if k != "tool_call_id"} for message in conversation["messages"]]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    text = json.dumps([messages, conversation["tools"]], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).digest()


def called_tool(conversation: dict[str, Any]) -> str:
    """The tool that is called first, for balance and stratified splits; "(no call)" if there is none."""
    return next((call["function"]["name"] for call in all_calls(conversation)), "(no call)")


def all_calls(conversation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The calls of all turns."""
    return (call for message in conversation["messages"] for call in message.get("tool_calls", ()))
