"""Contents that are lists of parts, as the providers' APIs have them: text, reasoning, calls and results in one list.

Read are the parts of Anthropic (`tool_use`), Bedrock Converse (`toolUse`), Gemini (`functionCall`) and LLaMA-Factory v1
(`tool_call`). A message becomes several where it holds results; the parts' order is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from finetune.reading.row_files import RowError, decode_json, json_type
from finetune.reading.text_shapes import as_text

Message = dict[str, Any]


class Part(NamedTuple):
    """kind: text, reasoning, call, result or nothing (a part without content for a text model)."""

    kind: str
    value: Any = None


_TEXT_TYPES = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_REASONING_TYPES = ("thinking", "reasoning")
_HIDDEN_TYPES = ("redacted_thinking", "cache_point", "cachePoint")
# Keys that tell a part by themselves, without `type` (Converse and Gemini), in the spelling of `_snake`.
_KEYS = ("tool_use", "tool_result", "function_call", "function_response", "reasoning_content", "text", "cache_point")
_SIGNS = frozenset(("tool_use", "tool_result", "function_call", "function_response", "reasoning_content"))
_SIGN_TYPES = frozenset(("tool_use", "tool_result", "tool_call", "redacted_thinking", *_REASONING_TYPES))


def has_provider_parts(messages: Any) -> bool:
    """Whether any message holds a part that is a call, a result or reasoning."""
    return isinstance(messages, list) and any(
        isinstance(part, dict) and (str(part.get("type")) in _SIGN_TYPES or any(_snake(key) in _SIGNS for key in part))
        for message in messages
        if isinstance(message, dict)
        for part in _parts_of(message)
    )


def from_provider_parts(messages: list[Any]) -> list[Any]:
    """Messages with parts as messages with `content`, `reasoning_content`, `tool_calls` and role `tool`."""
    result: list[Any] = []
    for number, message in enumerate(messages, start=1):
        parts = _parts_of(message) if isinstance(message, dict) else []
        if not parts:
            result.append(message)
            continue
        try:
            result += _split(message, [read_part(part) for part in parts])
        except RowError as error:
            raise RowError(f"message {number}: {error}") from error
    return result


def _parts_of(message: Message) -> list[Any]:
    for key in ("content", "parts", "value"):
        if isinstance(message.get(key), list):
            return message[key]
    return []


def _split(message: Message, parts: list[Part]) -> Iterator[Message]:
    """Results first become tool messages of their own; text before and after them stays where it is."""
    kept = {key: value for key, value in message.items() if key not in ("content", "parts", "value")}
    role = kept.get("role", kept.get("from"))
    is_answer = role in ("assistant", "model", "gpt")
    spoken: list[Part] = []
    results = [part for part in parts if part.kind == "result"]
    if any(part.kind in ("call", "reasoning") for part in parts) and not is_answer:
        raise RowError(f"a part of role {role} is a call or reasoning; only the assistant's may be")
    if results and is_answer:
        raise RowError("the assistant's parts hold the result of a tool; move it to a message of its own")
    for part in parts:
        if part.kind == "result":
            if spoken:
                yield _message(kept, spoken)
                spoken = []
            yield {"role": "tool", **part.value}
        elif part.kind != "nothing":
            spoken.append(part)
    if spoken or not results:
        yield _message(kept, spoken)


def _message(kept: Message, parts: list[Part]) -> Message:
    """One message; text behind a call cannot be kept in its place and is refused."""
    kinds = [part.kind for part in parts]
    if "call" in kinds and "text" in kinds[kinds.index("call") :]:
        raise RowError("a text part follows a call; write it in a message of its own")
    message = {**kept, "content": "".join(part.value for part in parts if part.kind == "text")}
    reasoning = "\n\n".join(part.value for part in parts if part.kind == "reasoning" and part.value)
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [part.value for part in parts if part.kind == "call"]
    if calls:
        message["tool_calls"] = [*(message.get("tool_calls") or []), *calls]
    return message


def read_part(part: Any) -> Part:
    """A part of any of the APIs. Raises RowError naming the type of a part that is not text."""
    if isinstance(part, str):
        return Part("text", part)
    if not isinstance(part, dict):
        raise RowError(f"a content part is a JSON {json_type(part)}, not an object")
    marks = [key for key in ("train", "weight", "loss", "masked") if part.get(key) is not None]
    if marks:
        raise RowError(f"a content part has {marks[0]}; one turn cannot be trained in part, mark the message instead")
    kind = part.get("type")
    if kind in _TEXT_TYPES:
        return Part("text", _text(part, kind))
    if kind in _HIDDEN_TYPES:
        return Part("nothing")
    if kind in _REASONING_TYPES:
        return Part("reasoning", _text(part, kind))
    if kind == "tool_result":
        return _result(part.get("content"), part.get("tool_use_id"), part.get("name"))
    if kind in ("tool_use", "tool_call"):
        return _typed_call(part)
    if kind is not None:
        raise RowError(f"a content part has the type {kind}; only text, reasoning, calls and results can be read")
    named = {_snake(key): value for key, value in part.items() if value is not None}
    key = next((key for key in _KEYS if key in named), None)
    if key is None:
        raise RowError(f"a content part holds {', '.join(part) or 'nothing'}; only text can be trained")
    return _PART_READERS[key](named)


def _typed_call(part: dict[str, Any]) -> Part:
    if part["type"] == "tool_call":  # LLaMA-Factory v1: the call is JSON under `value`
        call = decode_json(part.get("value"), "the tool_call part")
        if not isinstance(call, dict):
            raise RowError(f"the tool_call part is a JSON {json_type(call)}, not an object")
        return Part("call", call)
    return _call(part.get("name"), part.get("input"), part.get("id"))


def _text(part: dict[str, Any], kind: str) -> str:
    for key in ("text", "value", "content", "thinking", "reasoning"):
        if isinstance(part.get(key), str):
            return part[key]
    raise RowError(f"a content part of type {kind} holds no text")


def _call(name: Any, arguments: Any, identity: Any) -> Part:
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return Part("call", call | ({"id": identity} if identity else {}))


def _result(content: Any, identity: Any, name: Any = None) -> Part:
    result: Message = {"content": _result_text(content)}
    if identity:
        result["tool_call_id"] = identity
    if name:
        result["name"] = name
    return Part("result", result)


def _result_text(content: Any) -> str:
    """Text parts joined; one JSON value as JSON; other lists as JSON. Raises RowError for an image."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return as_text(content)
    texts = []
    for item in content:
        if not isinstance(item, dict):
            return as_text(content)
        kind = item.get("type")
        if kind in _TEXT_TYPES or (kind is None and isinstance(item.get("text"), str)):
            texts.append(_text(item, str(kind)))
        elif kind is None and "json" in item:
            texts.append(as_text(item["json"]))
        elif kind in ("image", "document", "image_url", "input_image", "file", "input_file") or any(
            key in item for key in ("image", "document", "video") if kind is None
        ):
            raise RowError(f"a result holds a part of type {kind or next(iter(item))}; only text can be trained")
        else:
            return as_text(content)
    return "\n".join(texts) if len(texts) > 1 and any("json" in item for item in content) else "".join(texts)


def _object(named: dict[str, Any], key: str) -> dict[str, Any]:
    value = named[key]
    if not isinstance(value, dict):
        raise RowError(f"{key} is a JSON {json_type(value)}, not an object")
    return {_snake(inner): value for inner, value in value.items()}


def _converse_call(named: dict[str, Any]) -> Part:
    use = _object(named, "tool_use")
    return _call(use.get("name"), use.get("input"), use.get("tool_use_id"))


def _converse_result(named: dict[str, Any]) -> Part:
    result = _object(named, "tool_result")
    return _result(result.get("content"), result.get("tool_use_id"))


def _gemini_call(named: dict[str, Any]) -> Part:
    call = _object(named, "function_call")
    return _call(call.get("name"), call.get("args", call.get("arguments")), call.get("id"))


def _gemini_result(named: dict[str, Any]) -> Part:
    response = _object(named, "function_response")
    return _result(response.get("response"), response.get("id"), response.get("name"))


def _converse_reasoning(named: dict[str, Any]) -> Part:
    inner = _object(named, "reasoning_content").get("reasoning_text")
    return Part("reasoning", inner["text"]) if isinstance(inner, dict) and "text" in inner else Part("nothing")


def _plain_text(named: dict[str, Any]) -> Part:
    if not isinstance(named["text"], str):
        raise RowError(f"a content part's text is a JSON {json_type(named['text'])}, not text")
    return Part("reasoning" if named.get("thought") is True else "text", named["text"])


_PART_READERS: dict[str, Callable[[dict[str, Any]], Part]] = {
    "tool_use": _converse_call,
    "tool_result": _converse_result,
    "function_call": _gemini_call,
    "function_response": _gemini_result,
    "reasoning_content": _converse_reasoning,
    "text": _plain_text,
    "cache_point": lambda named: Part("nothing"),
}


def _snake(key: str) -> str:
    """`toolUse` -> `tool_use`."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in str(key))
