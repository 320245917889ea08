"""The shapes in which data sets come: the columns of each, and how its rows become raw messages.

Columns are first matched to fields (by FIELDS, overridden by `--map COLUMN=FIELD`); the first entry of SHAPES that the
fields satisfy then reads the row. A new shape is one entry of SHAPES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.reading.row_files import RowError, decode_json, json_type
from finetune.reading.text_shapes import RawConversation, raw_conversation, read_glaive, read_speaker_text, text_field

Fields = dict[str, Any]  # field name -> value of the column that was matched to it

# field -> the columns that are matched to it, in order of preference
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog"),
    "tools": ("tools", "functions", "function"),
    "system": ("system", "system_prompt"),
    "prompt": ("prompt", "instruction", "question", "query", "user_query"),
    "context": ("input", "context"),
    "history": ("history",),
    "completion": ("completion", "response", "output", "answer", "chosen_response", "chosen"),
    "answers": ("answers",),
    "correct_answer": ("correct_answer",),
    "ground_truth": ("ground_truth",),
    "tool": ("tool_used", "selected_tool", "tool_name", "tool"),
    "parameters": ("parameters", "arguments", "tool_parameters"),
    "reasoning": ("reasoning",),
    "chat": ("chat",),
    "text": ("text",),
}


@dataclass(frozen=True)
class Shape:
    """All that is known about one shape.

    name     as printed and as listed in docs/data.md
    columns  its columns in Markdown, for the table in docs/data.md
    needs    fields that must be present
    used     fields that are read if present, besides tools and system, which every shape may have
    guard    a condition on the fields that says whether a row with the needed fields has this shape
    read     fields -> RawConversation; raises RowError with the reason why it refuses a row
    """

    name: str
    columns: str
    needs: Set[str]
    read: Callable[[Fields], RawConversation]
    used: Set[str] = frozenset()
    guard: Callable[[Fields], bool] = lambda fields: True


def parse_map(pairs: Iterable[str] | None) -> dict[str, str]:
    """`["question=prompt"]` -> {"question": "prompt"}. Raises UserError naming the known fields."""
    result = {}
    for pair in pairs or []:
        column, separator, name = pair.partition("=")
        if separator and name not in FIELDS and column in FIELDS:
            column, name = name, column  # given as FIELD=COLUMN
        if not separator or name not in FIELDS:
            raise UserError(f"--map {pair}: write COLUMN=FIELD, with one of the fields {', '.join(FIELDS)}")
        result[column] = name
    return result


def detect_shape(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> tuple[Shape, Fields, dict[str, str]]:
    """(shape, fields, {column: field} of the columns matched to fields). Raises RowError when no shape matches."""
    columns: dict[str, str] = {}
    for column, name in (column_map or {}).items():
        if raw.get(column) is not None and name not in columns.values():  # of two columns the first is read
            columns[column] = name
    mapped = set(columns.values())
    for name, candidates in FIELDS.items():
        if name not in mapped:
            column = next((c for c in candidates if _is_usable(raw, c) and c not in columns), None)
            if column is not None:
                columns[column] = name
    fields = {name: raw[column] for column, name in columns.items()}
    for shape in SHAPES:
        if shape.needs <= fields.keys() and shape.guard(fields):
            return shape, fields, columns
    raise RowError(
        f"has no messages (its columns: {', '.join(raw) or 'none'}); give messages, a prompt and a completion, or a "
        "text with 'User:' and 'Assistant:', or name the columns with prepare_data.py --map COLUMN=FIELD"
    )


def _is_usable(raw: dict[str, Any], column: str) -> bool:
    """Whether a column has a value; `function` holds tools in BFCL, but a name or a flag in many other sets."""
    return raw.get(column) is not None and (column != "function" or isinstance(raw[column], list))


def describe(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> str:
    """`prompt and completion: question -> prompt, answer -> completion; not read: id`."""
    shape, _, matched = detect_shape(raw, column_map)
    fields = shape.needs | shape.used | {"tools", "system"}
    columns = {column: name for column, name in matched.items() if name in fields}
    unread = [column for column in raw if column not in columns and raw[column] is not None]
    read = ", ".join(column if column == name else f"{column} -> {name}" for column, name in columns.items())
    return f"{shape.name}: {read}" + (f"; not read: {', '.join(unread)}" if unread else "")


def _is_preference(fields: Fields) -> bool:
    messages = fields["messages"]
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(fields["completion"], dict) and isinstance(last, dict) and last.get("role") == "user"


def _read_preference(fields: Fields) -> RawConversation:
    return raw_conversation(fields, [*fields["messages"], fields["completion"]])


def _is_bfcl(fields: Fields) -> bool:
    prompt = fields["prompt"]
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, list) for turn in prompt)


def _read_bfcl(fields: Fields) -> RawConversation:
    turns, truth = fields["prompt"], fields.get("ground_truth")
    if len(turns) != 1:
        raise RowError("a BFCL row of several turns needs its simulator; only single-turn rows can be trained")
    if not isinstance(truth, list) or not truth or not all(isinstance(call, dict) for call in truth):
        raise RowError("a BFCL row without ground_truth has no answer to train")
    if not all(isinstance(arguments, dict) for call in truth for arguments in call.values()):
        raise RowError('ground_truth holds a call without arguments; write {"function": {"argument": [values]}}')
    calls = [
        {"name": name, "arguments": _first_allowed(arguments)} for call in truth for name, arguments in call.items()
    ]
    return RawConversation(turns[0] + [_answer(calls)], fields.get("tools"), "")


def _first_allowed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The first allowed value of each argument; arguments that may be omitted ("" comes first) are omitted."""
    return {
        name: _expanded(allowed[0]) if isinstance(allowed, list) else allowed
        for name, allowed in arguments.items()
        if not isinstance(allowed, list) or (allowed and allowed[0] != "")
    }


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return _first_allowed(value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_first_allowed(item) for item in value]
    return value


def _read_multiple_choice(fields: Fields) -> RawConversation:
    answers, key = decode_json(fields["answers"], "answers"), fields["correct_answer"]
    if not isinstance(answers, dict) or not isinstance(key, str) or not isinstance(answers.get(key), str):
        raise RowError(f"answers have no text under the correct_answer {key!r}")
    if key == "tool_call" and not answers[key].lstrip().startswith("<"):
        return _asked(fields, _answer(_call_list(answers[key], "tool_call")))
    return _asked(fields, {"role": "assistant", "content": answers[key]})


def _read_xlam(fields: Fields) -> RawConversation:
    calls = _call_list(fields["answers"], "answers")
    if not calls:
        raise RowError("answers are empty: there is no call to train")
    return _asked(fields, _answer(calls))


def _read_query_log(fields: Fields) -> RawConversation:
    call = {"name": text_field(fields, "tool"), "arguments": fields.get("parameters")}
    return _asked(fields, _answer([call], text_field(fields, "reasoning").strip()))


def _read_pair(fields: Fields) -> RawConversation:
    """A prompt and its completion; each is text or, as in TRL's conversational rows, a list of messages."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, (list, dict)):
        first = prompt if isinstance(prompt, list) else [_asks(text_field(fields, "prompt"))]
        if not isinstance(completion, list):
            completion = [completion if isinstance(completion, dict) else _says(completion)]
        return raw_conversation(fields, first + completion)
    messages = []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowError("history is not a list of [question, answer] pairs")
    for question, answer in history:
        messages += [_asks(question), _says(answer)]
    text, context = text_field(fields, "prompt"), text_field(fields, "context")
    if context.strip():
        text = f"{text}\n\n{context}"
    return raw_conversation(fields, [*messages, _asks(text), _says(text_field(fields, "completion"))])


def _asks(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _says(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _answer(calls: list[Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _asked(fields: Fields, answer: dict[str, Any]) -> RawConversation:
    return raw_conversation(fields, [_asks(text_field(fields, "prompt")), answer])


def _call_list(value: Any, name: str) -> list[Any]:
    value = decode_json(value, name)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise RowError(f"{name}: a JSON {json_type(value)}, not a list of calls")
    return value


# The first match is taken.
SHAPES: tuple[Shape, ...] = (
    Shape(
        "When2Call preference",
        "`messages` that end with the user, `tools`, `chosen_response`",
        needs={"messages", "completion"},
        guard=_is_preference,
        read=_read_preference,
    ),
    Shape(
        "messages",
        "`messages` or `conversations` (OpenAI `role`/`content`, ShareGPT `from`/`value`), `tools`, `system`; tools in "
        "Hermes' system prompt and `<tool_response>` tags are recognized",
        needs={"messages"},
        read=lambda fields: raw_conversation(fields, fields["messages"]),
    ),
    Shape("Glaive chat", "`system`, `chat`", needs={"chat"}, read=read_glaive),
    Shape(
        "BFCL",
        "`question`, `function`, `ground_truth` (single turn)",
        needs={"prompt", "tools"},
        used={"ground_truth"},
        guard=_is_bfcl,
        read=_read_bfcl,
    ),
    Shape(
        "When2Call multiple choice",
        "`question`, `answers`, `correct_answer`, `tools`",
        needs={"prompt", "answers", "correct_answer"},
        read=_read_multiple_choice,
    ),
    Shape("APIGen/xLAM", "`query`, `answers`, `tools`", needs={"prompt", "answers"}, read=_read_xlam),
    Shape(
        "query log",
        "`query`, `tool_used`, `parameters`, `reasoning`",
        needs={"prompt", "tool"},
        used={"parameters", "reasoning"},
        guard=lambda fields: "parameters" in fields or "completion" not in fields,
        read=_read_query_log,
    ),
    Shape(
        "prompt and completion",
        "`prompt`, `instruction` (+ `input`), `question` or `query`; `completion`, `response`, `output` or `answer`; "
        "`history`",
        needs={"prompt", "completion"},
        used={"context", "history"},
        read=_read_pair,
    ),
    Shape(
        "User:/Assistant: text",
        "`text` with `User: … Assistant: …` (also `System:`, `Human:`)",
        needs={"text"},
        read=read_speaker_text,
    ),
)
