"""Calls under other keys than `tool_calls`, and other keys in the calls themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from finetune.reading.calls_in_text import ARGUMENT_KEYS
from finetune.reading.row_files import EMPTY, RowError, decode_json, json_type, strict_json
from finetune.reading.training_marks import snake_case

_CALL_KEY = re.compile(r"(?:tool|function)_?(?:call|use|invocation|request)s?")
CALLS_OF_PARTS = "its content parts"  # takes the place of a key where content parts and tool_calls hold calls
_READ_CALL_KEYS = ("tool_calls", "function_call")  # read by normalize
_NAMES = ("name", "toolName", "tool_name", "tool", "functionName", "function_name")
_IDS = ("id", "call_id", "toolCallId", "tool_call_id", "toolUseId", "tool_use_id")
CALL_TYPES = ("function", "tooluse", "toolcall", "toolcalls", "functioncall")  # squeezed
CALL_KEYS = frozenset(("name", *ARGUMENT_KEYS, "id", "type", "index"))
_FUNCTION_PREFIX = "functions."  # Harmony's namespace of the declared tools


def plain_calls(item: dict[str, Any]) -> list[dict[str, Any]]:
    """A call of any provider in OpenAI's keys; several where JSON text under `value` holds a list of them."""
    if isinstance(item.get("value"), (str, dict, list)) and not any(item.get(key) for key in (*_NAMES, "function")):
        value = decode_json(item["value"], "the call")
        if isinstance(value, (dict, list)) and value:
            values = value if isinstance(value, list) else [value]
            return [plain_call(value) for value in values]
    return [plain_call(item)]


def plain_call(item: Any) -> dict[str, Any]:
    """A call of any provider with its name and id under OpenAI's keys; it may be JSON text. Raises RowError."""
    item = decode_json(item, "a tool call", times=2)
    if not isinstance(item, dict):
        raise RowError(f"a tool call is a JSON {json_type(item)}, not an object")
    if isinstance(item.get("function"), dict):
        return item
    call: dict[str, Any] = {}
    rest = dict(item)
    for name, keys in (("name", _NAMES), ("id", _IDS)):
        if given := [key for key in keys if rest.get(key) is not None]:
            call[name] = rest.pop(given[0])
    return call | rest


def is_call_type(value: Any) -> bool:
    """Whether the `type` of a call says no more than that it is one."""
    return value in EMPTY or (isinstance(value, str) and squeezed(value) in (*CALL_TYPES, "custom"))


def squeezed(name: str) -> str:
    """`tool_use`, `tool-use` and `toolUse` alike."""
    return name.lower().replace("_", "").replace("-", "")


def calls_under_other_keys(message: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(raw calls, {key: value} that held them) of an assistant message. Raises RowError naming a key it cannot read."""
    held = {k: v for k, v in message.items() if is_call_key(k) and v not in EMPTY}
    extra = message.get("additional_kwargs")  # LangChain
    if isinstance(extra, dict):
        held |= {f"additional_kwargs.{k}": extra[k] for k in (*_READ_CALL_KEYS,) if extra.get(k) not in EMPTY}
    calls: list[dict[str, Any]] = []
    first = ""
    for key, value in held.items():
        found = _readable_calls(key, value)
        if first and found != calls:
            raise RowError(f"the calls under {first} and {key} differ; write them into tool_calls")
        first, calls = key, found
    return calls, held


def is_call_key(key: str) -> bool:
    """Whether calls may be under this key of a message (`toolCalls`), besides those that are always read."""
    if "ool" not in key and "unction" not in key:
        return key == CALLS_OF_PARTS
    return key not in _READ_CALL_KEYS and bool(_CALL_KEY.fullmatch(snake_case(key)))


def _readable_calls(key: str, value: Any) -> list[dict[str, Any]]:
    try:
        value = decode_json(value, key)
        calls = []
        for item in value if isinstance(value, list) else [value]:
            call = plain_call(item)
            function = call["function"] if isinstance(call.get("function"), dict) else call
            unknown = call.keys() - CALL_KEYS - {"function"}
            if not is_call_type(call.get("type")) or unknown or not isinstance(function.get("name"), str):
                raise RowError(f"it has {', '.join(sorted(unknown)) or 'no name'}")
            calls.append(call)
    except RowError as error:
        raise RowError(f"has calls under {key} that cannot be read ({error}); write them into tool_calls") from error
    return calls


def refuse_hidden_calls(unread: dict[str, Any], tools: Iterable[str]) -> None:
    """Raises RowError when a key of an assistant message that is not read holds the name of a declared tool."""
    for key, value in unread.items():
        for name in tools:
            if value not in EMPTY and _holds_name(value, name):
                raise RowError(
                    f"the key {key[:40]!r} is not read but holds the name of the tool {name}; write the call into "
                    "tool_calls, or remove the key"
                )


def _holds_name(value: Any, name: str) -> bool:
    if isinstance(value, dict):
        return any(_holds_name(key, name) or _holds_name(inner, name) for key, inner in value.items())
    if isinstance(value, list):
        return any(_holds_name(inner, name) for inner in value)
    if not isinstance(value, str) or name not in value:
        return False
    # The name itself, in quotes, as a tag or with an opening bracket; not the word in running text.
    quoted = re.escape(name)
    return value.strip().removeprefix(_FUNCTION_PREFIX) == name or bool(
        re.search(rf"[\"'<=.]{quoted}[\"'>\\]|(?<!\w){quoted}\(", value)
    )


def without_namespace(name: str, tools: Iterable[str]) -> str:
    """`functions.f` (Harmony) as `f`, unless a tool of the full name is declared."""
    return name if name in tools else name.removeprefix(_FUNCTION_PREFIX)


def read_channel(message: dict[str, Any], content: str, tools: Iterable[str]) -> dict[str, Any]:
    """What a Harmony message is by its `channel` and `recipient`: keys that replace those of the message.

    analysis is reasoning, a recipient makes a call, commentary without one and final are text. Raises RowError.
    """
    channel, recipient = message.get("channel"), message.get("recipient")
    if channel not in (None, "", "analysis", "commentary", "final"):
        raise RowError(f"has the unknown channel {channel!r}; known are analysis, commentary and final")
    if recipient not in (None, "", "all", "user", "assistant"):
        if not isinstance(recipient, str):
            raise RowError(f"recipient is a JSON {json_type(recipient)}, not text")
        try:
            arguments = strict_json(content) if content.strip() else {}
        except ValueError as error:
            raise RowError(f"is a call of the recipient {recipient}, but its content is not JSON ({error})") from error
        call = {"name": without_namespace(recipient, tools), "arguments": arguments}
        return {"content": "", "tool_calls": [call]}
    if channel == "analysis":
        return {"content": "", "reasoning_content": content}
    return {"content": content}


_FENCE = re.compile(r"```(?:json)?\n(.*)\n```", re.DOTALL)
_NAME_THEN_JSON = re.compile(r"(?P<name>[\w.-]+)\n(?P<arguments>\{.*\})", re.DOTALL)  # GLM-4's chat template


def bare_json_calls(content: str, names: set[str]) -> list[dict[str, Any]]:
    """The calls of a content that is nothing but JSON of one call or of a list of them; [] for another text.

    The JSON may be in a fence; GLM-4 writes a call as the name of a declared tool and a line of arguments.
    """
    if match := _FENCE.fullmatch(content):
        content = match[1].strip()
    match = _NAME_THEN_JSON.fullmatch(content)
    if match and match["name"] in names:
        return [{"name": match["name"], "arguments": match["arguments"]}]
    if content[:1] not in ("{", "["):
        return []
    try:
        value = strict_json(content)
    except ValueError:
        return []
    items = value if isinstance(value, list) else [value]
    known = {"name", "arguments", "parameters", "id", "type"}
    for item in items:
        if not isinstance(item, dict) or not item.keys() <= known or not isinstance(item.get("name"), str):
            return []
        if not ({"arguments", "parameters"} & item.keys()):
            return []
    return items


def same_calls(calls: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether two lists of canonical calls have the same names and arguments, whatever their ids."""
    return [json.dumps(c["function"], sort_keys=True) for c in calls] == [
        json.dumps(c["function"], sort_keys=True) for c in others
    ]
