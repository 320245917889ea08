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
from formats.rendering import KnownTools
from formats.tokens import Tokenized


class Piece(NamedTuple):
    """A piece of the template's own text, and where in it the tools' schemas stand."""

    text: str
    tools: tuple[int, int] | None


_SKELETONS: dict[tuple, tuple[list[int], list[Piece]] | None] = {}
END = (-1, -1, "")
_BLOCKS = ("<think>\n\n</think>\n\n", "<think>\n")  # belong to the answer, although a prompt may contain them


def token_roles(
    text: str, tokens: Tokenized, messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> list[str]:
    """system, user, tool, assistant or header for each token of `text`."""
    roles: list[str] = []
    for start, end, role in sorted(_spans(text, messages, tools, fmt, tokenizer)):
        roles += ["header"] * (tokens.before(start) - len(roles))
        roles += [role] * (tokens.before(end) - len(roles))
    return roles + ["header"] * (len(tokens.ids) - len(roles))


def _spans(
    text: str, messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> list[tuple[int, int, str]]:
    """(start, end, role) of the parts of `text` that are no template text, not overlapping."""
    spans = list(_found(text, messages, tools, fmt, tokenizer))
    if spans[-1:] != [END]:
        # A template that takes a content of white space for none writes another frame around it.
        blank = [m if m["role"] == "assistant" or m["content"].strip() else {**m, "content": ""} for m in messages]
        others = list(_found(text, blank, tools, fmt, tokenizer)) if blank != messages else []
        spans = others if others[-1:] == [END] else spans
    return [span for span in spans if span != END]


def _found(
    text: str, messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> Iterator[tuple[int, int, str]]:
    """The spans of `_spans` as far as the template's text is found again, and END when all messages are."""
    skeleton = _skeleton(messages, tools, fmt, tokenizer)
    if skeleton is None or not text.startswith(skeleton[1][0].text):
        return
    order, pieces = skeleton
    if pieces[0].tools:
        yield (*pieces[0].tools, "system")
    at = len(pieces[0].text)
    for index, (behind, schemas) in zip(order, pieces[1:], strict=True):
        message = messages[index]
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
        if found < 0 and index == order[-1]:
            break  # a trained text ends with its last answer, the template's own goes on
        if found < 0:
            return
        if schemas:
            yield found + schemas[0], found + schemas[1], "system"
        at = found + len(behind)
    yield END


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


def _skeleton(
    messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> tuple[list[int], list[Piece]] | None:
    """(messages in the order of the text, template text in front of, between and behind their contents)."""
    # Ids and names of results may stand in the template's own text; most templates do not read them.
    read = [name for name in ("tool_call_id", "name") if name in fmt.template]
    shape = tuple(
        (
            message["role"],
            bool(message["content"]),
            _says_nothing(message),
            _is_number(message),
            *(message.get(name) for name in read),
        )
        for message in messages
    )
    schemas = tools.text if isinstance(tools, KnownTools) else json.dumps(tools)
    key = (fmt.template, str(fmt.template_kwargs), shape, schemas, type(tokenizer))
    if key not in _SKELETONS:
        if len(_SKELETONS) > 5_000:
            _SKELETONS.clear()
        _SKELETONS[key] = _make_skeleton(messages, tools, fmt, tokenizer)
    return _SKELETONS[key]


def _make_skeleton(
    messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any
) -> tuple[list[int], list[Piece]] | None:
    marks = {
        index: str(7_310_000 + index) if _is_number(message) else f"wq{index}zk"
        for index, message in enumerate(messages)
        if message["content"]
        or (message["role"] == "assistant" and not _is_left_out(messages[: index + 1], tools, fmt, tokenizer))
    }
    text = _marked(messages, marks, tools, fmt, tokenizer, with_calls=False)
    opening = ""
    if text is None:
        # Some templates want calls where there are results; then the mark is the name of a call.
        text = _marked(messages, marks, tools, fmt, tokenizer, with_calls=True)
        opening = _opening(fmt, tokenizer)
    if text is None:
        return None
    order = sorted(marks, key=lambda index: text.find(marks[index]))
    glue = []
    for index in order:
        before, found, text = text.partition(marks[index])
        if not found:
            return None
        if messages[index]["role"] == "assistant":
            # Reasoning and a space in front belong to the answer, whether a prompt contains them or not.
            before = next((before.removesuffix(block) for block in _BLOCKS if before.endswith(block)), before)
            if opening and opening in before:
                before = before[: before.rindex(opening) + len(opening)]
            before = before.rstrip(" ")
        glue.append(before)
    return order, [Piece(part, _find_tools(part, tools)) for part in (*glue, text)]


def _marked(
    messages: list[dict], marks: dict[int, str], tools: list[dict], fmt: Format, tokenizer: Any, with_calls: bool
) -> str | None:
    kept = ("role", "tool_call_id", "name")
    plain = []
    for index, message in enumerate(messages):
        copy = {**{key: message[key] for key in kept if key in message}, "content": marks.get(index, "")}
        if with_calls and message.get("tool_calls"):
            call = {**message["tool_calls"][0], "function": {"name": copy["content"], "arguments": {}}}
            copy.update(content="", tool_calls=[call])
        plain.append(copy)
    try:
        return render_messages(plain, tools, fmt, tokenizer)
    except Exception:  # templates raise anything
        return None


def _opening(fmt: Format, tokenizer: Any) -> str:
    """What the template writes to open an answer."""
    user = [{"role": "user", "content": "wq0zk"}]
    try:
        without = render_messages(user, [], fmt, tokenizer)
        opened = render_messages(user, [], fmt, tokenizer, add_generation_prompt=True)
    except Exception:  # templates raise anything
        return ""
    return opened[len(without) :] if opened.startswith(without) else ""


def _says_nothing(message: dict) -> bool:
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning_content"))


def _is_left_out(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> bool:
    """Whether the template writes nothing at all for the last message, an answer that says nothing."""
    if not _says_nothing(messages[-1]):
        return False
    try:
        return render_messages(messages, tools, fmt, tokenizer) == render_messages(messages[:-1], tools, fmt, tokenizer)
    except Exception:  # templates raise anything
        return False


def _is_number(message: dict) -> bool:
    return message["role"] == "tool" and message["content"].replace(".", "", 1).isdigit()
