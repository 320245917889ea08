"""One row of any known shape -> the canonical conversation that all later steps work with.

{"messages": [{"role": "system"|"user"|"assistant"|"tool", "content": str, ...}], "tools": [{"type": "function", ...}]}
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.reading.calls_in_text import call_tag, given_arguments, split_calls
from finetune.reading.null_padding import remove_null_padding
from finetune.reading.row_files import RowError, Unreadable, decode_json, json_type
from finetune.reading.shapes import detect_shape
from finetune.reading.text_shapes import as_text, hermes_system, tool_responses
from finetune.reading.tool_schemas import normalize_tools
from formats.calls import MAX_JSON_DEPTH, json_depth

Message = dict[str, Any]
_ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot"),
    "tool": ("tool", "ipython", "function", "observation", "tool_response", "function_response", "environment"),
    "call": ("function_call", "tool_call"),
}
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Whether a message is trained, as OpenAI and Mistral (weight), ms-swift (loss) and Axolotl (training) call it.
_TRAIN_KEYS = ("train", "weight", "loss", "training")
_TEXT_KEYS = frozenset(("role", "from", "content", "value", *_TRAIN_KEYS))
# Where other programs keep the content: Gemini's parts, a tool's result, a refusal.
_OTHER_CONTENT_KEYS = ("text", "parts", "message", "body", "output", "result", "response", "refusal")
_CALL_KEYS = frozenset(("name", "arguments", "parameters", "id", "type", "index", "function"))
_EMPTY = (None, "", [], {})
_ASSISTANT_KEYS = _TEXT_KEYS | {"tool_calls", "function_call", *_REASONING_KEYS}
_READ_KEYS = {  # keys of a message that are read, by role
    "system": _TEXT_KEYS | {"tools"},
    "user": _TEXT_KEYS,
    "tool": _TEXT_KEYS | {"name", "tool_call_id"},
    "assistant": _ASSISTANT_KEYS,
    "call": _ASSISTANT_KEYS,
}


def normalize_row(
    raw: dict[str, Any] | Unreadable,
    *,
    column_map: dict[str, str] | None = None,
    tools: list[dict[str, Any]] | None = None,
    notes: Counter | None = None,
) -> dict[str, Any]:
    """Bring one raw row to the canonical shape; raises RowError(reason) when that would lose or change something.

    raw         what `read_rows` yields
    column_map  {"question": "prompt"}: read the row's column `question` as the field `prompt` (see shapes.FIELDS)
    tools       canonical tools for rows that declare none
    notes       counts what had to be changed, by description ("content null -> empty")
    """
    if isinstance(raw, Unreadable):
        raise RowError(raw.reason)
    if not isinstance(raw, dict):
        raise RowError(f"is a JSON {json_type(raw)}, not an object")
    try:
        conversation = _conversation(raw, column_map, tools or [], Counter() if notes is None else notes)
        if json_depth(conversation) > MAX_JSON_DEPTH:
            raise RecursionError
        conversation_text(conversation)
    except RecursionError as error:
        raise RowError(f"is nested deeper than {MAX_JSON_DEPTH} levels") from error
    return conversation


def conversation_text(conversation: dict[str, Any]) -> bytes:
    """The conversation as one line of JSON in UTF-8, for fingerprints. Raises RowError if UTF-8 cannot hold it."""
    try:
        return as_text(conversation).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("holds half of a surrogate pair (\\ud800…\\udfff), which is not a character") from error


def conversations_fingerprint(conversations: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the conversations, order included."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(conversation_text(conversation) + b"\n")
    return digest.hexdigest()


def _conversation(
    raw: dict[str, Any], column_map: dict[str, str] | None, tools: list[dict[str, Any]], notes: Counter
) -> dict[str, Any]:
    shape, fields, _ = detect_shape(raw, column_map)
    messages, raw_tools, system = shape.read(fields)
    declared = normalize_tools(raw_tools, notes)
    messages = decode_json(messages, "messages")
    if not isinstance(messages, list):
        raise RowError(f"messages: a JSON {json_type(messages)}, not a list")
    if system and not (messages and isinstance(messages[0], dict) and _role(messages[0], 1) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    elif system and system != _either(messages[0], "content", "value"):
        notes["system column not read: the messages begin with a system message of their own"] += 1
    if not declared:
        messages, declared = _tools_in_messages(messages, notes)
    declared = declared or list(tools)
    result = [
        new for number, message in enumerate(messages, start=1) for new in _message(message, number, declared, notes)
    ]
    if not result:
        raise RowError("messages is empty")
    conversation = {"messages": result, "tools": declared}
    remove_null_padding(conversation, raw, notes)
    return conversation


@contextlib.contextmanager
def _in_message(number: int, what: str = "") -> Iterator[None]:
    """Adds the message's number, and what of it is read, to a RowError."""
    try:
        yield
    except RowError as error:
        raise RowError(f"message {number}: {what}{error}") from error


def _either(message: Message, name: str, other: str) -> Any:
    """A value that has two names; in rows merged from several spellings one of them is null."""
    return message.get(other) if message.get(name) is None else message[name]


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is a JSON {json_type(message)}, not an object")
    role = _either(message, "role", "from")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise RowError(f"message {number} has the unknown role {role!r}; known roles: {', '.join(ROLES)}")
    return ROLES[role.strip().lower()]


def _tools_in_messages(messages: list[Any], notes: Counter) -> tuple[list[Any], list[dict[str, Any]]]:
    """(messages, tools) with the tools that a system message declares: in a key `tools` (Phi) or in Hermes' prompt."""
    for index, message in enumerate(messages):
        if _role(message, index + 1) != "system":
            continue
        with _in_message(index + 1):
            if message.get("tools"):
                notes["tools taken from the system message"] += 1
                return messages, normalize_tools(message["tools"], notes)
            text = _either(message, "content", "value")
            found = hermes_system(text) if isinstance(text, str) else None
            if found:
                notes["Hermes system prompt: tools taken out, its wording left to the format"] += 1
                rest = [{"role": "system", "content": found[0]}] if found[0] else []
                return messages[:index] + rest + messages[index + 1 :], normalize_tools(found[1], notes)
    return messages, []


def _content(message: Message, number: int, role: str, notes: Counter) -> str:
    content = _either(message, "content", "value")
    if message.get("value") not in (*_EMPTY, content):
        if content not in _EMPTY:
            raise RowError(f"message {number} has a content and another value; keep one of them")
        content = message["value"]
    if content is None or (content == [] and role != "tool"):  # a tool may return an empty list
        notes["content null or absent -> empty"] += 1
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        if any(part["type"] != "text" or not isinstance(part.get("text"), str) for part in content):
            raise RowError(f"message {number} has content parts that are not text; only text can be trained")
        notes["content parts joined"] += 1
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        notes["content that is no text written as JSON"] += 1
    return as_text(content)


def _message(message: Any, number: int, tools: list[dict[str, Any]], notes: Counter) -> list[Message]:
    """One raw message as canonical ones: several where it holds several tool responses."""
    role = _role(message, number)
    content = _content(message, number, role, notes)
    for key, value in message.items():
        if key not in _READ_KEYS[role] and value not in _EMPTY:
            if key in ("tool_calls", "function_call"):
                raise RowError(f"message {number} ({role}) has {key}; only the assistant calls tools")
            if key in _OTHER_CONTENT_KEYS and not _has_content_or_calls(message):
                raise RowError(f"message {number} ({role}) has no content but a key {key}; rename it to content")
            notes[f"not read, key {key[:40]!r} of {role} messages"] += 1
    if role == "tool":
        return _tool_results(message, content, notes)
    if role in ("system", "user"):
        return [{"role": role, "content": content}]
    return [_assistant(message, number, content, role, tools, notes)]


def _has_content_or_calls(message: Message) -> bool:
    return _either(message, "content", "value") is not None or any(
        message.get(key) not in _EMPTY for key in ("tool_calls", "function_call")
    )


def _tool_results(message: Message, content: str, notes: Counter) -> list[Message]:
    result: Message = {"role": "tool", "content": content}
    if isinstance(message.get("name"), str) and message["name"]:
        result["name"] = message["name"]
    if message.get("tool_call_id") is not None:
        result["tool_call_id"] = str(message["tool_call_id"])
    responses = tool_responses(content)
    if responses is None:
        return [result]
    notes["<tool_response> tags taken off"] += 1
    return [result | {"content": text} for text in responses]


def _assistant(
    message: Message, number: int, content: str, role: str, tools: list[dict[str, Any]], notes: Counter
) -> Message:
    calls: list[dict[str, Any]] = []
    if role == "call":
        calls, content = _call_turn(content, number, tools, notes), ""
    calls += _tool_calls(message, number, notes)
    if not calls and call_tag(content):
        found = split_calls(content, tools)
        names = {tool["function"]["name"] for tool in tools}
        # After other text, a tag is a call only if it calls a declared tool; it may just be mentioned.
        if found and (not found[0] or all(call["name"] in names for call in found[1])):
            content, calls = found[0], [{"type": "function", "function": call} for call in found[1]]
            notes["calls written in the text -> tool_calls"] += 1
        else:
            notes["call tag in the text left as text (it does not parse cleanly)"] += 1
    if content != content.strip():
        notes["assistant text stripped"] += 1
    result: Message = {"role": "assistant", "content": content.strip()}
    for name in _REASONING_KEYS:
        value = message.get(name)
        if value and not isinstance(value, str):
            raise RowError(f"message {number}: {name} is a JSON {json_type(value)}, not text")
        if value and value.strip() and result.setdefault("reasoning_content", value.strip()) != value.strip():
            notes[f"{name} not read: another reasoning stands beside it"] += 1
    if calls:
        result["tool_calls"] = calls
    key = next((name for name in _TRAIN_KEYS if message.get(name) is not None), "train")
    trained = message.get(key, True)
    if trained is not None and not (isinstance(trained, (bool, int, float)) and trained in (0, 1)):
        raise RowError(f"message {number}: {key} is {trained!r}; write true or false")
    return result | ({"train": False} if trained == 0 else {})


def _call_turn(content: str, number: int, tools: list[dict[str, Any]], notes: Counter) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn: JSON of one call or of a list of them, or tagged calls."""
    found = split_calls(content, tools)
    if found and not found[0]:
        return [{"type": "function", "function": call} for call in found[1]]
    with _in_message(number):
        calls = decode_json(content, "the function call")
    return [_call(item, number, notes) for item in (calls if isinstance(calls, list) else [calls])]


def _tool_calls(message: Message, number: int, notes: Counter) -> list[dict[str, Any]]:
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if calls in _EMPTY and legacy in _EMPTY:
        return []
    with _in_message(number):
        calls, legacy = decode_json(calls, "tool_calls"), decode_json(legacy, "function_call")
    if legacy not in _EMPTY:
        notes["function_call not read: tool_calls stand beside it" if calls else "function_call -> tool_calls"] += 1
        calls = calls or [legacy]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls: a JSON {json_type(calls)}, not a list")
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
    with _in_message(number, f"call of {name}: "):
        arguments = given_arguments(item) if function is item else given_arguments(function, item)
    unread = [key for key, value in {**item, **function}.items() if key not in _CALL_KEYS and value not in _EMPTY]
    if unread and arguments is None:  # such as LangChain's "args" or Anthropic's "input"
        raise RowError(
            f"message {number}: call of {name} has no arguments but {', '.join(unread)}; rename it to arguments"
        )
    notes.update(f"not read, key {key[:40]!r} of calls" for key in unread)
    call: dict[str, Any] = {"type": "function"}
    if item.get("id") is not None:
        call["id"] = str(item["id"])
    return call | {"function": {"name": name, "arguments": arguments or {}}}
