"""Messages as libraries and APIs log them: LangChain, OpenAI Responses, Gemini, lists of question and answer."""

from __future__ import annotations

from typing import Any

from finetune.reading.row_files import EMPTY, RowError, is_list_of_two, json_type

Message = dict[str, Any]
_LANGCHAIN_ROLES = {
    **{"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"},
    **{"humanmessage": "user", "aimessage": "assistant", "systemmessage": "system", "toolmessage": "tool"},
    **{"humanmessagechunk": "user", "aimessagechunk": "assistant", "functionmessage": "tool"},
}
_LANGCHAIN_METADATA = ("type", "id", "lc", "example", "status", "response_metadata", "usage_metadata")
_ITEM_TYPES = frozenset(("function_call", "function_call_output", "reasoning", "message"))
_HOSTED = "a tool that runs on the provider's side"

# keys of one exchange: (question, answer), in order of preference
_PAIRS = [
    tuple(pair.split(":"))
    for pair in str.split(
        "human:assistant user:assistant input:output question:answer prompt:response human:gpt human:bot user:bot "
        "instruction:output query:response instruction:response query:answer prompt:completion q:a user:model"
    )
]


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
        made = {"role": _langchain_role(message), **{key: body[key] for key in body if key not in _LANGCHAIN_METADATA}}
        if body.get("invalid_tool_calls"):
            raise RowError(f"message {number} has invalid_tool_calls: calls that could not be parsed are not trained")
        extra = body.get("additional_kwargs") if isinstance(body.get("additional_kwargs"), dict) else {}
        if extra.get("reasoning_content"):
            made.setdefault("reasoning_content", extra["reasoning_content"])
            made["additional_kwargs"] = {key: extra[key] for key in extra if key != "reasoning_content"}
        result.append(made)
    return result


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
    """Items as messages; those of one assistant turn are joined later, as those of any other API."""
    result: list[Message] = []
    for number, item in enumerate(items, start=1):
        kind = item.get("type")
        if kind in (None, "message"):
            result.append({key: item[key] for key in item if key not in ("type", "id", "status", "phase")})
        elif kind == "function_call":
            call = {"id": item.get("call_id"), **{key: item.get(key) for key in ("name", "arguments")}}
            result.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            result.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
        elif kind == "reasoning":
            part = {"type": "reasoning", "content": item.get("content") or item.get("summary") or ""}
            result += [{"role": "assistant", "content": [part]}] if part["content"] else []
        else:
            raise RowError(f"item {number}: has the type {kind}; {_HOSTED} cannot be trained")
    return result


def is_gemini(messages: Any) -> bool:
    """Whether the texts are under `parts`."""
    return _dicts(messages) and all(isinstance(message.get("parts"), (list, dict)) for message in messages)


def from_gemini(messages: list[Message]) -> list[Message]:
    """`{"role": "model", "parts": [...]}`; a message without a role is the user's, or a tool's result."""
    return [
        {**{key: message[key] for key in message if key != "parts"}, "role": message.get("role") or "user"}
        | {"content": message["parts"]}
        for message in messages
    ]


def pair_keys(messages: Any) -> tuple[Any, Any] | None:
    """The keys (or for a list of two the indices) under which each item holds a question and its answer."""
    if is_list_of_two(messages[0] if isinstance(messages, list) and messages else None):
        return (0, 1) if all(map(is_list_of_two, messages)) else None
    if not _dicts(messages) or any("role" in item or "from" in item for item in messages):
        return None
    return next((pair for pair in _PAIRS if all(pair[1] in item for item in messages) and pair[0] in messages[0]), None)


def is_pairs(messages: Any) -> bool:
    """Whether each item holds a question and its answer."""
    return pair_keys(messages) is not None


def from_pairs(exchanges: list[Message]) -> list[Message]:
    """`{human, assistant}` of ms-swift, `{system, input, output}` of XTuner, `["question", "answer"]`."""
    question, answer = pair_keys(exchanges) or _PAIRS[0]
    result: list[Message] = []
    for number, exchange in enumerate(exchanges, start=1):
        exchange = dict(enumerate(exchange)) if isinstance(exchange, list) else exchange
        unread = exchange.keys() - {"system", question, answer, "output_with_loss"}
        if any(exchange[key] not in EMPTY for key in unread):
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


_ROLE_KEYS = frozenset(("system", "user", "human", "assistant", "gpt", "bot", "model"))


def is_keyed_by_role(messages: Any) -> bool:
    """Whether each item is one text under its role, as `{"user": "Hi"}`."""
    return _dicts(messages) and all(len(item) == 1 and item.keys() <= _ROLE_KEYS for item in messages)


def from_keyed_by_role(messages: list[Message]) -> list[Message]:
    return [{"role": role, "content": text} for message in messages for role, text in message.items()]


CONVERTERS = (
    (is_responses, from_responses),
    (is_gemini, from_gemini),
    (is_langchain, from_langchain),
    (is_pairs, from_pairs),
    (is_keyed_by_role, from_keyed_by_role),
)


def converted(messages: Any) -> Any:
    """Messages of any library or API as messages with role and content; others unchanged."""
    if isinstance(messages, dict) and messages.keys() & {"role", "from"}:  # a Sequence of the `datasets` library
        lists = list(messages.values())
        if all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
            messages = [dict(zip(messages, values, strict=True)) for values in zip(*lists, strict=True)]
    return next((convert(messages) for fits, convert in CONVERTERS if fits(messages)), messages)
