"""Contents that are lists of parts: texts, reasoning, calls and tool results of every provider and trainer.

    [{"type": "text", "text": "…"}], [{"text": "…"}], [{"type": "text", "value": "…"}], ["…", "…"]
    [{"type": "tool_use", "id": "a", "name": "f", "input": {}}], [{"toolUse": {…}}], [{"functionCall": {…}}]
    [{"type": "tool_result", "tool_use_id": "a", "content": "…"}], [{"toolResult": {…}}], [{"functionResponse": {…}}]

Any other part (an image, a file) rejects the row with its type. Only tool results may be data, written as JSON.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from finetune.reading.raw_calls import CALL_TYPES, plain_calls, squeezed
from finetune.reading.row_files import EMPTY, RowError, as_text, json_type
from finetune.reading.training_marks import TRAINING_MARKS, Mark, refuse_unknown_marks, training_mark

_TEXT_KEYS = ("text", "value", "content")
_REASONING_KEYS = ("thinking", "reasoning", "reasoning_content", "text", "value", "content", "summary", "reasoningText")
_TEXT_TYPES = ("text", "inputtext", "outputtext", "summarytext")
_REASONING_TYPES = ("thinking", "reasoning", "reasoningcontent", "reasoningtext", "thought", "think")
_RESULT_TYPES = ("toolresult", "toolresponse", "functionresponse", "functionresult", "functioncalloutput")
_OMITTED_TYPES = ("redactedthinking", "redactedreasoning", "cachepoint", "stepstart")
_KINDS = {
    **dict.fromkeys(_TEXT_TYPES, "text"),
    **dict.fromkeys(_REASONING_TYPES, "reasoning"),
    **dict.fromkeys(CALL_TYPES, "call"),
    **dict.fromkeys(_RESULT_TYPES, "result"),
    **dict.fromkeys(_OMITTED_TYPES, "omitted"),
}
# Keys that an API adds to a part; they are neither text nor data.
_API_KEYS = frozenset(
    str.split(
        "cache_control cacheControl annotations citations logprobs signature _meta thoughtSignature thought_signature "
        "providerOptions providerMetadata provider_options provider_metadata"
    )
)
_NOT_DATA = _API_KEYS | TRAINING_MARKS.keys() - {"weight"}  # a weight may be data of a tool
_RESULT_CONTENT_KEYS = ("content", "output", "result", "response", "text", "value")
_RESULT_ID_KEYS = ("tool_use_id", "toolUseId", "tool_call_id", "toolCallId", "call_id", "id")
_RESULT_NAME_KEYS = ("name", "tool_name", "toolName")
_MEDIA = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "input_video")
_MEDIA_TYPES = frozenset((*_MEDIA, "file", "input_file", "document", "media"))
_MEDIA_PAYLOADS = frozenset(
    (*_MEDIA, "source", "url", "data", "inlineData", "inline_data", "fileData", "file_data", "file_id", "file")
)
_MEDIA_KEYS = _MEDIA_PAYLOADS | {"type", "mimeType", "mime_type", "media_type", "filename", "detail", "format", "title"}


@dataclass
class Parts:
    """What the parts of one content hold, in order; `results` are raw tool messages."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    marks: list[Mark | None] = field(default_factory=list)
    unread: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def read_parts(content: list[Any] | dict[str, Any], notes: Counter) -> Parts:
    """The parts of a content. Raises RowError for a part that is none of text, reasoning, call and tool result."""
    parts = Parts()
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise RowError(f"a content part is a JSON {json_type(part)}, not text; only text can be trained")
        parts.marks.append(training_mark(part))
        refuse_unknown_marks(part)
        # Nulls fill up structs.
        part = {k: v for k, v in part.items() if v is not None and k not in TRAINING_MARKS}
        kind, payload = _kind_and_payload(part)
        if kind == "omitted":
            notes[f"content part of type {str(part.get('type') or next(iter(part)))[:40]!r} not read"] += 1
            continue
        _add(parts, kind, payload)
        if payload is not part:
            parts.unread |= {k: v for k, v in part.items() if v is not payload and k not in _API_KEYS and k != "type"}
    return parts


def has_provider_parts(messages: Any) -> bool:
    """Whether any message holds a content part that is a call, a result or reasoning."""
    return isinstance(messages, list) and any(
        isinstance(part, dict) and not _kinds(part).isdisjoint(("call", "result", "reasoning"))
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def holds_results(content: list[Any]) -> bool:
    """Whether all parts of a tool message are results of their own (AI SDK, Gemini); others are data."""
    return bool(content) and all(isinstance(part, dict) and "result" in _kinds(part) for part in content)


def _kinds(part: dict[str, Any]) -> set[str | None]:
    """What the type of a part, or without one its keys, may say that it is."""
    names = [part["type"]] if part.get("type") else part
    return {_KINDS.get(squeezed(name)) for name in names if isinstance(name, str)}


def _kind_and_payload(part: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """("text" | "reasoning" | "call" | "result" | "omitted", the object that holds it)."""
    named = part.get("type")
    kind = _KINDS.get(squeezed(named)) if isinstance(named, str) else None
    if kind == "reasoning" and part.get("redactedContent"):
        kind = "omitted"
    if kind is None and named in (None, ""):
        for key, value in part.items():
            wrapped = _KINDS.get(squeezed(key))
            if wrapped in ("call", "result", "omitted") and isinstance(value, dict):
                return wrapped, value
            if key == "reasoningContent" and isinstance(value, dict):
                return ("omitted" if "redactedContent" in value else "reasoning"), value
        if any(isinstance(part.get(key), str) for key in _TEXT_KEYS) and not _MEDIA_PAYLOADS & part.keys():
            return ("reasoning" if part.get("thought") is True else "text"), part  # Gemini marks thoughts
    if kind is None:
        what = f"of type {named[:40]}" if isinstance(named, str) and named else f"with the keys {_keys(part)}"
        raise RowError(f"a content part {what} is not text; only text can be trained")
    return kind, part


def _add(parts: Parts, kind: str, payload: dict[str, Any]) -> None:
    if kind == "text":
        text, key = _text_of(payload, _TEXT_KEYS, "text")
        if parts.calls and text.strip():
            raise RowError("has text behind a call in one content; put the text in front, or into a message of its own")
        parts.texts.append(text)
        parts.unread |= _unread(payload, {key, "type", "thought"})
    elif kind == "reasoning":
        text, key = _text_of(payload, _REASONING_KEYS, "reasoning")
        parts.reasoning += [text] if text.strip() else []
        parts.unread |= _unread(payload, {key, "type", "id", "thought", "status", "encrypted_content"})
    elif kind == "call":
        parts.calls += plain_calls({k: v for k, v in payload.items() if k not in _API_KEYS})
    else:
        parts.results.append(_result_message(payload))
        known = (*_RESULT_CONTENT_KEYS, *_RESULT_ID_KEYS, *_RESULT_NAME_KEYS, "type")
        parts.unread |= _unread(payload, set(known))


def _text_of(part: dict[str, Any], keys: tuple[str, ...], kind: str) -> tuple[str, str]:
    """(text, key) of a part: text, {"value": text}, or a list of texts and text parts under one of the keys."""
    found = [(key, part[key]) for key in keys if part.get(key) not in EMPTY]
    if len(found) > 1 and any(value != found[0][1] for _, value in found):
        raise RowError(f"a content part has {' and '.join(key for key, _ in found)}; keep one of them")
    if not found:
        if any(isinstance(part.get(key), (str, list)) for key in keys):
            return "", next(key for key in keys if key in part)
        raise RowError(f"a content part of type {part.get('type')!r} has no {kind} (its keys: {_keys(part)})")
    key, value = found[0]
    if isinstance(value, dict):
        value = value.get("value", value.get("text"))
    if isinstance(value, list):
        texts = [item.get("text") if isinstance(item, dict) else item for item in value]
        value = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(value, str):
        raise RowError(f"the {key} of a content part is a JSON {json_type(part[key])}, not text")
    return value, key


def _result_message(part: dict[str, Any]) -> dict[str, Any]:
    """A part with a tool's result as a raw tool message."""
    content = next((part[key] for key in _RESULT_CONTENT_KEYS if part.get(key) is not None), "")
    message: dict[str, Any] = {"role": "tool", "content": _unwrapped(content)}
    for name, keys in (("tool_call_id", _RESULT_ID_KEYS), ("name", _RESULT_NAME_KEYS)):
        message |= next(({name: part[key]} for key in keys if part.get(key) not in (None, "")), {})
    return message


def _unwrapped(output: Any) -> Any:
    """The value of the AI SDK's {"type": "text" | "json" | "content", "value": …}."""
    kinds = ("text", "json", "error-text", "error-json", "content")
    is_wrapped = isinstance(output, dict) and output.keys() == {"type", "value"} and output["type"] in kinds
    return output["value"] if is_wrapped else output


def result_text(content: Any) -> str:
    """The text of a tool's result: text parts joined, anything else as JSON of all of it. Raises RowError on media."""
    items = content if isinstance(content, list) else [content]
    for item in items:
        if isinstance(item, dict) and _is_media(item):
            kind = item.get("type") or next(iter(item))
            raise RowError(f"a content part of type {kind} is not text; only text can be trained")
    texts = [_result_part(item) for item in items if isinstance(item, dict)]
    if texts and len(texts) == len(items) and None not in texts:
        return "".join(texts)
    return as_text(content)


def _result_part(item: dict[str, Any]) -> str | None:
    """The text of a part of a result; None for data."""
    rest = {key: value for key, value in item.items() if value is not None and key not in _NOT_DATA}
    if rest.keys() == {"json"}:  # Bedrock
        return as_text(rest["json"])
    named = rest.pop("type", None)
    if named is not None and not (isinstance(named, str) and squeezed(named) in _TEXT_TYPES):
        return None
    keys = _TEXT_KEYS if named else ("text",)
    (value,) = rest.values() if len(rest) == 1 and rest.keys() <= set(keys) else (None,)
    return value if isinstance(value, str) else None


def _is_media(item: dict[str, Any]) -> bool:
    """An image, sound or file of an API; `{"type": "file", "name": "a.txt"}` is data."""
    keys = {key for key, value in item.items() if value is not None and key not in _API_KEYS}
    named = item.get("type")
    if keys == {"type"}:
        return named in _MEDIA
    if not keys <= _MEDIA_KEYS or not _MEDIA_PAYLOADS & keys:
        return False
    if named is None:  # Bedrock's {"image": {"format": …, "source": …}}, Gemini's {"inlineData": …}
        return all(isinstance(item[key], dict) for key in keys) and len(keys) == 1 and not keys & {"url", "data"}
    return named in _MEDIA_TYPES


def _unread(part: dict[str, Any], read: set[str]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k not in read and k not in _API_KEYS}


def _keys(part: dict[str, Any]) -> str:
    return ", ".join(map(str, part))[:80] or "none"
