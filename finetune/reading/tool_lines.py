"""Calls as lines of an answer: `Tool: NAME`, `Parameters: {…}`, `Reasoning: why`; and the tool that a row names."""

from __future__ import annotations

import re
from typing import Any

from finetune.reading.columns import decoded
from finetune.reading.row_files import RowError, strict_json
from formats.pythonic import read_literal

_LABEL = re.compile(
    r"^[ \t]*(?:[#>-]+[ \t]*)?(?:\*\*|__)?(tool|parameters|reasoning)(?:\*\*|__)?[ \t]*:[ \t]*(?:\*\*|__)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_NOTHING = ("", "none", "null", "n/a", "-")


def split_tool_lines(text: str, names: set[str]) -> tuple[str, list[dict[str, Any]]] | None:
    """(text and reasoning, [{"name", "arguments"}, …]) of an answer that calls by lines; None for any other text.

    `names` are those of the declared tools: only they may omit their parameters. Raises RowError for parameters of a
    declared tool that cannot be read.
    """
    labels = list(_LABEL.finditer(text)) if "tool" in text.lower() else []
    if not any(label[1].lower() == "tool" for label in labels):
        return None
    kinds = [label[1].lower() for label in labels]
    again = {at for at in range(1, len(kinds)) if kinds[at - 1 : at + 1] == ["reasoning"] * 2}  # a part of that text
    labels = [label for at, label in enumerate(labels) if at not in again]
    ends = [label.start() for label in labels[1:]] + [len(text)]
    texts, calls = [text[: labels[0].start()].strip()], []
    for label, end in zip(labels, ends, strict=True):
        kind, value = label[1].lower(), text[label.end() : end].strip()
        if kind == "reasoning":
            texts.append(value)
        elif kind == "tool":
            calls.append({"name": value.strip("`*"), "arguments": None})
        elif not calls or calls[-1]["arguments"] is not None:
            return None  # parameters of no tool, or twice
        else:
            calls[-1]["arguments"] = _arguments(value)
            if calls[-1]["arguments"] is None:
                if calls[-1]["name"] in names:
                    raise RowError(
                        f"calls {calls[-1]['name']}, but its Parameters are not a JSON object: {value[:60]!r}"
                    )
                return None
    if any(not _is_name(call["name"], names) for call in calls):
        return None
    if any(call["arguments"] is None and call["name"] not in names for call in calls):
        return None  # a text that only begins with "Tool:"
    return "\n\n".join(filter(None, texts)), [{**call, "arguments": call["arguments"] or {}} for call in calls]


def _is_name(name: str, names: set[str]) -> bool:
    return name in names or ("\n" not in name and name.lower() not in _NOTHING)


def _arguments(text: str) -> dict[str, Any] | None:
    """The object that a text holds as JSON, in a fence, or as Python writes it; None for another text."""
    if text.startswith("```") and text.endswith("```") and len(text) >= len("``````"):
        text = text[3:-3].removeprefix("json").strip()
    if text.lower() in _NOTHING:
        return {}
    for read in (strict_json, read_literal):
        try:
            value = read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def named_tool(raw: dict[str, Any]) -> str | None:
    """`metadata.tool`: the tool that a row expects."""
    metadata = decoded(raw.get("metadata"))
    name = metadata.get("tool") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) and name else None


def refuse_other_tool(raw: dict[str, Any], conversation: dict[str, Any]) -> None:
    """Raise RowError when `metadata.tool` names a tool, and the row's answers call only others."""
    expected, declared = named_tool(raw), [tool["function"]["name"] for tool in conversation["tools"]]
    if expected is None or (declared and expected not in declared):
        return
    called = [call["function"]["name"] for m in conversation["messages"] for call in m.get("tool_calls", ())]
    if called and expected not in called:
        raise RowError(f"metadata.tool is {expected}, but the answer calls {', '.join(called)}; correct one of them")
