"""Which message every token belongs to, for the audit table; found without looking at the labels.

The conversation is rendered once more with a placeholder in the place of every content. What stands between the
placeholders is the template's own text ("header"); found again in the real text, it shows where each message starts
and ends. An assistant's part goes to the end of its turn, calls included. The tools count as "system".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from formats.base import Format, render_messages



class Piece(NamedTuple):
    """A piece of the template's own text, and where in it the tools' schemas stand."""

    text: str
    tools: tuple[int, int] | None


_SKELETONS: dict[tuple, list[Piece] | None] = {}
_BLOCKS = ("<think>\n\n</think>\n\n", "<think>\n")  # belong to the answer, although a prompt may contain them


def token_roles(
    text: str, starts: list[int], messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> list[str]:
    """system, user, tool, assistant or header for each token; `starts` are the tokens' positions in `text`."""
    spans = sorted(_spans(text, messages, tools, fmt, tokenizer))
    roles = []
    at = 0
    for start in starts:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside = at < len(spans) and spans[at][0] <= start
        roles.append(spans[at][2] if inside else "header")
    return roles


def _spans(
    text: str, messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> Iterator[tuple[int, int, str]]:
    """(start, end, role) of the parts of `text` that are no template text, not overlapping."""
    pieces = _skeleton(messages, tools, fmt, tokenizer)
    if pieces is None or not text.startswith(pieces[0].text):
        return
    if pieces[0].tools:
        yield (*pieces[0].tools, "system")
    at = len(pieces[0].text)
    for message, (behind, schemas) in zip(messages, pieces[1:], strict=True):
        if message["role"] == "assistant":
            ends = [place + len(mark) for mark in fmt.end_of_turn if (place := text.find(mark, at)) >= 0]
            if not ends:
                return
            block = next((block for block in _BLOCKS if text.endswith(block, 0, at)), "")
            yield at - len(block), min(ends), "assistant"
            at = min(ends)
            cut = min((place + len(mark) for mark in fmt.end_of_turn if (place := behind.find(mark)) >= 0), default=0)
            behind = behind[cut:]
            schemas = schemas and (schemas[0] - cut, schemas[1] - cut)
        found = text.find(behind, at)
        if message["role"] != "assistant":
            yield at, len(text) if found < 0 else found, message["role"]
        if found < 0:
            return
        if schemas:
            yield found + schemas[0], found + schemas[1], "system"
        at = found + len(behind)


def _find_tools(glue: str, tools: list[dict]) -> tuple[int, int] | None:
    """(start, end) of the tools' schemas inside a piece of template text, however the template prints them."""
    if not tools or str(tools[0].get("function", tools[0]).get("name")) not in glue:
        return None
    for dump in (json.dumps, lambda value, **kw: json.dumps(value, indent=4, **kw), lambda value, **kw: str(value)):
        for pick in (lambda tool: tool, lambda tool: tool.get("function", tool)):
            first = glue.find(dump(pick(tools[0]), ensure_ascii=False))
            if first >= 0:
                last_text = dump(pick(tools[-1]), ensure_ascii=False)
                last = glue.rfind(last_text)
                return (first, last + len(last_text)) if last >= first else None
    return None


def _skeleton(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> list[Piece] | None:
    """The template's text in front of, between and behind the contents of messages of these roles."""
    shape = tuple((message["role"], bool(message["content"])) for message in messages)
    key = (fmt.template, str(fmt.template_kwargs), shape, json.dumps(tools), type(tokenizer))
    if key not in _SKELETONS:
        if len(_SKELETONS) > 5_000:
            _SKELETONS.clear()
        _SKELETONS[key] = _make_skeleton(messages, tools, fmt, tokenizer)
    return _SKELETONS[key]


def _make_skeleton(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> list[Piece] | None:
    marks = [f"wq{index}zk" for index in range(len(messages))]
    kept = ("role", "tool_call_id", "name")
    plain = [
        {**{key: message[key] for key in kept if key in message}, "content": mark}
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        text = render_messages(plain, tools, fmt, tokenizer)
    except Exception:  # the template wants results only behind calls, or the like
        return None
    glue = []
    for mark, message in zip(marks, messages, strict=True):
        before, found, text = text.partition(mark)
        if not found:
            return None
        if message["role"] == "assistant":
            # Reasoning stands inside the answer's part, whether the template shows an empty block there or a full one.
            before = next((before.removesuffix(block) for block in _BLOCKS if before.endswith(block)), before)
        glue.append(before)
    return [Piece(part, _find_tools(part, tools)) for part in (*glue, text)]
