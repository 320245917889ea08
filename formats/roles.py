"""Which message every token belongs to, for the audit table.

The conversation is rendered once more with a placeholder for every content. The text between the placeholders is the
template's own ("header"); found again in the real text, it shows where each message starts and ends. An assistant's
part extends to the end of its turn, calls included. The tools count as "system". Where a template's own text depends
on the calls or the reasoning beside a content, the placeholders do not find it again: then the trained answers are
where they were rendered, and the other contents are searched for between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from formats.base import Format, render_messages
from formats.rendering import CachedTools
from formats.tokens import Tokenized, tokens_of

MAX_CACHED_SKELETONS = 5_000
_END = (-1, -1, "")  # yielded when all messages have been found
_BLOCKS = ("<think>\n\n</think>\n\n", "<think>\n")  # belong to the answer, although a prompt may contain them
_Span = tuple[int, int, str]  # start, end, role


class Answer(NamedTuple):
    """A trained answer: the index of its message and where its text, with its end, starts and ends."""

    message: int
    start: int
    end: int


class Piece(NamedTuple):
    """A piece of the template's own text, and where the tools' schemas are in it."""

    text: str
    tools: tuple[int, int] | None


class Skeleton(NamedTuple):
    """Indices of messages in the order of the text, and the template text before, between and after their contents."""

    order: list[int]
    pieces: list[Piece]


def token_roles(
    text: str,
    tokens: Tokenized,
    messages: list[dict],
    tools: list[dict],
    fmt: Format,
    tokenizer: Any,
    answers: list[Answer],
) -> list[str]:
    """system, user, tool, assistant or header for each token of `text`; `answers` are those trained in it."""
    spans = list(_spans(text, messages, tools, fmt, tokenizer))
    if spans[-1:] != [_END]:
        # A template that ignores a content of white space renders a different header for it.
        blank = [m if m["role"] == "assistant" or m["content"].strip() else {**m, "content": ""} for m in messages]
        others = list(_spans(text, blank, tools, fmt, tokenizer)) if blank != messages else []
        spans = others if others[-1:] == [_END] else []
    if not all(_is_covered(answer, spans) for answer in answers):
        spans = _searched(text, messages, answers, fmt)
    roles: list[str] = []
    for start, end, role in sorted(span for span in spans if span != _END):
        roles += ["header"] * (tokens.before(start) - len(roles))
        roles += [role] * (tokens.before(end) - len(roles))
    return roles + ["header"] * (len(tokens.ids) - len(roles))


def _spans(text: str, messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> Iterator[_Span]:
    """Parts of `text` that are not template text, as far as that text is found again; _END when it is all found."""
    skeleton = _skeleton(messages, tools, fmt, tokenizer)
    if skeleton is None or not text.startswith(skeleton.pieces[0].text):
        return
    order, (first, *pieces) = skeleton
    if first.tools:
        yield (*first.tools, "system")
    at = len(first.text)
    for index, (header, schemas) in zip(order, pieces, strict=True):
        role, cut = messages[index]["role"], 0
        header = _with_call_names(header, messages)
        if role == "assistant":
            end, of_header = _end_of_turn(text, fmt, at), _end_of_turn(header, fmt)
            if (
                header.strip()
                and of_header is None
                and (ended := text.find(header, at)) >= 0
                and (end is None or ended < end)
            ):
                end = ended  # a past answer that the template ends with another token than the last one
            if end is None:
                return
            block = next((block for block in _BLOCKS if text.endswith(block, 0, at)), "")
            yield at - len(block), end, role
            at, cut = end, of_header or 0
        found = text.find(header[cut:], at)
        if role != "assistant":
            yield at, len(text) if found < 0 else found, role
        if found < 0:
            if index == order[-1]:
                break  # a trained text ends with its last answer, the template's own continues
            return
        if schemas:
            yield found + schemas[0] - cut, found + schemas[1] - cut, "system"
        at = found + len(header) - cut
    yield _END


def _is_covered(answer: Answer, spans: list[_Span]) -> bool:
    return any(role == "assistant" and start <= answer.start and answer.end <= end for start, end, role in spans)


def _searched(text: str, messages: list[dict], answers: list[Answer], fmt: Format) -> list[_Span]:
    """The answers, and between them the contents of the other messages, each behind the one before it."""
    spans, at = [], 0
    known = {answer.message: answer for answer in answers}
    limits = [next((a.start for a in answers if a.message >= index), len(text)) for index in range(len(messages))]
    for index, (message, limit) in enumerate(zip(messages, limits, strict=True)):
        role, content = message["role"], message["content"].strip()
        if index in known:
            spans.append((known[index].start, known[index].end, role))
            at = known[index].end
        elif content and (found := text.find(content, at, limit)) >= 0:
            end = found + len(content)
            if role == "assistant":
                end = min(_end_of_turn(text, fmt, end) or end, limit)
            spans.append((found, end, role))
            at = end
    return spans


def _with_call_names(header: str, messages: list[dict]) -> str:
    """A piece of template text with the calls' own names where the template repeats the name of an earlier call."""
    for word, number, call in re.findall(r"(wq(\d+)(?:x(\d+))?zk)", header):
        made = messages[int(number)].get("tool_calls", []) if int(number) < len(messages) else []
        if int(call or 0) < len(made):
            header = header.replace(word, made[int(call or 0)]["function"]["name"])
    return header


def _end_of_turn(text: str, fmt: Format, at: int = 0) -> int | None:
    """Where the first end-of-turn string at or after `at` ends."""
    return min((found + len(mark) for mark in fmt.end_of_turn if (found := text.find(mark, at)) >= 0), default=None)


def _find_tools(header: str, tools: list[dict]) -> tuple[int, int] | None:
    """(start, end) of the tools' schemas inside a piece of template text, however the template prints them."""
    if not tools or str(tools[0].get("function", tools[0]).get("name")) not in header:
        return None
    for print_tool in (_json, lambda tool: json.dumps(tool, ensure_ascii=False, indent=4), str):
        for pick in (lambda tool: tool, lambda tool: tool.get("function", tool)):
            first = header.find(print_tool(pick(tools[0])))
            if first >= 0:
                last_text = print_tool(pick(tools[-1]))
                last = header.rfind(last_text)
                return (first, last + len(last_text)) if last >= first else None
    return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _skeleton(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> Skeleton | None:
    # Ids and names of results may appear in the template's own text; most templates do not read them.
    read = [name for name in ("tool_call_id", "name") if name in fmt.template]
    shape = tuple(
        (
            message["role"],
            bool(message["content"]),
            _is_silent(message),
            _is_number(message),
            *(message.get(name) for name in read),
            *((call.get("id") if "tool_call_id" in read else None) for call in message.get("tool_calls", ())),
        )
        for message in messages
    )
    schemas = tools.text if isinstance(tools, CachedTools) else json.dumps(tools)
    key = (fmt.template, str(fmt.template_kwargs), shape, schemas)
    known = tokens_of(tokenizer).skeletons  # of this tokenizer: a template writes its special tokens
    if key not in known:
        if len(known) > MAX_CACHED_SKELETONS:
            known.clear()
        known[key] = _make_skeleton(messages, tools, fmt, tokenizer)
    return known[key]


def _make_skeleton(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> Skeleton | None:
    placeholders = {
        index: str(7_310_000 + index) if _is_number(message) else f"wq{index}zk"
        for index, message in enumerate(messages)
        if message["content"]
        or (message["role"] == "assistant" and not _is_omitted(messages[: index + 1], tools, fmt, tokenizer))
    }
    opening = _answer_opening(fmt, tokenizer)  # what a template writes behind it belongs to the answer
    text = _render(_placeholder_messages(messages, placeholders, with_calls=False), tools, fmt, tokenizer)
    places = _places(text or "")
    if not places.keys() >= set(placeholders.values()):
        # Some templates require calls where there are results; then the placeholder is the name of a call.
        text = _render(_placeholder_messages(messages, placeholders, with_calls=True), tools, fmt, tokenizer)
        places = _places(text or "")
    if text is None:
        return None
    positions = {index: places.get(placeholder, -1) for index, placeholder in placeholders.items()}
    order = sorted(positions, key=positions.__getitem__)
    headers, at = [], 0
    for index in order:
        if positions[index] < at:
            return None
        header, at = text[at : positions[index]], positions[index] + len(placeholders[index])
        if messages[index]["role"] == "assistant":
            # Reasoning and a space before it belong to the answer, whether a prompt contains them or not.
            header = next((header.removesuffix(block) for block in _BLOCKS if header.endswith(block)), header)
            if opening.strip() and opening in header:
                header = header[: header.rindex(opening) + len(opening)]
            header = header.rstrip(" ")
        headers.append(header)
    return Skeleton(order, [Piece(header, _find_tools(header, tools)) for header in (*headers, text[at:])])


def _places(text: str) -> dict[str, int]:
    """Where each placeholder begins for the first time."""
    return {match[0]: match.start() for match in reversed(list(re.finditer(r"wq\d+zk|73\d{5}", text)))}


def _placeholder_messages(messages: list[dict], placeholders: dict[int, str], with_calls: bool) -> list[dict]:
    made = []
    for index, message in enumerate(messages):
        content = placeholders.get(index, "")
        copy = {key: message[key] for key in ("role", "tool_call_id", "name") if key in message} | {"content": content}
        if with_calls and message.get("tool_calls"):
            names = [content, *(f"wq{index}x{number}zk" for number in range(1, len(message["tool_calls"])))]
            calls = [
                {**call, "function": {"name": name, "arguments": {}}}
                for call, name in zip(message["tool_calls"], names, strict=True)
            ]
            copy.update(content="", tool_calls=calls)
        made.append(copy)
    return made


def _render(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any, **kwargs: Any) -> str | None:
    try:
        return render_messages(messages, tools, fmt, tokenizer, **kwargs)
    except Exception:  # templates raise anything
        return None


def _answer_opening(fmt: Format, tokenizer: Any) -> str:
    """What the template writes to open an answer."""
    user = [{"role": "user", "content": "wq0zk"}]
    without = _render(user, [], fmt, tokenizer)
    opened = _render(user, [], fmt, tokenizer, add_generation_prompt=True)
    if without is None or opened is None or not opened.startswith(without):
        return ""
    return opened[len(without) :]


def _is_silent(message: dict) -> bool:
    return not any(message.get(key) for key in ("content", "tool_calls", "reasoning_content"))


def _is_omitted(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> bool:
    """Whether the template renders nothing at all for the last message, a silent answer."""
    if not _is_silent(messages[-1]):
        return False
    text = _render(messages, tools, fmt, tokenizer)
    return text is not None and text == _render(messages[:-1], tools, fmt, tokenizer)


def _is_number(message: dict) -> bool:
    return message["role"] == "tool" and message["content"].replace(".", "", 1).isdigit()
