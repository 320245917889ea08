"""Shapes that are running text: `User: … Assistant: …`, Glaive's chat, Hermes' system prompt and tool responses."""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.reading.row_files import json_type
from formats.calls import STRICT


class RowError(ValueError):
    """Why one row cannot be used; the caller adds file and row number."""


def as_text(value: Any) -> str:
    """Text as it is; anything else as JSON the way chat templates write it (not ASCII-escaped)."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds a value that JSON has no word for ({error})") from error


def text_field(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise RowError(f"the {name} is a JSON {json_type(value)}, not text")
    return as_text(value)


_GLAIVE_TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_GLAIVE_SYSTEM = re.compile(
    r"You are a helpful assistant with access to the following functions\.\s*Use them if required\s*-?\s*"
)


def glaive_chat(fields):
    """Glaive v2: `system` with JSON functions in running text, `chat` with USER:/ASSISTANT:/FUNCTION RESPONSE:."""
    roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    parts = _GLAIVE_TURN.split(text_field(fields, "chat"))
    if len(parts) < 3 or parts[0].strip():
        raise RowError("the chat does not begin with 'USER:' or 'ASSISTANT:'")
    messages = [
        {"role": roles[name], "content": text.replace("<|endoftext|>", "").strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    system = re.sub(r"^\s*SYSTEM:\s*", "", text_field(fields, "system"))
    tools, start = [], system.find("{") if fields.get("tools") is None else -1
    if start >= 0:
        tools = _json_stream(system[start:], "the system text")
        system = _GLAIVE_SYSTEM.sub("", system[:start])
    return messages, tools or fields.get("tools"), system.strip()


_TURN = re.compile(r"^(?:### ?)?(System|User|Human|Assistant|AI|Bot)[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)
_SPEAKER = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
}
_RENDERED = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]")


def speaker_text(fields):
    """`User: … Assistant: …`; a turn begins only where the speaker changes, so quoted markers stay text."""
    text = text_field(fields, "text")
    if _RENDERED.search(text):
        raise RowError("text is already rendered with a chat template; give the messages it was made from")
    found = list(_TURN.finditer(text))
    if not found or text[: found[0].start()].strip():
        raise RowError("text does not begin with 'User:', 'Assistant:' or 'System:'; see --map for other columns")
    turns = [found[0]]
    for match in found[1:]:
        if _SPEAKER[match[1].lower()] != _SPEAKER[turns[-1][1].lower()]:
            turns.append(match)
    ends = [match.start() for match in turns[1:]] + [len(text)]
    return (
        [
            {"role": _SPEAKER[match[1].lower()], "content": text[match.end() : end].strip()}
            for match, end in zip(turns, ends, strict=True)
        ],
        fields.get("tools"),
        text_field(fields, "system"),
    )


_HERMES_SYSTEM = re.compile(
    r"You are a function calling AI model\..*?<tools>(?P<tools>\s*[\[{].*?)</tools>.*?(</tool_call>\s*|$)", re.DOTALL
)


def hermes_system(text: str) -> tuple[str, list[Any]] | None:
    """Hermes' own system prompt -> (what else the system text says, its tools); None if it is not that prompt."""
    match = _HERMES_SYSTEM.search(text)
    if match is None:
        return None
    tools = _json_stream(match["tools"], "the <tools> block")
    return (text[: match.start()] + text[match.end() :]).strip(), tools


def tool_responses(content: str) -> list[str] | None:
    """The texts of a content that is nothing but <tool_response>…</tool_response> blocks, else None."""
    stripped = content.strip()
    if not (stripped.startswith("<tool_response>") and stripped.endswith("</tool_response>")):
        return None
    block = re.compile(r"<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
    if block.sub("", stripped):
        return None  # words between the blocks would be lost
    return [text.strip() for text in block.findall(stripped)]


def _json_stream(text: str, where: str) -> list[Any]:
    """JSON values one after another with white space or commas between; a single list is taken as its items."""
    values, position = [], 0
    while position < len(text):
        if text[position] in " \t\r\n,":
            position += 1
            continue
        try:
            value, position = STRICT.raw_decode(text, position)
        except ValueError as error:
            raise RowError(f"{where} holds functions that are no JSON ({error})") from error
        values += value if isinstance(value, list) else [value]
    return values
