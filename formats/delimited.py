"""Parses calls of a name, a separator and JSON arguments: in tags (`<call>NAME|{…}</call>`) or on their own lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from formats.base import Parsed
from formats.calls import read_named_call, read_tagged


@dataclass(frozen=True)
class DelimitedCallParser:
    """Parses start + name + separator + JSON object + end; a class, so that it can be pickled.

    end        "": a call begins a line and ends with its arguments
    reasoning  what precedes a text behind the calls ("\\nReasoning: "); "" for none
    """

    start: str
    separator: str
    end: str
    reasoning: str = ""

    def __call__(self, text: str, tools: list[dict] | None = None) -> Parsed:
        start, read_call = self.start, self._read_call
        if not self.end:
            start, read_call, text = "\n" + start.strip(), self._read_line_call, "\n" + text.lstrip()
        parsed = read_tagged(text, start, self.end, read_call)
        if self.reasoning and parsed.tool_calls and not parsed.errors:
            before, _, behind = ("\n" + parsed.content).partition(self.reasoning)
            parsed.content = "\n\n".join(filter(None, (before.strip(), behind.strip())))
            if self.reasoning.strip().startswith(parsed.content):  # an answer that was cut there
                parsed.content = ""
        return parsed

    def _read_call(self, source: str, at: int) -> tuple[dict[str, Any], int]:
        call, end = read_named_call(source, at, self.separator)
        return {**call, "name": call["name"].strip()}, end

    def _read_line_call(self, source: str, at: int) -> tuple[dict[str, Any], int]:
        """White space around the separator may vary where a line has no end of its own."""
        mark = self.separator.strip() or self.separator
        call, end = read_named_call(source, at, mark)
        if "\n" in (name := call["name"].strip()):
            raise ValueError(f"{mark!r} is missing behind the function's name")
        return {**call, "name": name}, end
