"""Rows of call benchmarks and call logs: BFCL, When2Call, xLAM, query logs."""

from __future__ import annotations

from typing import Any

from finetune.reading.answer_shapes import asked, calling
from finetune.reading.columns import Fields
from finetune.reading.row_files import RowError, decode_json, json_type
from finetune.reading.text_shapes import text_field
from finetune.reading.tool_lines import split_tool_lines


def is_bfcl(fields: Fields) -> bool:
    prompt = fields["prompt"]
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, list) for turn in prompt)


def read_bfcl(fields: Fields) -> list[Any]:
    turns, truth = fields["prompt"], fields.get("ground_truth")
    if len(turns) != 1:
        raise RowError("multi-turn BFCL rows need their simulator; only single-turn rows can be trained")
    if not isinstance(truth, list) or not truth or not all(isinstance(call, dict) for call in truth):
        raise RowError("a BFCL row without ground_truth has no answer to train")
    if not all(isinstance(arguments, dict) for call in truth for arguments in call.values()):
        raise RowError('ground_truth holds a call without arguments; write {"function": {"argument": [values]}}')
    calls = [
        {"name": name, "arguments": _first_allowed(arguments)} for call in truth for name, arguments in call.items()
    ]
    return [*turns[0], calling(calls)]


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


def read_multiple_choice(fields: Fields) -> list[Any]:
    answers, key = decode_json(fields["answers"], "answers"), fields["correct_answer"]
    if not isinstance(answers, dict) or not isinstance(key, str) or not isinstance(answers.get(key), str):
        raise RowError(f"answers have no text under the correct_answer {key!r}")
    if key == "tool_call" and not answers[key].lstrip().startswith("<"):
        return asked(fields, calling(_call_list(answers[key], "tool_call")))
    return asked(fields, {"role": "assistant", "content": answers[key]})


def read_xlam(fields: Fields) -> list[Any]:
    calls = _call_list(fields["answers"], "answers")
    if not calls:
        raise RowError("answers are empty: there is no call to train")
    return asked(fields, calling(calls))


def read_query_log(fields: Fields) -> list[Any]:
    """The logged call. Without logged parameters they are those that the response writes, else none."""
    tool, response = text_field(fields, "tool"), fields.get("completion")
    if "parameters" not in fields and isinstance(response, str):
        written = split_tool_lines(response, {tool})
        if written and [call["name"] for call in written[1]] == [tool]:
            return asked(fields, calling(written[1], written[0]))
    call = {"name": text_field(fields, "tool"), "arguments": fields.get("parameters")}
    return asked(fields, calling([call], text_field(fields, "reasoning").strip()))


def _call_list(value: Any, name: str) -> list[Any]:
    value = decode_json(value, name)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise RowError(f"{name}: a JSON {json_type(value)}, not a list of calls")
    return value
