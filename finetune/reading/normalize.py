"""One row of any known shape -> the canonical conversation that all later steps work with.

{"messages": [{"role": "system"|"user"|"assistant"|"tool", "content": str, ...}], "tools": [{"type": "function", ...}]}
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.reading.assistant import REASONING_KEYS, read_assistant
from finetune.reading.content_parts import Parts, holds_results, read_parts, result_text
from finetune.reading.null_padding import remove_null_padding
from finetune.reading.provider_messages import converted
from finetune.reading.raw_calls import CALLS_OF_PARTS, is_call_key, refuse_hidden_calls, without_namespace
from finetune.reading.row_files import EMPTY, RowError, Unreadable, as_text, decode_json, json_type
from finetune.reading.shapes import detect_shape
from finetune.reading.system_tools import system_text, without_tools
from finetune.reading.tool_lines import refuse_other_tool
from finetune.reading.tool_schemas import normalize_tools
from finetune.reading.training_marks import (
    TRAINING_MARKS,
    mark_of_parts,
    refuse_unknown_marks,
    training_mark,
)
from finetune.reading.turns import ReadMessage, merge_turns
from formats.calls import MAX_JSON_DEPTH, json_depth

Message = dict[str, Any]
_ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot", "chatbot", "ai"),
    "tool": ("tool", "ipython", "function", "observation", "tool_response", "function_response", "environment"),
    "call": ("function_call", "tool_call", "tool_calls", "function_calls"),
}
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_TEXT_KEYS = frozenset(("role", "from", "content", "value", *TRAINING_MARKS))
# Where other programs keep the content: Gemini's parts, a tool's result, a refusal.
_OTHER_CONTENT_KEYS = ("text", "parts", "blocks", "message", "body", "output", "result", "response", "refusal")
_ASSISTANT_KEYS = _TEXT_KEYS | {"tool_calls", "function_call", *REASONING_KEYS}
_READ_KEYS = {  # keys of a message that are read, by role
    "system": _TEXT_KEYS | {"tools"},
    "user": _TEXT_KEYS,
    "tool": _TEXT_KEYS | {"name", "tool_call_id", "channel", "recipient"},
    "assistant": _ASSISTANT_KEYS,
    "call": _ASSISTANT_KEYS,
}
# Pictures, sounds and videos: only text can be trained.
_MEDIA_COLUMNS = ("images", "videos", "audios")  # lists of files, of which the text may or may not hold placeholders
_MEDIA_OF_PLACEHOLDERS = ("image", "video", "audio", "image_path", "video_path", "audio_path", "image_url")
_PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_?(?:pad|\d+))?\|?>", re.IGNORECASE)
_MEDIA_KEYS = ("images", "image", "image_url", "videos", "video", "audios")


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
    messages = converted(decode_json(shape.read(fields), "messages"))
    declared = normalize_tools(fields.get("tools"), notes)
    if not isinstance(messages, list):
        raise RowError(f"messages: a JSON {json_type(messages)}, not a list")
    _refuse_media_columns(raw, messages)
    system, messages, declared = without_tools(system_text(fields, notes), messages, declared, notes)
    if system and not (messages and isinstance(messages[0], dict) and _role(messages[0], 1) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    elif system and _either(messages[0], "content", "value") in EMPTY:
        messages = [{**messages[0], "content": system}, *messages[1:]]
    elif system and system != _either(messages[0], "content", "value"):
        notes["system column not read: the messages begin with a system message of their own"] += 1
    declared = declared or list(tools)
    roles = [_role(message, number) for number, message in enumerate(messages, start=1)]
    read, names = [], {tool["function"]["name"] for tool in declared}
    for number, message in enumerate(messages, start=1):
        answered = roles[number : number + 1] == ["tool"]
        with _in_message(number, roles[number - 1]):
            read += _message(message, number, roles[number - 1], answered, declared, names, notes)
    if not read:
        raise RowError("messages is empty")
    conversation = {"messages": merge_turns(read, notes), "tools": declared}
    remove_null_padding(conversation, raw, notes)
    refuse_other_tool(raw, conversation)
    return conversation


@contextlib.contextmanager
def _in_message(number: int, role: str = "") -> Iterator[None]:
    """Adds the message's number to a RowError, and its role where the reason continues with a verb."""
    try:
        yield
    except RowError as error:
        named = f" ({role}) " if role and str(error).startswith(("has ", "is ")) else ": "
        raise RowError(f"message {number}{named}{error}") from error


def _either(message: Message, name: str, other: str) -> Any:
    """A value that has two names; in rows merged from several spellings one of them is null."""
    return message.get(other) if message.get(name) is None else message[name]


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is a JSON {json_type(message)}, not an object")
    role = _either(message, "role", "from")
    name = re.sub(r"[\s-]+", "_", role.strip().lower()) if isinstance(role, str) else ""
    if name not in ROLES:
        raise RowError(f"message {number} has the unknown role {role!r}; known are system, user, assistant and tool")
    return ROLES[name]


def _raw_content(message: Message) -> Any:
    content = _either(message, "content", "value")
    if message.get("value") not in (*EMPTY, content):
        if content not in EMPTY:
            raise RowError("has a content and another value; keep one of them")
        content = message["value"]
    return content


def _content(content: Any, role: str, notes: Counter) -> str | Parts:
    """The text of a content, or its parts where the role allows more than one text."""
    if isinstance(content, str):
        return content
    if content is None or (content == [] and role != "tool"):  # a tool may return an empty list
        notes["content null or absent -> empty"] += 1
        return ""
    if role == "call":  # calls as JSON or in text parts
        return result_text(content)
    if role == "tool" and not (isinstance(content, list) and holds_results(content)):
        text = result_text(content)
        whole = text == as_text(content)
        notes["content other than text written as JSON" if whole else "content parts joined"] += 1
        return text
    if not isinstance(content, (list, dict)):
        notes["content other than text written as JSON"] += 1
        return as_text(content)
    parts = read_parts(content, notes)
    notes["content parts joined"] += 1
    return parts


def _message(
    message: Message, number: int, role: str, answered: bool, tools: list[dict[str, Any]], names: set[str],
    notes: Counter,
) -> list[ReadMessage]:  # fmt: skip
    """One raw message as canonical ones: several where it holds several tool results."""
    content, mark, read = _content(_raw_content(message), role, notes), training_mark(message), set()
    results: list[Message] = []
    unread: Message = {}
    if isinstance(content, Parts):
        mark = mark_of_parts(mark, content.marks)
        message, results, unread, content = _with_parts(message, role, content)
    if role in ("assistant", "call"):
        only = role == "call"
        canonical, read = read_assistant(message, content, tools, names, notes, only_calls=only, answered=answered)
    unread |= {k: v for k, v in message.items() if k not in _READ_KEYS[role] and k not in read and v not in EMPTY}
    if unread:
        _check_unread(message, unread, role, notes)
    if role in ("assistant", "call"):
        called = {call["function"]["name"] for call in canonical.get("tool_calls", ())}
        # SWE-agent repeats a call under another key.
        refuse_hidden_calls(unread, sorted(names - called) if unread else ())
        trained = {} if mark is None or mark.trained else {"train": False}
        return [ReadMessage(canonical | trained, number, mark)]
    if results:
        made = [new for one in results for new in _tool_results(one, result_text(one["content"]), tools, notes)]
        made += [{"role": role, "content": content}] if content.strip() else []
    elif role == "tool":
        made = _tool_results(message, content, tools, notes)
    else:
        made = [{"role": role, "content": content}]
    return [ReadMessage(new, number) for new in made]


def _with_parts(message: Message, role: str, parts: Parts) -> tuple[Message, list[Message], Message, str]:
    """(message with the calls and the reasoning of its parts, results, keys of parts that are not read, text)."""
    found = {"tool call": parts.calls, "reasoning": parts.reasoning, "tool result": parts.results}
    allowed = {"assistant": ("tool call", "reasoning"), "user": ("tool result",), "tool": ("tool result",)}
    for kind, values in found.items():
        if values and kind not in allowed.get(role, ()):
            remedy = "its role must be user or tool" if kind == "tool result" else "only the assistant calls and thinks"
            raise RowError(f"has a {kind} among its content parts; {remedy}")
    if role == "tool" and parts.text.strip():
        raise RowError("has text beside tool results among its content parts; keep one of them")
    if parts.reasoning:
        text = "\n\n".join(parts.reasoning)
        if other := next((key for key in REASONING_KEYS if message.get(key) not in (*EMPTY, text)), ""):
            raise RowError(f"has {other} and another reasoning among its content parts; keep one of them")
        message = {**message, "reasoning_content": text}
    if parts.calls and message.get("tool_calls") in EMPTY:
        message = {**message, "tool_calls": parts.calls}
    elif parts.calls:  # LangChain keeps both
        message = {**message, CALLS_OF_PARTS: parts.calls}
    return message, parts.results, parts.unread, parts.text


def _check_unread(message: Message, unread: Message, role: str, notes: Counter) -> None:
    """Count the keys that are not read; raises RowError when one of them holds a text, a picture or a call."""
    _refuse_media_keys(unread)
    is_filled = any(message.get(key) is not None for key in ("content", "value")) or any(
        message.get(key) not in EMPTY for key in ("tool_calls", "function_call")
    )
    if role in ("assistant", "call"):
        refuse_unknown_marks(unread)
    for key in unread:
        if key in TRAINING_MARKS and role in ("assistant", "call"):
            raise RowError(f"has {key} inside a content part; mark the message, or the part itself")
        if key in ("tool_calls", "function_call") or (role in ("system", "user") and is_call_key(key)):
            raise RowError(f"has {key}; only the assistant calls tools")
        if key in _OTHER_CONTENT_KEYS and not is_filled:
            raise RowError(f"has no content but a key {key}; rename it to content")
        notes[f"not read, key {key[:40]!r} of {role} messages"] += 1


def _tool_results(message: Message, content: str, tools: list[dict[str, Any]], notes: Counter) -> list[Message]:
    result: Message = {"role": "tool", "content": content}
    if isinstance(message.get("name"), str) and message["name"]:
        result["name"] = without_namespace(message["name"], [tool["function"]["name"] for tool in tools])
    if message.get("tool_call_id") is not None:
        result["tool_call_id"] = str(message["tool_call_id"])
    opening, closing = "<tool_response>", "</tool_response>"  # Hermes
    *parts, rest = content.strip().split(closing)
    if not parts or rest or not all(part.lstrip().startswith(opening) for part in parts):
        return [result]
    notes["<tool_response> tags taken off"] += 1
    return [result | {"content": part.strip().removeprefix(opening).strip()} for part in parts]


def _refuse_media_columns(row: dict[str, Any], messages: list[Any]) -> None:
    """Raises RowError naming a column of a row that holds images, videos or audio for its messages."""
    for column in (*_MEDIA_COLUMNS, *_MEDIA_OF_PLACEHOLDERS):
        if row.get(column) in EMPTY:
            continue
        if column in _MEDIA_COLUMNS or _PLACEHOLDER.search(as_text(messages)):
            raise RowError(f"has the column {column}, but only text can be trained; remove such rows")


def _refuse_media_keys(unread: dict[str, Any]) -> None:
    """Raises RowError naming a key of a message that holds images, videos or audio."""
    key = next((key for key in unread if key in _MEDIA_KEYS), None)
    if key is not None:
        raise RowError(f"has {key}, but only text can be trained; remove such rows")
