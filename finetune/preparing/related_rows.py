"""Rows that belong together: what is a row's own in its request, and rows that continue one conversation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

WINDOW = 20  # characters of the pieces that are looked for in all requests
MIN_SHARED_FRACTION = 0.5  # of the requests; a piece that more of them hold is omitted
MIN_TEXTS = 6  # requests from which a shared piece means something
MAX_SAMPLED = 2000  # requests in which shared pieces are looked for
MAX_SAMPLED_CHARACTERS = 1_000_000
MAX_RUNS = 50  # shared texts that are omitted, long ones first
MIN_OWN_LETTERS = 4  # of a request; with fewer, as where only a number differs, it is compared as a whole


def own_texts(texts: Sequence[str]) -> list[str]:
    """Each request without what most of them share: an instruction, a list of tools, a text to work on."""
    step = max(1, -(-len(texts) // MAX_SAMPLED), sum(map(len, texts)) // MAX_SAMPLED_CHARACTERS)
    runs = _shared_runs(texts[:: min(step, max(1, len(texts) // MIN_TEXTS))])
    if not runs:
        return list(texts)
    result = []
    for text in texts:
        own = text
        for run in runs:
            own = own.replace(run, " ")
        own = " ".join(own.split())
        result.append(own if sum(map(str.isalpha, own)) >= MIN_OWN_LETTERS else text)
    return result


def _shared_runs(texts: Sequence[str]) -> list[str]:
    """The longest texts all of whose pieces are held by most requests; long ones first."""
    if len(texts) < MIN_TEXTS:
        return []
    counts: Counter = Counter()
    for text in texts:
        counts.update({text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)})
    shared = {piece for piece, count in counts.items() if count > MIN_SHARED_FRACTION * len(texts)}
    runs: Counter = Counter()
    for text in texts if shared else ():
        begin = None
        for i in range(len(text) - WINDOW + 2):
            if text[i : i + WINDOW] in shared and i <= len(text) - WINDOW:
                begin = i if begin is None else begin
            elif begin is not None:
                runs[text[begin : i - 1 + WINDOW]] += 1
                begin = None
    return sorted((run for run, _ in runs.most_common(MAX_RUNS)), key=len, reverse=True)


def continued_conversations(conversations: Sequence[dict[str, Any]]) -> list[int]:
    """The conversation of each row, named by the index of its first row.

    A row continues another one whose messages are the first ones of its own, as in logs where each request repeats
    the conversation so far. System messages, ids of calls and reasoning are not compared.
    """
    keys = [_prefix_keys(conversation) for conversation in conversations]
    complete: dict[bytes, int] = {}
    for index, prefixes in enumerate(keys):
        if prefixes:
            complete.setdefault(prefixes[-1], index)
    # Two rows that repeat two answers or more continue one conversation even where its first rows are missing.
    shared: dict[bytes, int] = {}
    groups = Groups(len(keys))
    for index, prefixes in enumerate(keys):
        others = [complete[prefix] for prefix in prefixes if prefix in complete]
        others += [shared.setdefault(prefix, index) for prefix in prefixes[1:-1]]
        for other in others:
            groups.join(index, other)
    return groups.names()


def _prefix_keys(conversation: dict[str, Any]) -> list[bytes]:
    """A hash of the messages up to and including each assistant turn; the last one is of all messages."""
    digest = hashlib.sha256()
    result = []
    messages = [message for message in conversation["messages"] if message["role"] != "system"]
    for number, message in enumerate(messages):
        calls = [call["function"] for call in message.get("tool_calls", ())]
        text = json.dumps([message["role"], message["content"].strip(), calls], sort_keys=True)
        digest.update(text.encode("utf-8") + b"\n")
        ends = number + 1 == len(messages) or messages[number + 1]["role"] == "user"
        if (message["role"] == "assistant" and ends) or number + 1 == len(messages):
            result.append(digest.copy().digest())
    return result


class Groups:
    """Groups of rows, a disjoint-set forest: at first every row is one; a group is named by its smallest index."""

    def __init__(self, count: int):
        self._parent = list(range(count))

    def find(self, row: int) -> int:
        """The name of a row's group."""
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, a: int, b: int) -> None:
        """Make one group of those of two rows."""
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def names(self) -> list[int]:
        """The name of every row's group."""
        return [self.find(row) for row in range(len(self._parent))]
