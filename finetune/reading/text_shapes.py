"""Shapes that are running text: `User: … Assistant: …`, Glaive's chat, Hermes' system prompt and tool responses."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, NamedTuple

from finetune.reading.row_files import RowError, json_type
from formats.calls import STRICT


class RawConversation(NamedTuple):
    """A row's parts as its shape holds them: messages and tools in any spelling, and the system text or its parts."""

    messages: Any
    tools: Any
    system: str | list[Any] | dict[str, Any]


def raw_conversation(fields: dict[str, Any], messages: Any) -> RawConversation:
    """`messages` with the row's own tools and system text."""
    return RawConversation(messages, fields.get("tools"), system_text(fields))


def as_text(value: Any) -> str:
    """Text unchanged; anything else as JSON that is not ASCII-escaped, as chat templates write it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds a value that JSON cannot represent ({error})") from error


def text_field(fields: dict[str, Any], name: str) -> str:
    """A field that must be text or a number, as text; "" if it is absent. Raises RowError."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise RowError(f"the {name} is a JSON {json_type(value)}, not text")
    return as_text(value)


def system_text(fields: dict[str, Any]) -> str:
    """The system column as text, from text, a message or parts (Anthropic, Converse, Gemini). Raises RowError."""
    value = fields.get("system")
    if isinstance(value, dict):
        value = next((value[key] for key in ("parts", "content", "text") if key in value), value)
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in value]
        texts = [part.get("text") for part in parts if not part.keys() & {"cachePoint", "cache_point"}]
        if not all(isinstance(text, str) for text in texts):
            raise RowError("the system text is a list that holds more than text; only text can be trained")
        return "\n\n".join(texts)
    return text_field({"system": value}, "system")


_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_TURN = re.compile(rf"^({'|'.join(_GLAIVE_ROLES)}):", re.MULTILINE)
_GLAIVE_SYSTEM = re.compile(
    r"You are a helpful assistant with access to the following functions\.\s*Use them if required\s*-?\s*"
)


_GLAIVE_MARK = re.compile(rf"(?<!\S)({'|'.join(_GLAIVE_ROLES)}):")
_GLAIVE_NEXT = {"USER": {"ASSISTANT"}, "ASSISTANT": {"USER", "FUNCTION RESPONSE"}, "FUNCTION RESPONSE": {"ASSISTANT"}}


def _one_line_glaive(chat: str) -> list[str]:
    """The turns of a chat whose line breaks are lost; only where their order tells each mark from quoted text."""
    parts = _GLAIVE_MARK.split(chat)
    names = parts[1::2]
    if any(after not in _GLAIVE_NEXT[name] for name, after in itertools.pairwise(names)):
        raise RowError("the chat's marks 'USER:' and 'ASSISTANT:' do not begin lines; restore its line breaks")
    return parts


def read_glaive(fields: dict[str, Any]) -> RawConversation:
    """Glaive v2: `system` with JSON functions in running text, `chat` with USER:/ASSISTANT:/FUNCTION RESPONSE:."""
    chat = text_field(fields, "chat")
    parts = _GLAIVE_TURN.split(chat)
    if len(parts) == 3 and len(_GLAIVE_MARK.findall(chat)) > 1:
        parts = _one_line_glaive(chat)
    if len(parts) < 3 or parts[0].strip():
        raise RowError("the chat does not begin with 'USER:' or 'ASSISTANT:'")
    messages = [
        {"role": _GLAIVE_ROLES[name], "content": text.replace("<|endoftext|>", "").strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    system = re.sub(r"^\s*SYSTEM:\s*", "", text_field(fields, "system"))
    tools, start = fields.get("tools"), system.find("{")
    if tools is None and start >= 0:
        tools = json_stream(system[start:], "the system text")
        system = _GLAIVE_SYSTEM.sub("", system[:start])
    return RawConversation(messages, tools, system.strip())


_SPEAKER_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **dict.fromkeys(("assistant", "ai", "bot"), "assistant"),
}
_SPEAKER = re.compile(rf"^(?:### ?)?({'|'.join(_SPEAKER_ROLES)})[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)
_RENDERED = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]")


def read_speaker_text(fields: dict[str, Any]) -> RawConversation:
    """`User: … Assistant: …`; a turn begins only where the speaker changes, so quoted markers stay text."""
    text = text_field(fields, "text")
    if _RENDERED.search(text):
        raise RowError("text is already rendered with a chat template; give the messages it was made from")
    found = list(_SPEAKER.finditer(text))
    if not found:
        raise RowError(
            "text is raw text without speakers, which is not trained here; give messages, a prompt and a completion, "
            "or a text with 'User:' and 'Assistant:' at the beginning of lines"
        )
    if text[: found[0].start()].strip():
        raise RowError("text does not begin with 'User:', 'Assistant:' or 'System:'; see --map for other columns")
    turns: list[tuple[str, re.Match]] = []
    for match in found:
        role = _SPEAKER_ROLES[match[1].lower()]
        if not turns or role != turns[-1][0]:
            turns.append((role, match))
    ends = [match.start() for _, match in turns[1:]] + [len(text)]
    messages = [
        {"role": role, "content": text[match.end() : end].strip()}
        for (role, match), end in zip(turns, ends, strict=True)
    ]
    return raw_conversation(fields, messages)


_HERMES_SYSTEM = re.compile(
    r"You are a function calling AI model\..*?<tools>(?P<tools>\s*[\[{].*?)</tools>.*?(</tool_call>\s*|$)", re.DOTALL
)
_TOOL_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>\s*", re.DOTALL)


def hermes_system(text: str) -> tuple[str, list[Any]] | None:
    """(rest of the system text, tools) of Hermes' own system prompt; None for any other text. Raises RowError."""
    match = _HERMES_SYSTEM.search(text)
    if match is None:
        return None
    tools = json_stream(match["tools"], "the <tools> block")
    return (text[: match.start()] + text[match.end() :]).strip(), tools


def tool_responses(content: str) -> list[str] | None:
    """The texts of a content that consists of <tool_response>…</tool_response> blocks only, else None."""
    stripped = content.strip()
    if not stripped.startswith("<tool_response>") or _TOOL_RESPONSE.sub("", stripped):
        return None
    return [text.strip() for text in _TOOL_RESPONSE.findall(stripped)]


def json_stream(text: str, where: str) -> list[Any]:
    """JSON values separated by white space or commas; a list is replaced by its items."""
    values, position = [], 0
    while position < len(text):
        if text[position] in " \t\r\n,":
            position += 1
            continue
        try:
            value, position = STRICT.raw_decode(text, position)
        except ValueError as error:
            raise RowError(f"{where} holds functions that are not valid JSON ({error})") from error
        values += value if isinstance(value, list) else [value]
    return values
