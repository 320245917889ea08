"""Canonical messages -> turns: parallel calls and texts of several messages become one, results follow their calls."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
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
    runs: list[list[ReadMessage]] = []  # from the last to the first
    has_text = False  # in the run that is being collected
    for item in reversed(read):
        message = item.message
        is_same = bool(runs) and message["role"] == runs[-1][0].message["role"] == "assistant"
        if is_same and not (has_text and message.get("tool_calls")):
            runs[-1].append(item)
        else:
            runs.append([item])
            has_text = False
        has_text = has_text or bool(message["content"])
    return _ordered([_joined(run[::-1], notes) for run in reversed(runs)], notes)


def _is_empty(message: Message) -> bool:
    return not (message["content"] or message.get("tool_calls") or message.get("reasoning_content"))


def _joined(run: list[ReadMessage], notes: Counter) -> ReadMessage:
    """Consecutive assistant messages as one turn; a run of one message as it is."""
    if len(run) == 1:
        return run[0]
    kept = [item for item in run if not _is_empty(item.message)] or run[:1]
    if len(kept) < len(run):
        notes["empty assistant message beside another one removed"] += len(run) - len(kept)
    for first, second in pairwise(kept):
        if first.message.get("train", True) != second.message.get("train", True):
            mark = next(str(item.mark) for item in (first, second) if item.mark and not item.mark.trained)
            raise RowError(
                f"messages {first.number} and {second.number} are one turn, and one turn cannot be trained in part "
                f"({mark}); mark both alike"
            )
    if len(kept) == 1:
        return kept[0]
    messages = [item.message for item in kept]
    texts = [message["content"] for message in messages if message["content"]]
    spoken = next((at for at, message in enumerate(messages) if message["content"] or message.get("tool_calls")), 0)
    behind = sum(bool(message.get("reasoning_content")) for message in messages[spoken + 1 :])
    if any(split_reasoning(text)[0] is not None for text in texts[1:]):  # `<think>` begins a turn
        thoughts, texts = zip(*map(split_reasoning, texts), strict=True)
        texts = ["<think>\n" + "\n\n".join(filter(None, thoughts)) + "\n</think>", *texts]
        behind += 1
    joined: Message = {"role": "assistant", "content": "\n\n".join(text.strip() for text in texts if text.strip())}
    if reasoning := [message["reasoning_content"] for message in messages if message.get("reasoning_content")]:
        joined["reasoning_content"] = "\n\n".join(reasoning)
    if calls := [call for message in messages for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    if "train" in messages[0]:
        joined["train"] = messages[0]["train"]
    if behind:
        notes["reasoning behind the words or calls of a turn put in front of them"] += behind
    notes["assistant messages joined to one turn"] += len(kept) - 1
    return ReadMessage(joined, kept[0].number, next((item.mark for item in kept if item.mark), None))


def _ordered(turns: list[ReadMessage], notes: Counter) -> list[Message]:
    messages: list[Message] = []
    position = 0
    while position < len(turns):
        end = position
        while end < len(turns) and turns[end].message["role"] == "tool":
            end += 1
        results = turns[position:end]
        if results:
            _refuse_results_behind_text(turns[max(position - 2, 0) : position], results)
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
        places = {value: place for place, value in enumerate(called)}
        if len(places) == len(called) and all(value is not None and value in places for value in given):
            return [places[value] for value in given]
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
