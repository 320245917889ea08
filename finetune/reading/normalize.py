"""One row of any usual shape -> the canonical conversation that everything behind this file works with.

{"messages": [{"role": "system"|"user"|"assistant"|"tool", "content": str, ...}], "tools": [{"type": "function", ...}]}
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from finetune.reading.calls_in_text import call_tag, given_arguments, split_calls
from finetune.reading.row_files import Unreadable, json_type, strict_json
from finetune.reading.shapes import detect_shape
from finetune.reading.text_shapes import RowError, as_text, hermes_system, tool_responses
from finetune.reading.tool_schemas import normalize_tools
from formats.calls import MAX_JSON_DEPTH, json_depth

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "environment": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Whether a message is trained, as OpenAI and Mistral (weight), ms-swift (loss) and Axolotl (training) call it.
_TRAIN = ("train", "weight", "loss", "training")
_TEXT = frozenset(("role", "from", "content", "value", *_TRAIN))
# Where other programs keep what is the content here: Gemini's parts, a tool's result, a refusal.
_TEXT_ELSEWHERE = ("text", "parts", "message", "body", "output", "result", "response", "refusal")
_CALL = frozenset(("name", "arguments", "parameters", "id", "type", "index", "function"))  # keys of a call
_NOTHING = (None, "", [], {})
_READ = {  # keys of a message that are read, by role
    "system": _TEXT | {"tools"},
    "user": _TEXT,
    "tool": _TEXT | {"name", "tool_call_id"},
    "assistant": _TEXT | {"tool_calls", "function_call", *_REASONING},
}


def normalize_row(
    raw: dict[str, Any] | Unreadable,
    *,
    column_map: dict[str, str] | None = None,
    tools: list[dict[str, Any]] | None = None,
    notes: Counter | None = None,
) -> dict[str, Any]:
    """Bring one raw row to the canonical shape; raises RowError(reason) when it cannot be done exactly.

    raw         what `read_rows` yields
    column_map  {"question": "prompt"}: read the row's column `question` as the field `prompt` (see shapes.FIELDS)
    tools       canonical tools for rows that declare none
    notes       counts what had to be changed, by description ("content null -> empty")
    """
    if isinstance(raw, Unreadable):
        raise RowError(raw.reason)
    if not isinstance(raw, dict):
        raise RowError(f"is a JSON {json_type(raw)}, not an object")
    too_deep = f"is nested deeper than {MAX_JSON_DEPTH} levels"
    try:
        conversation = _conversation(raw, column_map, tools, Counter() if notes is None else notes)
        if json_depth(conversation) > MAX_JSON_DEPTH:
            raise RowError(too_deep)
        conversation_text(conversation)
    except RecursionError as error:
        raise RowError(too_deep) from error
    return conversation


def _conversation(
    raw: dict[str, Any], column_map: dict[str, str] | None, tools: list[dict[str, Any]] | None, notes: Counter
) -> dict[str, Any]:
    shape = detect_shape(raw, column_map)
    messages, raw_tools, system = shape.convert(shape.fields)
    try:
        declared = normalize_tools(raw_tools, notes)
    except ValueError as error:
        raise RowError(str(error)) from error
    messages = _messages_list(messages)
    if system and not (messages and isinstance(messages[0], dict) and _role(messages[0], 1) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    elif system and system != _first_of(messages[0], "content", "value"):
        notes["system column not read: the messages begin with a system message of their own"] += 1
    if not declared:
        messages, declared = _tools_in_messages(messages, notes)
    declared = declared or list(tools or [])
    result = [
        new for number, message in enumerate(messages, start=1) for new in _message(message, number, declared, notes)
    ]
    if not result:
        raise RowError("messages is empty")
    return {"messages": result, "tools": declared}


def conversation_text(conversation: dict[str, Any]) -> bytes:
    """The conversation as one line of JSON in UTF-8, its identity for fingerprints. Raises RowError if it has none."""
    try:
        return json.dumps(conversation, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("holds half of a surrogate pair (\\ud800…\\udfff), which is no character") from error
    except (TypeError, ValueError) as error:
        raise RowError(f"holds a value that JSON has no word for ({error})") from error


def conversations_fingerprint(conversations: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the conversations, order included."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(conversation_text(conversation) + b"\n")
    return digest.hexdigest()


def _messages_list(messages: Any) -> list[Any]:
    if isinstance(messages, str):
        try:
            messages = strict_json(messages)
        except ValueError as error:
            raise RowError(f"messages are text that is no JSON ({error})") from error
    if not isinstance(messages, list):
        raise RowError(f"messages are a JSON {json_type(messages)}, not a list")
    return messages


def _first_of(message: dict[str, Any], name: str, other: str) -> Any:
    """One thing under two names: where rows of several spellings were put together, one of them is null."""
    return message.get(other) if message.get(name) is None else message[name]


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is a JSON {json_type(message)}, not an object")
    role = _first_of(message, "role", "from")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        known = ", ".join(ROLES)
        raise RowError(f"message {number} has the role {role!r}; known are {known}")
    return ROLES[role.strip().lower()]


def _tools_in_messages(messages: list[Any], notes: Counter) -> tuple[list[Any], list[dict[str, Any]]]:
    """Tools that the row declares inside its system message: a `tools` key there (Phi), or Hermes' own wording."""
    for index, message in enumerate(messages):
        if _role(message, index + 1) != "system":
            continue
        try:
            if message.get("tools"):
                notes["tools taken from the system message"] += 1
                return messages, normalize_tools(message["tools"], notes)
            text = _first_of(message, "content", "value")
            found = hermes_system(text) if isinstance(text, str) else None
            if found:
                notes["Hermes system prompt: tools taken out, its wording left to the format"] += 1
                rest = [{"role": "system", "content": found[0]}] if found[0] else []
                return messages[:index] + rest + messages[index + 1 :], normalize_tools(found[1], notes)
        except ValueError as error:
            raise RowError(f"message {index + 1}: {error}") from error
    return messages, []


def _content(message: dict[str, Any], number: int, role: str, notes: Counter) -> str:
    content = _first_of(message, "content", "value")
    if message.get("value") not in (*_NOTHING, content):
        if content not in _NOTHING:
            raise RowError(f"message {number} has a content and another value; keep one of them")
        content = message["value"]
    if content is None or (content == [] and role != "tool"):  # a tool may well return an empty list
        notes["content null or absent -> empty"] += 1
        return ""
    if isinstance(content, list) and content and all(isinstance(p, dict) and "type" in p for p in content):
        texts = [part.get("text") for part in content]
        if any(part["type"] != "text" or not isinstance(text, str) for part, text in zip(content, texts, strict=True)):
            raise RowError(f"message {number} has content parts that are no text; only text can be trained")
        notes["content parts joined"] += 1
        return "".join(texts)
    if not isinstance(content, str):
        notes["content that is no text written as JSON"] += 1
    return as_text(content)


def _message(message: Any, number: int, tools: list[dict[str, Any]], notes: Counter) -> list[dict[str, Any]]:
    """One raw message as canonical ones: usually one, several where it holds several tool responses."""
    role = _role(message, number)
    content = _content(message, number, role, notes)
    read = _READ.get(role, _READ["assistant"])
    for key, value in message.items():
        if key not in read and value not in _NOTHING:
            if key in ("tool_calls", "function_call"):
                raise RowError(f"message {number} ({role}) has {key}; only the assistant calls tools")
            if key in _TEXT_ELSEWHERE and not _says_anything(message):
                raise RowError(f"message {number} ({role}) has no content, but {key}; call it content")
            notes[f"not read, key {key[:40]!r} of {role} messages"] += 1
    if role == "tool":
        return _results(message, content, notes)
    if role in ("system", "user"):
        return [{"role": role, "content": content}]
    calls: list[dict[str, Any]] = []
    if role == "call":
        role, calls, content = "assistant", _calls_text(content, number, tools, notes), ""
    calls += _tool_calls(message, number, notes)
    if not calls and call_tag(content):
        found = split_calls(content, tools)
        names = {tool["function"]["name"] for tool in tools}
        # A tag in running text is a call only if it calls a declared tool; a message that is nothing else always is.
        if found and (not found[0] or all(call["name"] in names for call in found[1])):
            content, calls = found[0], [{"type": "function", "function": call} for call in found[1]]
            notes["calls written in the text -> tool_calls"] += 1
        else:
            notes["call tag in the text left as text (it does not parse cleanly)"] += 1
    if content != content.strip():
        notes["assistant text stripped"] += 1
    result: dict[str, Any] = {"role": role, "content": content.strip()}
    for name in _REASONING:
        value = message.get(name)
        if value and not isinstance(value, str):
            raise RowError(f"message {number}: {name} is a JSON {json_type(value)}, not text")
        if value and value.strip() and result.setdefault("reasoning_content", value.strip()) != value.strip():
            notes[f"{name} not read: another reasoning stands beside it"] += 1
    if calls:
        result["tool_calls"] = calls
    key = next((name for name in _TRAIN if message.get(name) is not None), "train")
    trained = message.get(key)
    if trained is not None and not (isinstance(trained, (bool, int, float)) and trained in (0, 1)):
        raise RowError(f"message {number}: {key} is {trained!r}; write true or false")
    if trained is not None and not trained:
        result["train"] = False
    return [result]


def _says_anything(message: dict[str, Any]) -> bool:
    return any(message.get(key) is not None for key in ("content", "value")) or any(
        message.get(key) not in _NOTHING for key in ("tool_calls", "function_call")
    )


def _results(message: dict[str, Any], content: str, notes: Counter) -> list[dict[str, Any]]:
    result: dict[str, Any] = {"role": "tool", "content": content}
    if isinstance(message.get("name"), str) and message["name"]:
        result["name"] = message["name"]
    if message.get("tool_call_id") is not None:
        result["tool_call_id"] = str(message["tool_call_id"])
    responses = tool_responses(content)
    if responses is None:
        return [result]
    notes["<tool_response> tags taken off"] += 1
    return [result | {"content": text} for text in responses]


def _calls_text(content: str, number: int, tools: list[dict[str, Any]], notes: Counter) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn: JSON of one call or of a list of them, or tagged calls."""
    found = split_calls(content, tools)
    if found and not found[0]:
        return [{"type": "function", "function": call} for call in found[1]]
    try:
        value = strict_json(content)
    except ValueError as error:
        raise RowError(f"message {number}: the function call is no JSON ({error})") from error
    return [_call(item, number, notes) for item in (value if isinstance(value, list) else [value])]


def _read_if_text(value: Any, number: int, what: str) -> Any:
    """A column's value, read as JSON where it is text; None for white space."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value) if value.strip() else None
    except ValueError as error:
        raise RowError(f"message {number}: {what} no JSON ({error})") from error


def _tool_calls(message: dict[str, Any], number: int, notes: Counter) -> list[dict[str, Any]]:
    calls = _read_if_text(message.get("tool_calls"), number, "tool_calls are")
    old = _read_if_text(message.get("function_call"), number, "function_call is")
    if old not in _NOTHING:
        notes["function_call not read: tool_calls stand beside it" if calls else "function_call -> tool_calls"] += 1
        calls = calls or [old]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls are a JSON {json_type(calls)}, not a list")
    return [_call(call, number, notes) for call in calls]


def _call(item: Any, number: int, notes: Counter) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(f"message {number}: a tool call is a JSON {json_type(item)}, not an object")
    function = item["function"] if isinstance(item.get("function"), dict) else item
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"message {number}: a tool call has no name")
    if item.get("name") not in (None, name):
        raise RowError(f"message {number}: a tool call has two names, {name} and {item['name']}; keep one of them")
    try:
        arguments = given_arguments(item) if function is item else given_arguments(function, item)
    except ValueError as error:
        raise RowError(f"message {number}: call of {name}: {error}") from error
    unread = [key for key, value in {**item, **function}.items() if key not in _CALL and value not in _NOTHING]
    if unread and arguments is None:  # LangChain's "args", Anthropic's "input": an empty object would be a guess
        raise RowError(f"message {number}: call of {name} has no arguments, but {', '.join(unread)}")
    notes.update(f"not read, key {key[:40]!r} of calls" for key in unread)
    call: dict[str, Any] = {"type": "function"}
    if item.get("id") is not None:
        call["id"] = str(item["id"])
    return call | {"function": {"name": name, "arguments": arguments or {}}}
