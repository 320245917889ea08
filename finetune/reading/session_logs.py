"""Session logs of Claude Code: one event a line, linked by `parentUuid`, read as conversations."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator
from typing import Any

from finetune.reading.row_files import Unreadable

NumberedRow = tuple[int, dict[str, Any] | Unreadable]
_EVENT_KEYS = ("sessionId", "parentUuid", "uuid", "leafUuid", "messageId")
_BARE_EVENTS = ("summary", "file-history-snapshot", "queue-operation")


def read_sessions(rows: Iterable[NumberedRow]) -> Iterator[NumberedRow]:
    """Rows as they are; the events of a session log, which its first row tells, as one row for each conversation.

    A conversation (a session, a subagent's, what follows a compaction) is the branch that ends with its last event,
    numbered by its first. Rows that are not events stay rows.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    if not _is_event(first[1]):
        yield from rows
        return
    events: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, row in rows:
        if not _is_event(row):
            yield number, row
        elif isinstance(row.get("uuid"), str):
            events[row["uuid"]] = number, row
    groups: dict[str, list[str]] = {}
    roots: dict[str, str] = {}
    for name in events:
        branch = _branch(name, events, roots)
        root = roots.get(_text(events[branch[-1]][1], "parentUuid"), branch[-1])
        roots.update(dict.fromkeys(branch, root))
        groups.setdefault(root, []).append(name)
    for names in groups.values():
        found = [events[name] for name in _shown(names, events)]
        if found:
            yield found[0][0], {"messages": _messages([event for _, event in found])}


def _shown(names: list[str], events: dict[str, tuple[int, dict[str, Any]]]) -> list[str]:
    """The messages of the last event's branch, with the calls and results of parallel calls, which are beside it."""
    chosen = set(_branch(names[-1], events))
    answers = {_text(_message_of(events[name][1]), "id") for name in chosen} - {""}
    for name in names:
        event = events[name][1]
        is_beside = _text(event, "parentUuid") in chosen and _holds_result(event)
        if is_beside or _text(_message_of(event), "id") in answers:
            chosen.add(name)
    return [name for name in names if name in chosen and events[name][1]["type"] in ("user", "assistant")]


def _text(holder: dict[str, Any], key: str) -> str:
    value = holder.get(key)
    return value if isinstance(value, str) else ""


def _message_of(event: dict[str, Any]) -> dict[str, Any]:
    return event["message"] if isinstance(event.get("message"), dict) else {}


def _is_event(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("type"), str) or "messages" in row:
        return False
    return row["type"] in _BARE_EVENTS or sum(key in row for key in _EVENT_KEYS) >= 2


def _branch(name: str, events: dict[str, tuple[int, dict[str, Any]]], known: Container[str] = ()) -> list[str]:
    """The names of an event and of all before it up to a known one, the last one first."""
    branch: dict[str, None] = {}
    current = name
    while current in events and current not in branch and (current not in known or not branch):
        branch[current] = None
        current = _text(events[current][1], "parentUuid")
    return list(branch)


def _holds_result(event: dict[str, Any]) -> bool:
    content = _message_of(event).get("content")
    return isinstance(content, list) and any(isinstance(p, dict) and p.get("type") == "tool_result" for p in content)


def _messages(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; the parts of one answer, which are events of their own, are one message in front of its results."""
    messages: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    for event in events:
        message = _message_of(event)
        content, identity = message.get("content"), _text(message, "id")
        if identity in answers and isinstance(content, list):
            answers[identity]["content"] += content
            continue
        made = {"role": message.get("role", event["type"]), "content": content}
        messages.append(made)
        if identity and isinstance(content, list):
            made["content"] = list(content)
            answers[identity] = made
    return messages
