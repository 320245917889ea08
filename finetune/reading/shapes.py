"""The shapes in which data sets come: which columns name what, and how each shape is turned into raw messages.

Columns are first read as fields (an alias table, overridden by `--map COLUMN=FIELD`), then the first shape whose
fields are there converts them. A new shape is one function and one line in SHAPES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.reading.row_files import json_type, strict_json
from finetune.reading.text_shapes import RowError, glaive_chat, speaker_text, text_field

# field -> the column names read as it, the likeliest first
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
    """A row taken as one shape: `fields` by name, `columns` {column: field} as read, and the converter."""

    name: str
    fields: dict[str, Any]
    columns: dict[str, str]
    convert: Callable[[dict[str, Any]], tuple[Any, Any, str | None]]


def parse_map(pairs: list[str] | None) -> dict[str, str]:
    """`["question=prompt"]` -> {"question": "prompt"}. Raises UserError naming the known fields."""
    from finetune.errors import UserError

    result = {}
    for pair in pairs or []:
        column, separator, name = pair.partition("=")
        if separator and name not in FIELDS and column in FIELDS:
            column, name = name, column  # written the other way round
        if not separator or name not in FIELDS:
            raise UserError(f"--map {pair}: write COLUMN=FIELD, with one of the fields {', '.join(FIELDS)}")
        result[column] = name
    return result


def detect_shape(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> Shape:
    """Read columns as fields and pick the shape. Raises RowError when no shape fits."""
    columns: dict[str, str] = {}
    for column, name in (column_map or {}).items():
        if raw.get(column) is not None and name not in columns.values():  # of two columns the first is read
            columns[column] = name
    taken = set(columns.values())
    for name, aliases in FIELDS.items():
        if name not in taken:
            column = next((a for a in aliases if _usable(raw, a) and a not in columns), None)
            if column is not None:
                columns[column] = name
    fields = {name: raw[column] for column, name in columns.items()}
    for name, needed, convert in SHAPES:
        if needed <= fields.keys() and (name not in _GUARDS or _GUARDS[name](fields)):
            used = _USED.get(name, needed) | {"tools", "system"}
            return Shape(name, fields, {c: n for c, n in columns.items() if n in used}, convert)
    names = ", ".join(raw) or "none"
    raise RowError(
        f"has no messages (its columns: {names}); give messages, a prompt and a completion, or a text "
        "with 'User:' and 'Assistant:', or name the columns with prepare_data.py --map COLUMN=FIELD"
    )


def _usable(raw: dict[str, Any], column: str) -> bool:
    """Whether a column is there; `function` holds tools in BFCL, but a name or a flag in many other sets."""
    return raw.get(column) is not None and (column != "function" or isinstance(raw[column], list))


def describe(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> str:
    """`question/answer: question -> prompt, answer -> completion; not read: id`, as printed for each kind of row."""
    shape = detect_shape(raw, column_map)
    unread = [column for column in raw if column not in shape.columns and raw[column] is not None]
    read = ", ".join(column if column == name else f"{column} -> {name}" for column, name in shape.columns.items())
    return f"{shape.name}: {read}" + (f"; not read: {', '.join(unread)}" if unread else "")


def _messages(fields):
    messages, chosen = fields["messages"], fields.get("completion")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(chosen, dict) and isinstance(last, dict) and last.get("role") == "user":
        messages = [*messages, chosen]  # When2Call's preference rows keep the answer beside the messages
    return messages, fields.get("tools"), text_field(fields, "system")


def _pair(fields):
    """prompt/completion and its relatives; both may be lists of messages, as TRL's conversational rows are."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, (list, dict)):
        first = prompt if isinstance(prompt, list) else [{"role": "user", "content": text_field(fields, "prompt")}]
        if isinstance(completion, dict):
            completion = [completion]
        last = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return first + last, fields.get("tools"), text_field(fields, "system")
    messages = []
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowError("history is no list of [question, answer] pairs")
    for turn in history:
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    text, context = text_field(fields, "prompt"), text_field(fields, "context")
    if context.strip():
        text = f"{text}\n\n{context}"
    messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text_field(fields, "completion")}]
    return messages, fields.get("tools"), text_field(fields, "system")


def _xlam(fields):
    calls = _json_list(fields["answers"], "answers")
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    if not calls:
        raise RowError("answers are empty: there is no call to train")
    return (
        [{"role": "user", "content": text_field(fields, "prompt")}, answer],
        fields.get("tools"),
        text_field(fields, "system"),
    )


def _when2call(fields):
    """When2Call's multiple choice: the answer whose key is `correct_answer`; `tool_call` is JSON of a call."""
    answers, key = fields["answers"], fields["correct_answer"]
    if isinstance(answers, str):
        answers = _decoded(answers, "answers")
    if not isinstance(answers, dict) or not isinstance(key, str) or not isinstance(answers.get(key), str):
        raise RowError(f"answers have no text under the correct_answer {key!r}")
    answer: dict[str, Any] = {"role": "assistant", "content": answers[key]}
    if key == "tool_call" and not answers[key].lstrip().startswith("<"):
        answer = {"role": "assistant", "content": "", "tool_calls": _json_list(answers[key], "tool_call")}
    return (
        [{"role": "user", "content": text_field(fields, "prompt")}, answer],
        fields.get("tools"),
        text_field(fields, "system"),
    )


def _bfcl(fields):
    """BFCL: `question` is a list of turns, `ground_truth` lists the allowed values of each argument."""
    turns, truth = fields["prompt"], fields.get("ground_truth")
    if len(turns) != 1:
        raise RowError("a BFCL row of several turns needs its simulator; only single-turn rows can be trained")
    if not isinstance(truth, list) or not truth or not all(isinstance(call, dict) for call in truth):
        raise RowError("a BFCL row without ground_truth has no answer to train")
    if not all(isinstance(arguments, dict) for call in truth for arguments in call.values()):
        raise RowError('ground_truth holds a call without arguments; write {"function": {"argument": [values]}}')
    calls = [
        {"name": name, "arguments": {key: value for key, allowed in arguments.items() for value in _allowed(allowed)}}
        for call in truth
        for name, arguments in call.items()
    ]
    return turns[0] + [{"role": "assistant", "content": "", "tool_calls": calls}], fields.get("tools"), None


def _allowed(values: Any) -> list[Any]:
    """The first allowed value as a list of one; none where "" comes first (it may be left out)."""
    if not isinstance(values, list):
        return [values]
    if not values or values[0] == "":
        return []
    value = values[0]
    if isinstance(value, dict):
        return [{key: inner for key, allowed in value.items() for inner in _allowed(allowed)}]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [[inner for item in value for inner in _allowed([item])]]
    return [value]


def _query_log(fields):
    """A row of a query log: what was asked, which tool was used with which parameters."""
    reasoning = text_field(fields, "reasoning").strip()
    arguments = fields.get("parameters")
    answer = {
        "role": "assistant",
        "content": reasoning,
        "tool_calls": [{"name": text_field(fields, "tool"), "arguments": arguments}],
    }
    return (
        [{"role": "user", "content": text_field(fields, "prompt")}, answer],
        fields.get("tools"),
        text_field(fields, "system"),
    )


def _decoded(text: str, name: str) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        raise RowError(f"{name}: no JSON ({error})") from error


def _json_list(value: Any, name: str) -> list[Any]:
    value = _decoded(value, name) if isinstance(value, str) else value
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise RowError(f"{name} are a JSON {json_type(value)}, not a list of calls")
    return value


def _is_bfcl(fields) -> bool:
    prompt = fields["prompt"]
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, list) for turn in prompt)


# name, fields that must be there, converter: the first that fits is taken
SHAPES: tuple[tuple[str, frozenset[str], Callable], ...] = (
    ("messages", frozenset({"messages"}), _messages),
    ("Glaive chat", frozenset({"chat"}), glaive_chat),
    ("BFCL", frozenset({"prompt", "tools"}), _bfcl),
    ("When2Call multiple choice", frozenset({"prompt", "answers", "correct_answer"}), _when2call),
    ("APIGen/xLAM", frozenset({"prompt", "answers"}), _xlam),
    ("query log", frozenset({"prompt", "tool", "parameters"}), _query_log),
    ("prompt and completion", frozenset({"prompt", "completion"}), _pair),
    ("query log", frozenset({"prompt", "tool"}), _query_log),
    ("User:/Assistant: text", frozenset({"text"}), speaker_text),
)
_GUARDS: dict[str, Callable[[dict[str, Any]], bool]] = {"BFCL": _is_bfcl}
_USED: dict[str, frozenset[str]] = {
    "BFCL": frozenset({"prompt", "ground_truth"}),
    "prompt and completion": frozenset({"prompt", "context", "history", "completion"}),
    "query log": frozenset({"prompt", "tool", "parameters", "reasoning"}),
}
