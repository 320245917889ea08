"""Which column of a row is which field: names in any case, spelling and common language, and hints where none fits."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from finetune.errors import UserError
from finetune.reading.provider_messages import is_pairs
from finetune.reading.row_files import RowError, decode_json

Fields = dict[str, Any]  # field name -> value of the column that was matched to it

# field -> the columns that are matched to it, in order of preference; case, spaces, `_` and `-` do not count
FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(names.split())
    for name, names in {
        "messages": (
            "messages conversations conversation dialogue dialog input_messages contents traj trajectory "
            "history chat_history message_list turns input user_input"
        ),
        "tools": (
            "tools functions function tool_defs available_tools input_tools function_description tool_config "
            "tool_schemas function_definitions"
        ),
        "system": "system system_prompt system_message system_instruction instructions",
        "prompt": (
            "prompt instruction instructions question query user_query user_input q user_message human user 질문 질의 "
            "지시문 지시 问题 問題 提问 指令 質問 frage pregunta domanda pergunta вопрос soru câu_hỏi pytanie vraag "
            "سؤال प्रश्न problem input 입력 输入 入力 inputs context input_text request"
        ),
        "context": "input context 입력 输入 入力",
        "history": "history",
        "completion": (
            "completion response output outputs answer chosen_response chosen chosen_messages preferred_output a "
            "assistant assistant_message reference_response response_j best_answer solution ideal expected_output "
            "output_text targets choices candidates 답변 대답 응답 정답 출력 回答 答案 输出 出力 "
            "antwort respuesta réponse reponse risposta resposta ответ cevap câu_trả_lời odpowiedź "
            "antwoord جواب إجابة उत्तर"
        ),
        "answers": "answers",
        "correct_answer": "correct_answer",
        "ground_truth": "ground_truth ground_truths reference",
        "tool": "tool_used selected_tool tool_name tool",
        "parameters": "parameters arguments tool_parameters",
        "reasoning": "reasoning",
        "chat": "chat",
        "text": "text",
        "turns": "turns",
    }.items()
}
# Names that are the conversation only if the value is a list of messages; elsewhere they hold other things.
_ONLY_MESSAGE_LISTS = {
    *("dialogue", "dialog", "inputmessages", "contents", "traj", "trajectory", "history"),
    *("chathistory", "messagelist", "turns", "input", "userinput"),
}
_ROLE_KEYS = ("role", "from", "type", "parts")
# Columns of a log whose parts are read as columns of their own, as `request.messages`.
LOG_REQUESTS = (
    *("request", "requestbody", "inputs", "input", "kwargs", "body", "params", "payload"),
    "responsescreateparams",
)
LOG_RESPONSES = ("response", "responsebody", "outputs", "output", "completion", "result")
_VERDICTS = ("label", "kto_tag")  # KTO: whether the answer is a good one


@lru_cache(maxsize=4096)
def column_key(name: str) -> str:
    """A column's name without case, spaces, `_` and `-`, composed as Unicode's NFKC (macOS decomposes Korean)."""
    key = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", str(name)).casefold())
    prefix, _, rest = key.rpartition(".")
    return rest if prefix in LOG_REQUESTS + LOG_RESPONSES else key


_CANDIDATES: dict[str, list[tuple[str, int]]] = {}  # column key -> (field, preference)
for _field, _names in FIELDS.items():
    for _rank, _name in enumerate(_names):
        _CANDIDATES.setdefault(column_key(_name), []).append((_field, _rank))


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


def match_columns(raw: dict[str, Any], column_map: dict[str, str] | None = None) -> dict[str, str]:
    """{column: field}: those of `column_map`, then for each field the preferred one of the columns that are left."""
    columns: dict[str, str] = {}
    for column, name in (column_map or {}).items():
        if raw.get(column) is not None and name not in columns.values():  # of two columns the first is read
            columns[column] = name
    mapped = set(columns.values())
    found: dict[str, list[tuple[int, str]]] = {}
    for column, value in raw.items():
        if value is not None and column not in columns:
            for name, rank in _CANDIDATES.get(column_key(column), ()):
                found.setdefault(name, []).append((rank, column))
    for name in FIELDS:
        if name not in mapped:
            for _, column in sorted(found.get(name, ())):
                if column not in columns and _is_usable(raw, column, name):
                    columns[column] = name
                    break
    return columns


def _is_usable(raw: dict[str, Any], column: str, name: str) -> bool:
    """Whether a column whose name fits a field also has a value that fits it."""
    key, value = column_key(column), raw[column]
    if name == "messages" and key in _ONLY_MESSAGE_LISTS:
        return is_message_list(value) or (key not in ("history", "input") and is_pairs(decoded(value)))
    if name == "ground_truth" and key == "reference":  # RAGAS; elsewhere a source
        return any(column_key(other) == "userinput" for other in raw)
    if name == "tools" and key == "function":  # tools in BFCL, but a name or a flag in many other sets
        return isinstance(value, list)
    if name == "system" and key == "instructions":  # OpenAI's Responses; elsewhere the request
        by_key = {column_key(other): inner for other, inner in raw.items()}
        logged = "." in column or is_message_list(by_key.get("output"))  # request.instructions
        return is_message_list(by_key.get("input")) or ("input" in by_key and logged)
    if name == "completion" and type(value) is int:  # not the index of a choice
        return not any(column_key(other) in ("choices", "options") for other in raw)
    if name == "completion" and key in ("choices", "candidates"):  # of an API's response
        return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    if name == "prompt" and key == "request":  # an object is a log
        return isinstance(value, str)
    if name == "prompt" and key == "user":  # often the id of a user
        return isinstance(value, str) and any(column_key(other) == "assistant" for other in raw)
    return True


def is_message_list(value: Any) -> bool:
    """Whether a value is a list, or the JSON text of one, whose items look like messages."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and any(key in item for key in _ROLE_KEYS) for item in value)
    )


def decoded(value: Any) -> Any:
    """JSON text as its value; anything else, broken JSON too, unchanged."""
    try:
        return decode_json(value, "value")
    except RowError:
        return value


def with_parts(raw: dict[str, Any], column_map: dict[str, str] | None) -> dict[str, Any]:
    """The row with the parts of its columns that `--map COLUMN.KEY=FIELD` names as columns of their own."""
    for name in column_map or ():
        value: Any = raw if "." in name and name not in raw else None
        for key in name.split("."):
            value = decoded(value.get(key)) if isinstance(value, dict) else None
        if value is not None:
            raw = {**raw, name: value}
    return raw


def tool_columns(raw: dict[str, Any]) -> list[str]:
    """The columns, and parts of columns (`info.tools`), that hold tool schemas."""
    values = {name: decoded(value) for name, value in raw.items()}
    values |= _inside(values)
    return [name for name, value in values.items() if isinstance(value, list) and value and all(map(_is_tool, value))]


def _inside(values: dict[str, Any]) -> dict[str, Any]:
    """The parts of columns that are objects, as `info.tools`."""
    objects = {name: value for name, value in values.items() if isinstance(value, dict)}
    return {f"{name}.{key}": decoded(part) for name, value in objects.items() for key, part in value.items()}


def _is_tool(value: Any) -> bool:
    value = decoded(value)
    value = value["function"] if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    schemas = ("parameters", "input_schema", "inputSchema")
    return isinstance(value, dict) and isinstance(value.get("name"), str) and any(key in value for key in schemas)


class BadAnswerError(RowError):
    """The row's answer is marked as a bad one."""


def bad_verdicts(raw: dict[str, Any]) -> list[str]:
    """The columns that mark the row's answer as a bad one; only booleans count, a number is a class."""
    return [name for name, value in raw.items() if value is False and column_key(name) in map(column_key, _VERDICTS)]


def reject_bad_verdict(raw: dict[str, Any]) -> None:
    """Raise BadAnswerError for a row whose answer is marked as a bad one."""
    for column in bad_verdicts(raw):
        raise BadAnswerError(
            f"{column} is false: its answer is marked as a bad one (KTO), and only good ones are trained; "
            "--include_rejected keeps such rows"
        )


def no_shape(raw: dict[str, Any]) -> RowError:
    """Why a row has no known shape, with the columns that look like a conversation and the --map to try."""
    columns = ", ".join(map(str, raw)) or "none"
    known = "give messages, a prompt and a completion, or a text with 'User:' and 'Assistant:'"
    if ("role" in raw or "from" in raw) and ("content" in raw or "value" in raw):
        return RowError('has no messages: it is one message; write a conversation a row, {"messages": [...]}')
    for column, value in (raw | _inside(raw)).items():
        if is_message_list(value):
            return RowError(
                f"has no messages under a known name (its columns: {columns}); {column} looks like the "
                f"conversation, try prepare_data.py --map {shlex.quote(f'{column}=messages')}"
            )
    texts = [column for column, value in raw.items() if isinstance(value, str) and " " in value.strip()]
    prompt, answer = [
        next((column for column in raw if name in dict(_CANDIDATES.get(column_key(column), ()))), None)
        for name in ("prompt", "completion")
    ]
    rest = [column for column in texts if column not in (prompt, answer)]
    if answer is None and rest:
        answer = max(rest[not prompt :] or rest, key=lambda column: len(raw[column]))
        rest.remove(answer)
    if prompt is None and rest:
        prompt = rest[0]
    if prompt is not None and answer is not None:
        return RowError(
            f"has no messages (its columns: {columns}); {known}; if {prompt} asks and {answer} answers, try "
            f"prepare_data.py --map {shlex.quote(f'{prompt}=prompt')} --map {shlex.quote(f'{answer}=completion')}"
        )
    return RowError(f"has no messages (its columns: {columns}); {known}, or name the columns with --map COLUMN=FIELD")


def refuse_csv_header(source: str, reason: str, row: Any) -> None:
    """Raise UserError for a CSV file none of whose columns is known: its first line may not be a header."""
    name = source.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")) or not reason.startswith("has no messages (its columns"):
        return
    columns = ", ".join(map(repr, row))[:200]
    raise UserError(
        f"{source}: its first line is taken as the header and holds {columns}, which are not known columns; add a "
        "header line such as question,answer, or name the columns with prepare_data.py --map COLUMN=FIELD"
    )
