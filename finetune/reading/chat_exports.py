"""Rows that are a program's own record of a conversation: Open WebUI, FunctionChat-Bench, Claude Code."""

from __future__ import annotations

from typing import Any

from finetune.reading.columns import decoded
from finetune.reading.row_files import RowError, json_type

# Of an Open WebUI message.
METADATA = ("id", "parentId", "childrenIds", "timestamp", "model", "models", "modelName", "modelIdx", "done", "files")

_NO_HISTORY = {"messages": {}, "currentId": None}


def is_open_webui(chat: Any) -> bool:
    """Whether a `chat` column holds the messages of an Open WebUI export."""
    return isinstance(chat, dict) and ("messages" in chat or isinstance(chat.get("history"), dict))


def open_webui_chat(chat: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """(messages, keys of the chat that are not read and hold something).

    The messages are the branch that was shown last, from `history.currentId` back to its first message; without a
    branch they are those in `messages`.
    """
    history = chat.get("history") if isinstance(chat.get("history"), dict) else {}
    by_id, current = history.get("messages"), history.get("currentId")
    messages, key = chat.get("messages"), "messages"
    if isinstance(by_id, dict) and isinstance(current, str) and current in by_id:
        branch: dict[str, Any] = {}
        while current is not None:
            if not isinstance(current, str) or not isinstance(by_id.get(current), dict) or current in branch:
                raise RowError("the chat's history runs in a circle, or a message of it is missing")
            branch[current] = by_id[current]
            current = by_id[current].get("parentId")
        messages, key = list(branch.values())[::-1], "history"
    if not isinstance(messages, list):
        raise RowError(f"the chat's messages are a JSON {json_type(messages)}, not a list")
    for number, message in enumerate(messages, start=1):
        if isinstance(message, dict) and message.get("files"):
            raise RowError(f"message {number} of the chat has files; only text can be trained")
    unread = [name for name, value in chat.items() if name != key and value not in ("", [], {}, None, _NO_HISTORY)]
    if key == "history":
        if isinstance(chat.get("messages"), list) and same_messages(chat["messages"], messages):
            unread.remove("messages")
        unread += ["other branches"] if len(by_id) > len(messages) else []
    read = [{key: m[key] for key in m if key not in METADATA} if isinstance(m, dict) else m for m in messages]
    return read, unread


def is_function_chat_dialog(turns: Any) -> bool:
    """Whether `turns` are those of FunctionChat-Bench's Dialog."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and isinstance(turn.get("query"), list) for turn in turns)
    )


def function_chat_messages(turns: list[dict[str, Any]]) -> list[Any]:
    """One conversation of turns that each repeat the ones before; each `ground_truth` follows its query."""
    messages: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        query, answer = turn["query"], turn.get("ground_truth")
        if not isinstance(answer, dict):
            raise RowError(f"turn {number} has no message under ground_truth")
        if not same_messages(query[: len(messages)], messages):
            raise RowError(f"turn {number}: its query does not repeat turn {number - 1}; write one row for each turn")
        messages += [*query[len(messages) :], answer]
    return messages


def same_messages(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same messages, apart from ids, empty values and the spelling of keys."""
    return list(map(_essence, some)) == list(map(_essence, others))


def _essence(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = (next((message[k] for k in keys if message.get(k)), "") for keys in (("role", "from"), _TEXTS))
    role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else role
    calls = message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []
    return role, content.strip() if isinstance(content, str) else content, list(map(_call_essence, calls))


def _call_essence(call: Any) -> Any:
    """(name, arguments) of a call, arguments decoded."""
    function = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    if not isinstance(function, dict):
        return function
    return function.get("name"), decoded(function.get("arguments"))


_TEXTS = ("content", "value")


def is_function_chat_single_call(fields: dict[str, Any]) -> bool:
    """Whether query and ground_truth are lists of numbered texts, as in FunctionChat-Bench's SingleCall."""
    query, truth = fields["prompt"], fields["ground_truth"]
    return (
        isinstance(query, list)
        and isinstance(truth, list)
        and bool(query)
        and all(isinstance(item, dict) and "content" in item and "role" not in item for item in [*query, *truth])
    )


def reject_single_call(fields: dict[str, Any]) -> Any:
    """Such a row is several conversations, so it cannot be read as one."""
    raise RowError(
        "query, ground_truth and tools are lists of alternatives (FunctionChat SingleCall); "
        "write one row for each query and tool set"
    )
