"""Shapes that are running text: `User: … Assistant: …` and Glaive's chat."""

from __future__ import annotations

import itertools
import re
from typing import Any

from finetune.reading.row_files import RowError, as_text, json_type

Message = dict[str, Any]


def text_field(fields: dict[str, Any], name: str) -> str:
    """A field that must be text or a number, as text; "" if it is absent. Raises RowError."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise RowError(f"the {name} is a JSON {json_type(value)}, not text")
    return as_text(value)


_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_TURN = re.compile(rf"^({'|'.join(_GLAIVE_ROLES)}):", re.MULTILINE)
_GLAIVE_MARK = re.compile(rf"(?<!\S)({'|'.join(_GLAIVE_ROLES)}):")
_GLAIVE_NEXT = {"USER": {"ASSISTANT"}, "ASSISTANT": {"USER", "FUNCTION RESPONSE"}, "FUNCTION RESPONSE": {"ASSISTANT"}}


def _one_line_glaive(chat: str) -> list[str]:
    """The turns of a chat whose line breaks are lost; only where their order tells each mark from quoted text."""
    parts = _GLAIVE_MARK.split(chat)
    names = parts[1::2]
    if any(after not in _GLAIVE_NEXT[name] for name, after in itertools.pairwise(names)):
        raise RowError("the chat's marks 'USER:' and 'ASSISTANT:' do not begin lines; restore its line breaks")
    return parts


def read_glaive(fields: dict[str, Any]) -> list[Message]:
    """Glaive v2: a `chat` with USER:/ASSISTANT:/FUNCTION RESPONSE:."""
    chat = text_field(fields, "chat")
    parts = _GLAIVE_TURN.split(chat)
    if len(parts) == 3 and len(_GLAIVE_MARK.findall(chat)) > 1:
        parts = _one_line_glaive(chat)
    if len(parts) < 3 or parts[0].strip():
        raise RowError("the chat does not begin with 'USER:' or 'ASSISTANT:'")
    return [
        {"role": _GLAIVE_ROLES[name], "content": text.replace("<|endoftext|>", "").strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


_SPEAKER_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **dict.fromkeys(("assistant", "ai", "bot"), "assistant"),
}
_SPEAKER = re.compile(rf"^(?:### ?)?({'|'.join(_SPEAKER_ROLES)})[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)
_RENDERED = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]")


def read_speaker_text(fields: dict[str, Any]) -> list[Message]:
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
    return [
        {"role": role, "content": text[match.end() : end].strip()}
        for (role, match), end in zip(turns, ends, strict=True)
    ]
