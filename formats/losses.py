"""Does a template lose something? Templates drop calls, texts beside calls, tool results and tools without a word."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from formats.base import Format, call_of, place, render_messages, split_reasoning


def lost_in_answer(
    answer: dict, completion: str, prompt: str, tools: list[dict], fmt: Format
) -> tuple[str | None, str | None]:
    """(what the rendered answer lost, what it legitimately leaves out), each None when there is nothing to say.

    With a parser the answer must read back as it was; without one its parts must be found in the text.
    """
    reasoning, content = answer.get("reasoning_content"), answer["content"]
    if not reasoning and "</think>" in content:
        inline, rest = split_reasoning(content, fmt.reasoning)
        if inline is not None:
            reasoning, content = inline, rest
    calls = [call_of(call) for call in answer.get("tool_calls", [])]
    note = None
    if reasoning and reasoning.strip() not in completion:
        note = "the template has no place for its reasoning"
    if fmt.read_calls is None:
        return _lost_by_containment(content, calls, completion), note
    # A prompt may end inside a reasoning block; the answer is read as a server would read it.
    parsed = fmt.parse(completion, tools)
    if parsed.errors:
        return f"its text does not read back: {parsed.errors[0]}", note
    if not _same_calls(parsed.tool_calls, calls, fmt.untyped):
        if calls and not parsed.tool_calls and calls[0]["name"] not in completion:
            return "the template drops its tool calls", note
        if not calls:
            return "its text would be read as a tool call", note
        return "its tool calls do not read back as they are", note
    if not _same_text(parsed.content, content):
        lost = "the template drops its text" if not parsed.content.strip() else "its text does not read back as it is"
        return lost, note
    return None, note


def _same_calls(one: list[dict], two: list[dict], untyped: bool) -> bool:
    same = _untyped if untyped else exact
    return len(one) == len(two) and all(
        a["name"] == b["name"] and same(a["arguments"]) == same(b["arguments"]) for a, b in zip(one, two, strict=True)
    )


def exact(value: Any) -> str:
    """A JSON text that tells 7, 7.0, "7" and true apart and keeps the order of keys."""
    return json.dumps(value, ensure_ascii=False)


def _untyped(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """Arguments as a format without types writes them; Python's words and JSON's are the same."""
    words = {"True": "true", "False": "false", "None": "null"}
    written = {key: value if isinstance(value, str) else exact(value) for key, value in arguments.items()}
    return [(key, words.get(text, text)) for key, text in written.items()]


def _same_text(one: str, two: str) -> bool:
    return one.strip() == two.strip()


def _lost_by_containment(content: str, calls: list[dict], completion: str) -> str | None:
    if content.strip() and not _holds(completion, content):
        return "the template drops its text"
    for call in calls:
        leaves = [call["name"], *_leaves(call["arguments"])]
        if not all(_holds(completion, leaf) for leaf in leaves):
            return "the template drops its tool calls"
    return None


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [key, *_leaves(item)]]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) else []


_ENTITY = re.compile(r"&#\d+;")


@lru_cache(maxsize=64)
def _bare(text: str) -> str:
    """Text without white space, quotes and backslashes: equal for a string and its JSON spelling."""
    text = text.replace("\\n", "").replace("\\t", "").replace("\\r", "")
    if "&#" in text:
        text = _ENTITY.sub("", text)
    return "".join(text.split()).replace('"', "").replace("'", "").replace("\\", "")


def _holds(text: str, content: str) -> bool:
    bare = content.strip()
    if content in text or bare in text:
        return True
    # Control characters (a terminal's colours in a tool's output) have a spelling of their own in JSON.
    return json.dumps(bare, ensure_ascii=False)[1:-1] in text or _bare(content) in _bare(text)


_PROBED: dict[tuple, str | None] = {}


def lost_in_prompt(messages: list[dict], tools: list[dict], prompt: str, fmt: Format, tokenizer: Any) -> str | None:
    """What a prompt lost of the messages and tools it is made of, or None.

    Two checks: every content is found in the prompt, and (once for each shape of conversation) a probe of that shape,
    with a different word in every place, keeps all of its words. The probe finds the loss of a text that also
    stands somewhere else.
    """
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content:
            content = split_reasoning(content, fmt.reasoning)[1]
        if content and content not in prompt and not _holds(prompt, content):
            return f"{place(index, message['role'])}: the template drops its text"
    shape = tuple(
        (message["role"], bool(message["content"].strip()), len(message.get("tool_calls", []))) for message in messages
    )
    key = (fmt.template, tuple(fmt.template_kwargs.items()), shape, bool(tools), tokenizer.__class__)
    if key not in _PROBED:
        if len(_PROBED) > 20_000:
            _PROBED.clear()
        _PROBED[key] = _probe(messages, tools, fmt, tokenizer)
    return _PROBED[key]


def _probe(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> str | None:
    probes, words = [], []
    for index, message in enumerate(messages):
        probe, where = dict(message), place(index, message["role"])
        if message["content"].strip():
            probe["content"] = f"wq{index}zk"
            words.append((probe["content"], f"{where}: the template drops its text"))
        if message.get("tool_calls"):
            probe["tool_calls"] = []
            for number, call in enumerate(message["tool_calls"]):
                name = f"fq{index}x{number}zk"
                value = f"vq{index}x{number}zk"
                function = {"name": name, "arguments": {"a": value}}
                probe["tool_calls"].append({**call, "function": function})
                words += [(word, f"{where}: the template drops its tool calls") for word in (name, value)]
        probes.append(probe)
    if tools:
        schema = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
        tools = [{"type": "function", "function": {"name": "tq0zk", "description": "d", "parameters": schema}}]
        words.append(("tq0zk", f"format {fmt.name}: the template does not show the model its tools"))
    try:
        text = render_messages(probes, tools, fmt, tokenizer, add_generation_prompt=True)
    except Exception:  # the template reads contents; the first check has to do
        return None
    return next((reason for word, reason in words if word not in text), None)
