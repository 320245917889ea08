"""Requests from a run's own data, for the page's gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runs.experiment import CONFIG, Experiment

MAX_EXAMPLES = 8
MAX_ROWS = 400  # of each data set that are looked at
MAX_TEXT = 400  # characters of a request that is shown


@dataclass(frozen=True)
class Example:
    """The first request of a row, with the row's tools and system message, and the calls that answer it."""

    text: str
    system: str
    tools: list[dict[str, Any]]
    calls: list[dict[str, Any]]


def examples_of(path: str | Path) -> list[Example]:
    """Requests for different tools out of the held-out rows of a run, else its training rows; [] where it has none."""
    folder = next((one for one in (Path(path), Path(path).parent) if (one / CONFIG).is_file()), None)
    if folder is None:
        return []
    try:
        flags = Experiment.open(folder, entries=("flags",)).config["flags"]
    except UserError:
        return []
    for specs in (flags.get("eval_dataset"), flags.get("dataset")):
        if found := _read([str(spec) for spec in specs or []]):
            return found
    return []


def _read(specs: Sequence[str]) -> list[Example]:
    from finetune.reading.conversations import load_conversations
    from finetune.reading.sources import parse_spec

    by_tool: dict[str, list[Example]] = {}
    for spec in specs:
        try:
            if not parse_spec(spec).path:  # a data set of the Hub: opening a page downloads nothing
                continue
            rows = load_conversations(spec, limit=MAX_ROWS, strict=False).conversations
        except UserError:  # moved or changed since the run: the page works without it
            continue
        for row in rows:
            if example := _example(row):
                by_tool.setdefault(example.calls[0]["name"] if example.calls else "", []).append(example)
    # One of each tool in turn, so that every kind of request is among the few.
    most = max(map(len, by_tool.values()), default=0)
    mixed = [group[index] for index in range(most) for group in by_tool.values() if index < len(group)]
    return list({example.text: example for example in mixed}.values())[:MAX_EXAMPLES]


def _example(row: dict[str, Any]) -> Example | None:
    messages = row["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    if len(turns) < 2 or (turns[0]["role"], turns[1]["role"]) != ("user", "assistant"):
        return None
    text = turns[0]["content"]
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
        return None
    calls = [call["function"] for call in turns[1].get("tool_calls") or []]
    return Example(text, system or "", row.get("tools") or [], calls)
