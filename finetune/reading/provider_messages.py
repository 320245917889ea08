"""Messages as libraries and APIs log them: LangChain, OpenAI Responses, Gemini, lists of question and answer."""

from __future__ import annotations

from typing import Any

from finetune.reading.parts import Message, from_provider_parts
from finetune.reading.row_files import RowError, json_type
from finetune.reading.text_shapes import as_text

_LANGCHAIN_ROLES = {
    **{"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"},
    **{"humanmessage": "user", "aimessage": "assistant", "systemmessage": "system", "toolmessage": "tool"},
    **{"humanmessagechunk": "user", "aimessagechunk": "assistant", "functionmessage": "tool"},
}
_LANGCHAIN_KEYS = ("content", "name", "tool_call_id", "train", "weight", "reasoning_content")
_ITEM_TYPES = frozenset(("function_call", "function_call_output", "reasoning", "message"))
_HOSTED = "a tool that runs on the provider's side"

# keys of one exchange: (question, answer), in order of preference
_PAIRS = (
    *(
        ("human", "assistant"),
        ("user", "assistant"),
        ("input", "output"),
        ("question", "answer"),
        ("prompt", "response"),
    ),
    *(("human", "gpt"), ("human", "bot"), ("user", "bot"), ("instruction", "output"), ("query", "response")),
    *(("instruction", "response"), ("query", "answer"), ("prompt", "completion"), ("q", "a"), ("user", "model")),
)


def _dicts(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(isinstance(item, dict) for item in messages)


def is_langchain(messages: Any) -> bool:
    """Whether the messages name their role under `type` (human, ai), or are LangChain's serialized objects."""
    return _dicts(messages) and all("role" not in m and _langchain_role(m) is not None for m in messages)


def _langchain_role(message: Message) -> str | None:
    kind = message.get("type")
    if kind == "constructor" and isinstance(message.get("id"), list) and message["id"]:
        kind = message["id"][-1]
    return _LANGCHAIN_ROLES.get(kind.lower()) if isinstance(kind, str) else None


def from_langchain(messages: list[Message]) -> list[Message]:
    """`{"type": "ai", "content", "tool_calls": [{"name", "args", "id"}]}`, also under `data` or `kwargs`."""
    result = []
    for number, message in enumerate(messages, start=1):
        body = next((message[key] for key in ("data", "kwargs") if isinstance(message.get(key), dict)), message)
        made = {"role": _langchain_role(message), **{key: body[key] for key in _LANGCHAIN_KEYS if key in body}}
        if body.get("invalid_tool_calls"):
            raise RowError(f"message {number} has invalid_tool_calls: calls that could not be parsed are not trained")
        extra = body.get("additional_kwargs") if isinstance(body.get("additional_kwargs"), dict) else {}
        calls = body.get("tool_calls") or extra.get("tool_calls") or extra.get("function_call")
        if calls:
            calls = calls if isinstance(calls, list) else [calls]
            made["tool_calls"] = [_renamed(call) for call in calls]
            if isinstance(made.get("content"), list):  # Anthropic's parts repeat the calls
                calling = ("tool_use", "tool_call", "function_call")
                made["content"] = [
                    part for part in made["content"] if not (isinstance(part, dict) and part.get("type") in calling)
                ]
        if extra.get("reasoning_content"):
            made.setdefault("reasoning_content", extra["reasoning_content"])
        result.append(made)
    return from_provider_parts(result)


def _renamed(call: Any) -> Any:
    """A LangChain call with `args` under the name `arguments`."""
    if not isinstance(call, dict) or "args" not in call or "arguments" in call:
        return call
    return {"arguments" if key == "args" else key: value for key, value in call.items()}


def is_responses(messages: Any) -> bool:
    """Whether the list holds items of OpenAI's Responses API and not messages alone."""
    return _dicts(messages) and any(
        (str(item.get("type")) in _ITEM_TYPES or str(item.get("type")).endswith("_call"))
        and (item.get("type") != "message" or "role" in item)
        and "from" not in item
        and item.get("role") not in ("tool", "function_call", "tool_call")
        for item in messages
    )


def from_responses(items: list[Message]) -> list[Message]:
    """Items in order; reasoning, text and calls of the assistant without anything between them are one message."""
    result: list[Message] = []
    for number, item in enumerate(items, start=1):
        try:
            new = _item(item)
        except RowError as error:
            raise RowError(f"item {number}: {error}") from error
        last = result[-1] if result else {}
        if new is not None and new.get("role") == "assistant" == last.get("role") and _can_join(last, new):
            _join(last, new)
        elif new is not None:
            result.append(new)
    return result


def _item(item: Message) -> Message | None:
    kind = item.get("type")
    if kind in (None, "message"):
        return from_provider_parts([{key: item[key] for key in item if key not in ("type", "id", "status", "phase")}])[
            0
        ]
    if kind == "function_call":
        call = {"id": item.get("call_id"), "function": {key: item.get(key) for key in ("name", "arguments")}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]}
    if kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, list):
            output = from_provider_parts([{"role": "user", "content": output}])[0]["content"]
        return {"role": "tool", "content": as_text(output), "tool_call_id": item.get("call_id")}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
        ):
            raise RowError("the reasoning is not a list of texts")
        thought = "\n\n".join(part["text"] for part in parts)
        return {"role": "assistant", "content": "", "reasoning_content": thought} if thought else None
    raise RowError(f"has the type {kind}; {_HOSTED} cannot be trained")


def _can_join(last: Message, new: Message) -> bool:
    """Calls may follow anything; text only reasoning; reasoning only nothing."""
    if new.get("reasoning_content"):
        return set(last) <= {"role", "content", "reasoning_content"} and not last.get("content")
    return not (new.get("content") and (last.get("tool_calls") or last.get("content")))


def _join(last: Message, new: Message) -> None:
    last["content"] = (last.get("content") or "") or new.get("content") or ""
    thoughts = [text for text in (last.get("reasoning_content"), new.get("reasoning_content")) if text]
    if thoughts:
        last["reasoning_content"] = "\n\n".join(thoughts)
    calls = [*(last.get("tool_calls") or []), *(new.get("tool_calls") or [])]
    if calls:
        last["tool_calls"] = calls
    last.update({key: new[key] for key in new if key not in last})


def is_gemini(messages: Any) -> bool:
    """Whether the texts are under `parts`."""
    return _dicts(messages) and all(isinstance(message.get("parts"), list) for message in messages)


def from_gemini(messages: list[Message]) -> list[Message]:
    """`{"role": "model", "parts": [...]}`; a message without a role is the user's, or a tool's result."""
    return from_provider_parts([{**message, "role": message.get("role") or "user"} for message in messages])


def pair_keys(messages: Any) -> tuple[str, str] | None:
    """The keys under which each item of a list holds a question and its answer."""
    if not _dicts(messages) or any("role" in item or "from" in item for item in messages):
        return None
    return next((pair for pair in _PAIRS if all(pair[1] in item for item in messages) and pair[0] in messages[0]), None)


def is_pairs(messages: Any) -> bool:
    """Whether each item holds a question and its answer."""
    return pair_keys(messages) is not None


def from_pairs(exchanges: list[Message]) -> list[Message]:
    """`{human, assistant}` of ms-swift, `{system, input, output}` of XTuner and their kind."""
    question, answer = pair_keys(exchanges) or _PAIRS[0]
    result: list[Message] = []
    for number, exchange in enumerate(exchanges, start=1):
        unread = exchange.keys() - {"system", question, answer, "output_with_loss"}
        if any(exchange[key] not in (None, "", [], {}) for key in unread):
            raise RowError(
                f"exchange {number} also holds {', '.join(sorted(map(str, unread)))}; write messages instead"
            )
        for role, key in (("system", "system"), ("user", question), ("assistant", answer)):
            text = exchange.get(key)
            if text is not None and not isinstance(text, str):
                raise RowError(f"exchange {number}: {key} is a JSON {json_type(text)}, not text")
            if text or role == "assistant":
                result.append({"role": role, "content": text})
        if exchange.get("output_with_loss") is not None:
            result[-1]["train"] = exchange["output_with_loss"]
    return result
