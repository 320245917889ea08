"""Canonical messages -> turns: parallel calls and texts of several messages become one, results follow their calls."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from finetune.reading.row_files import RowError
from finetune.reading.training_marks import Mark
from formats.base import split_reasoning

Message = dict[str, Any]


class ReadMessage(NamedTuple):
    """A canonical message with its number in the row and its training mark."""

    message: Message
    number: int
    mark: Mark | None = None


def merge_turns(read: list[ReadMessage], notes: Counter) -> list[Message]:
    """The messages with consecutive assistant messages joined to one turn and results in the order of their calls.

    Only text behind a call stays a message of its own, since a turn ends with its calls. Raises RowError when the
    pieces of a turn have different training marks.
    """
    turns: list[ReadMessage] = []  # from the last to the first, so that reasoning joins what is behind it
    for item in reversed(read):
        if turns and _is_one_turn(item.message, turns[-1].message):
            turns[-1] = _joined(item, turns[-1], notes)
        else:
            turns.append(item)
    return _ordered(turns[::-1], notes)


def _is_one_turn(before: Message, after: Message) -> bool:
    return before["role"] == after["role"] == "assistant" and not (before.get("tool_calls") and after["content"])


def _is_empty(message: Message) -> bool:
    return not (message["content"] or message.get("tool_calls") or message.get("reasoning_content"))


def _joined(first: ReadMessage, second: ReadMessage, notes: Counter) -> ReadMessage:
    before, after = first.message, second.message
    if _is_empty(before) or _is_empty(after):
        notes["empty assistant message beside another one removed"] += 1
        return second if _is_empty(before) else first
    if before.get("train", True) != after.get("train", True):
        mark = next(str(item.mark) for item in (first, second) if item.mark and not item.mark.trained)
        raise RowError(
            f"messages {first.number} and {second.number} are one turn, and one turn cannot be trained in part "
            f"({mark}); mark both alike"
        )
    reasoning = [m["reasoning_content"] for m in (before, after) if m.get("reasoning_content")]
    if after.get("reasoning_content") and (before["content"] or before.get("tool_calls")):
        notes["reasoning behind the words or calls of a turn put in front of them"] += 1
    texts = [before["content"], after["content"]]
    if texts[0] and split_reasoning(texts[1])[0] is not None:  # `<think>` begins a turn
        thoughts, texts = zip(*map(split_reasoning, texts), strict=True)
        texts = ["<think>\n" + "\n\n".join(filter(None, thoughts)) + "\n</think>", *texts]
        notes["reasoning behind the words or calls of a turn put in front of them"] += 1
    message: Message = {"role": "assistant", "content": "\n\n".join(text.strip() for text in texts if text.strip())}
    if reasoning:
        message["reasoning_content"] = "\n\n".join(reasoning)
    calls = before.get("tool_calls", []) + after.get("tool_calls", [])
    if calls:
        message["tool_calls"] = calls
    if "train" in before:
        message["train"] = before["train"]
    notes["assistant messages joined to one turn"] += 1
    return ReadMessage(message, first.number, first.mark or second.mark)


def _ordered(turns: list[ReadMessage], notes: Counter) -> list[Message]:
    messages: list[Message] = []
    position = 0
    while position < len(turns):
        end = position
        while end < len(turns) and turns[end].message["role"] == "tool":
            end += 1
        results = turns[position:end]
        if results:
            _refuse_results_behind_text(turns[:position], results)
            calls = turns[position - 1].message.get("tool_calls", []) if position else []
            order = _order(calls, [item.message for item in results])
            if order != sorted(order):
                results = [results[index] for index in sorted(range(len(order)), key=order.__getitem__)]
                notes["tool results put into the order of their calls"] += 1
            messages += [item.message for item in results]
            position = end
        else:
            messages.append(turns[position].message)
            position += 1
    return messages


def _order(calls: list[dict[str, Any]], results: list[Message]) -> list[int]:
    """The index of the call that each result answers, by id or by a name that is called once; [] where unknown."""
    for given, called in (
        ([r.get("tool_call_id") for r in results], [c.get("id") for c in calls]),
        ([r.get("name") for r in results], [c["function"]["name"] for c in calls]),
    ):
        if len(set(called)) == len(called) and all(value is not None and value in called for value in given):
            return [called.index(value) for value in given]
        if any(value is not None for value in given) and any(value is not None for value in called):
            return []  # ids that do not tell it are not overruled by names
    return []


def _refuse_results_behind_text(before: list[ReadMessage], results: list[ReadMessage]) -> None:
    """Raises RowError when the results answer a call in front of the assistant message right before them."""
    if len(before) < 2 or not before[-2].message.get("tool_calls") or before[-1].message["role"] != "assistant":
        return
    last = before[-1].message.get("tool_calls", [])
    earlier = {call.get("id") for call in before[-2].message["tool_calls"]} - {call.get("id") for call in last} - {None}
    answered = [item for item in results if item.message.get("tool_call_id") in earlier]
    if answered or len(results) > len(last):
        raise RowError(
            f"message {(answered or results[len(last) :])[0].number}: a result of the call in message "
            f"{before[-2].number}, but message {before[-1].number} stands between them with text; join the two "
            "messages, or move the result"
        )
