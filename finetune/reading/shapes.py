"""The shapes in which data sets come: the columns of each, and how its rows become raw messages.

Columns are first matched to fields (finetune.reading.columns, overridden by `--map COLUMN=FIELD`); the first entry of
SHAPES that the fields satisfy then reads the row. A new shape is one entry of SHAPES.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from finetune.reading.answer_shapes import (
    ANSWER_FIELDS,
    answer_field,
    answer_unread,
    is_squad,
    is_whole_conversation,
    read_messages,
    read_pair,
    read_squad,
    read_whole_conversation,
)
from finetune.reading.call_shapes import is_bfcl, read_bfcl, read_multiple_choice, read_query_log, read_xlam
from finetune.reading.chat_exports import (
    function_chat_messages,
    is_function_chat_dialog,
    is_function_chat_single_call,
    is_open_webui,
    open_webui_chat,
    reject_single_call,
)
from finetune.reading.columns import (
    FIELDS,
    Fields,
    decoded,
    match_columns,
    no_shape,
    parse_map,
    reject_bad_verdict,
    with_parts,
)
from finetune.reading.content_parts import has_provider_parts
from finetune.reading.provider_messages import is_gemini, is_langchain, is_pairs, is_responses
from finetune.reading.request_logs import flattened
from finetune.reading.row_files import EMPTY
from finetune.reading.text_shapes import read_glaive, read_speaker_text

__all__ = ["FIELDS", "SHAPES", "Shape", "describe", "detect_shape", "parse_map"]


@dataclass(frozen=True)
class Shape:
    """All that is known about one shape.

    name     as printed and as listed in docs/shapes.md
    writers  who writes such rows, for the table in docs/shapes.md
    columns  its columns in Markdown, for the same table
    needs    fields that must be present
    used     fields that are read if present, besides tools and system, which every shape may have
    guard    a condition on the fields that says whether a row with the needed fields has this shape
    read     fields -> messages in any spelling; raises RowError with the reason why it refuses a row
    unread   fields -> {field: names of what is not read inside it}
    """

    name: str
    writers: str
    columns: str
    needs: Set[str] = frozenset(("messages",))
    guard: Callable[[Fields], bool] = lambda fields: True
    read: Callable[[Fields], Any] = read_messages
    used: Set[str] = frozenset()
    unread: Callable[[Fields], dict[str, list[str]]] = lambda fields: {}

    def fields_read(self, fields: Fields) -> Set[str]:
        """The fields that are read of a row."""
        answer = answer_field(fields) if "messages" in self.needs else None
        return self.needs | self.used | {"tools", "system"} | ({answer} if answer else set())


def detect_shape(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> tuple[Shape, Fields, dict[str, str]]:
    """(shape, fields, {column: field} of the columns matched to fields). Raises RowError when no shape matches."""
    reject_bad_verdict(raw)
    raw = flattened(with_parts(raw, column_map))
    columns = match_columns(raw, column_map)
    fields = {name: raw[column] for column, name in columns.items()}
    for shape in SHAPES:
        if shape.needs <= fields.keys() and shape.guard(fields):
            return shape, fields, columns
    raise no_shape(raw)


def describe(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> str:
    """`prompt and completion: question -> prompt, answer -> completion; not read: id`."""
    shape, fields, matched = detect_shape(raw, column_map)
    raw = flattened(with_parts(raw, column_map))
    names = shape.fields_read(fields)
    columns = {column: name for column, name in matched.items() if name in names}
    unread = [column for column in raw if column not in columns and raw[column] is not None]
    inside = {name: answer_unread(fields[name]) for name in ANSWER_FIELDS if name in names & fields.keys()}
    inside |= shape.unread(fields)
    unread += [f"{column}.{key}" for column, name in columns.items() for key in inside.get(name, ())]
    read = ", ".join(column if column == name else f"{column} -> {name}" for column, name in columns.items())
    return f"{shape.name}: {read}" + (f"; not read: {', '.join(unread)}" if unread else "")


def _keys_beside(value: Any, *read: str) -> list[str]:
    """The keys of an object, or of a list's objects, that hold something and are not among those that are read."""
    value = decoded(value)
    items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    found = [key for item in items for key in item if key not in read and item[key] not in EMPTY]
    return list(dict.fromkeys(found))


def _messages(fits: Callable[[Any], bool]) -> Callable[[Fields], bool]:
    return lambda fields: fits(decoded(fields["messages"]))


# The first match is taken.
SHAPES: tuple[Shape, ...] = (
    Shape(
        "OpenAI Responses",
        "logs of OpenAI's Responses API",
        "`input` (or `messages`) with items `function_call`, `function_call_output`, `reasoning`; `instructions`, "
        "`tools`, `output`",
        guard=_messages(is_responses),
    ),
    Shape(
        "Gemini",
        "Gemini and Vertex AI tuning",
        "`contents` with `parts` (`text`, `functionCall`, `functionResponse`), `systemInstruction`, `tools`; camelCase "
        "or snake_case",
        guard=_messages(is_gemini),
    ),
    Shape(
        "LangChain messages",
        "LangChain, LangSmith",
        "`messages` with `type` human, ai, tool; plain, under `data`, or serialized",
        guard=_messages(is_langchain),
    ),
    Shape(
        "question and answer list",
        "ms-swift, XTuner",
        "`conversation` with `{human, assistant}`, `{system, input, output}`, `[question, answer]` and the like in "
        "each item; `system`",
        guard=_messages(is_pairs),
    ),
    Shape(
        "content blocks",
        "Anthropic, AWS Bedrock, LLaMA-Factory",
        "`messages` whose contents hold `tool_use` and `tool_result` (Anthropic), `toolUse` and `toolResult` (Bedrock "
        "Converse) or `tool_call` and `reasoning` parts (LLaMA-Factory v1); `system`, `tools`, `toolConfig`",
        guard=_messages(has_provider_parts),
    ),
    Shape(
        "messages and answer column",
        "LLaMA-Factory, When2Call, FunctionChat-Bench",
        "`messages` that end with the user or a tool, `tools`; `chosen`, `chosen_response`, `answer`, `completion`, "
        "`ground_truth`, or an API's response (`choices`, `candidates`)",
        guard=lambda fields: answer_field(fields) is not None,
    ),
    Shape(
        "messages",
        "OpenAI, ShareGPT, Hermes, ToolACE, tau-bench, SWE-agent",
        "`messages` or `conversations` (OpenAI `role`/`content`, ShareGPT `from`/`value`), `tools`, `system`; tools in "
        "the system text of Hermes, ToolACE, Kimi and Glaive, ToolACE's `[name(a=1)]` calls and `<tool_response>` tags "
        "are recognized; `traj`, `history`, or a bare list of messages",
    ),
    Shape(
        "FunctionChat dialog",
        "FunctionChat-Bench",
        "`turns` of `query` and `ground_truth`, `tools`",
        needs={"turns"},
        guard=lambda fields: is_function_chat_dialog(fields["turns"]),
        read=lambda fields: function_chat_messages(fields["turns"]),
        unread=lambda fields: {"turns": _keys_beside(fields["turns"], "query", "ground_truth")},
    ),
    Shape(
        "Open WebUI export",
        "Open WebUI",
        "`chat` with `messages` or `history`",
        needs={"chat"},
        guard=lambda fields: is_open_webui(fields["chat"]),
        read=lambda fields: open_webui_chat(fields["chat"])[0],
        unread=lambda fields: {"chat": open_webui_chat(fields["chat"])[1]},
    ),
    Shape(
        "Glaive chat",
        "Glaive",
        "`system`, `chat`",
        needs={"chat"},
        read=read_glaive,
    ),
    Shape(
        "BFCL",
        "Berkeley Function Calling Leaderboard",
        "`question`, `function`, `ground_truth` (single turn)",
        needs={"prompt"},
        guard=is_bfcl,
        read=read_bfcl,
        used={"ground_truth"},
    ),
    Shape(
        "FunctionChat SingleCall",
        "FunctionChat-Bench",
        "`query`, `ground_truth` and `tools` as lists: rejected, since a row is several conversations",
        needs={"prompt", "ground_truth"},
        guard=is_function_chat_single_call,
        read=reject_single_call,
    ),
    Shape(
        "When2Call multiple choice",
        "When2Call",
        "`question`, `answers`, `correct_answer`, `tools`",
        needs={"prompt", "answers", "correct_answer"},
        read=read_multiple_choice,
        unread=lambda fields: {"answers": _keys_beside(fields["answers"], fields["correct_answer"])},
    ),
    Shape(
        "SQuAD",
        "SQuAD, KorQuAD",
        "`context`, `question`, `answers` (`text`; the first is trained)",
        needs={"prompt", "answers"},
        guard=is_squad,
        read=read_squad,
        used={"context"},
        unread=lambda fields: {"answers": _keys_beside(fields["answers"], "text", "answer_start", "answer_end")},
    ),
    Shape(
        "APIGen/xLAM",
        "APIGen, xLAM",
        "`query`, `answers`, `tools`",
        needs={"prompt", "answers"},
        read=read_xlam,
    ),
    Shape(
        "query log",
        "a table of logged calls",
        "`query`, `tool_used`, `parameters`, `reasoning`; `response` is not read, unless it writes the call",
        needs={"prompt", "tool"},
        read=read_query_log,
        used={"parameters", "reasoning"},
    ),
    Shape(
        "prompt and completion",
        "Alpaca, TRL, UltraFeedback, spreadsheets",
        "`prompt`, `instruction` (+ `input`), `question`, `query`, `input`, `Q`; `completion`, `response`, `output`, "
        "`answer`, `chosen`, `A`; `history`; in other languages too (`질문`, `답변`)",
        needs={"prompt", "completion"},
        read=read_pair,
        used={"context", "history"},
    ),
    Shape(
        "question and ground truth",
        "RAGAS test sets",
        "`question` or `query`, `ground_truth` (text or a message); `user_input`, `reference`",
        needs={"prompt", "ground_truth"},
        read=read_pair,
        used={"context", "history"},
    ),
    Shape(
        "conversation in chosen",
        "orpo-dpo-mix, hh-rlhf",
        "`chosen` without a prompt: messages, or text with `Human: … Assistant: …`",
        needs={"completion"},
        guard=is_whole_conversation,
        read=read_whole_conversation,
    ),
    Shape(
        "User:/Assistant: text",
        "guanaco and the like",
        "`text` with `User: … Assistant: …` (also `System:`, `Human:`)",
        needs={"text"},
        read=read_speaker_text,
    ),
)
