"""Rows that log a request and its response: columns that are objects, such as `request` and LangSmith's `inputs`."""

from __future__ import annotations

from typing import Any

from finetune.reading.columns import LOG_REQUESTS, LOG_RESPONSES, column_key, decoded, match_columns

_ENVELOPES = ("body", "json", "kwargs", "data")  # what holds the request of an HTTP log
_CHOICES = ("choices", "candidates", "generations")
_ASKING = {"messages", "prompt"}


def flattened(raw: dict[str, Any]) -> dict[str, Any]:
    """The row with the parts of a logged request, and of its response, as columns (`request.messages`)."""
    found = next(
        (
            (column, inner)
            for column, value in raw.items()
            if column_key(column) in LOG_REQUESTS and (inner := _inside(value)) and _asks(inner)
        ),
        None,
    )
    if found is None or _asks({name: value for name, value in raw.items() if name != found[0]}):
        return raw
    column, request = found
    row = {f"{column}.{key}": _flat_list(value) for key, value in request.items()}
    for name, value in raw.items():
        inner = _inside(value) if column_key(name) in LOG_RESPONSES else {}
        if inner and response_answer(inner) is inner and match_columns(inner).keys():
            row |= {f"{name}.{key}": part for key, part in inner.items()}
        elif name != column:
            row[name] = inner or value
    return row


def _inside(value: Any) -> dict[str, Any]:
    """The object of a cell, out of the envelope of an HTTP log; {} if it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = decoded(value)
    while isinstance(value, dict) and not _asks(value):
        inner = next((decoded(value[key]) for key in _ENVELOPES if key in value), None)
        if not isinstance(inner, dict):
            break
        value = inner
    return value if isinstance(value, dict) else {}


def _asks(request: dict[str, Any]) -> bool:
    return not _ASKING.isdisjoint(match_columns(request).values())


def _flat_list(value: Any) -> Any:
    """LangChain's list of one list of messages as that list."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


def response_answer(value: Any) -> Any:
    """The answer that an API's response holds: a message, text or a list of items; other values unchanged.

    Known are OpenAI's `choices` and `output`, Gemini's `candidates`, Converse's `output.message`, LangChain's
    `generations` and `messages`. Of several choices the first is read.
    """
    if isinstance(value, dict) and (key := next((key for key in _CHOICES if value.get(key)), None)):
        value = value[key]
        value = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" not in value[0]:
        choice = value[0]
        if inner := next((choice[key] for key in ("message", "content") if isinstance(choice.get(key), dict)), None):
            return inner
        return choice["text"] if isinstance(choice.get("text"), str) and "type" not in choice else value
    if isinstance(value, dict) and not value.keys() & {"role", "from", "content", "kwargs"}:
        given = (value.get(key) for key in ("message", "output", "messages"))
        inner = next((inner for inner in given if isinstance(inner, (dict, list)) and inner), None)
        return value if inner is None else response_answer(inner)
    return value
