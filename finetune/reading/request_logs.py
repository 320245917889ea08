"""Rows that log a request and its response: columns that are objects, such as `request` and LangSmith's `inputs`."""

from __future__ import annotations

from typing import Any

from finetune.reading.columns import LOG_REQUESTS, LOG_RESPONSES, column_key, decoded, match_columns
from finetune.reading.row_files import EMPTY

_ENVELOPES = ("body", "json", "kwargs", "data")  # what holds the request of an HTTP log
_CHOICES = ("choices", "candidates", "generations")
_ENVELOPED = ("message", "output", "messages")
_OF_A_CHOICE = frozenset(("index", "finish_reason", "logprobs", "generation_info"))
# Of an API's response: neither text nor calls.
_METADATA = _OF_A_CHOICE | set(
    str.split(
        "id object created created_at model usage system_fingerprint service_tier status type finishReason avgLogprobs "
        "safetyRatings responseId modelVersion usageMetadata createTime stopReason metrics llm_output run background "
        "billing completed_at frequency_penalty incomplete_details max_output_tokens metadata moderation "
        "parallel_tool_calls presence_penalty prompt_cache_retention store temperature tool_choice tool_usage "
        "top_logprobs top_p truncation"
    )
)
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
    if found is None:
        return raw
    column, request = found
    asked = match_columns({name: value for name, value in raw.items() if name != column}).values()
    if "messages" in asked or ("prompt" in asked and "messages" not in match_columns(request).values()):
        return raw
    row = {f"{column}.{key}": _flat_list(value) for key, value in request.items()}
    responses = {column_key(name): name for name in raw if column_key(name) in LOG_RESPONSES}
    response = next((responses[key] for key in LOG_RESPONSES if key in responses), None)
    for name, value in raw.items():
        inner = _inside(value) if name == response else {}
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
    while (opened := _opened(value)) is not None:
        value = opened[0]
    return value


def response_unread(value: Any) -> list[str]:
    """What is beside the answer in an API's response, apart from its metadata."""
    unread: list[str] = []
    while (opened := _opened(value)) is not None:
        value, beside = opened
        unread += [key for key, part in beside.items() if part not in EMPTY and key not in _METADATA]
    return unread


def _opened(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """(the content of a response's outermost envelope, what is beside it); None without an envelope."""
    if isinstance(value, dict):
        keys = _CHOICES if value.keys() & {"role", "from", "content", "kwargs"} else (*_CHOICES, *_ENVELOPED)
        key = next((key for key in keys if isinstance(value.get(key), (dict, list)) and value[key]), None)
        if key is None:
            return None
        inner, beside = value[key], {name: part for name, part in value.items() if name != key}
        return (inner[0] if isinstance(inner, list) and isinstance(inner[0], list) else inner), beside
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return None
    first, more = value[0], {"further choices": value[1:]}
    for key in ("message", "content"):
        if not first.keys() & {"role", "from"} and all(isinstance(item.get(key), dict) for item in value):
            return first[key], {name: part for name, part in first.items() if name not in (key, "text")} | more
    if all(isinstance(item.get("text"), str) and item.keys() & _OF_A_CHOICE for item in value):
        return first["text"], {name: part for name, part in first.items() if name != "text"} | more
    return None
