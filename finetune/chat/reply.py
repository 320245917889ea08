"""One answer while it is written and when it is whole: text, reasoning, calls with their faults."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from finetune.json_schema import ToolSchemas
from formats import Parsed, unescape
from formats.escape import MARK
from formats.tokens import added_tokens


@dataclass
class Reply:
    """One whole answer.

    text            what the model wrote, without the end of the turn
    content         the text outside calls; a broken call stays in it
    tool_calls      [{"name", "arguments"}], control tokens of the data given back as they were
    problems        for each call what its tool's schema says against it; empty lists when nothing
    parse_errors    one line for everything that looks like a call and is none
    finish_reason   "stop" or "length"
    """

    text: str
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    problems: list[list[str]] = field(default_factory=list)
    parse_errors: list[str] = field(default_factory=list)
    reasoning_content: str | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def message(self, ids: list[str] | None = None) -> dict[str, Any]:
        """The assistant message of this answer; `ids` name its calls."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            ids = ids or [f"call_{number}" for number in range(1, len(self.tool_calls) + 1)]
            message["tool_calls"] = [
                {"id": name, "type": "function", "function": dict(call)}
                for name, call in zip(ids, self.tool_calls, strict=True)
            ]
        return message

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON line."""
        calls = [call | {"problems": found} for call, found in zip(self.tool_calls, self.problems, strict=True)]
        return {
            "content": self.content,
            "tool_calls": calls,
            "parse_errors": self.parse_errors,
            "text": self.text,
            "finish_reason": self.finish_reason,
            **({"reasoning_content": self.reasoning_content} if self.reasoning_content else {}),
        }


def read_reply(text: str, tools: list[dict], tokenizer: Any, fmt: Any, **measured: Any) -> Reply:
    """Parse a generated turn as evaluation does, and hold its calls against their tools' schemas."""
    parsed: Parsed = unescaped(fmt.parse(text, tools or None), tokenizer, fmt)
    schemas = ToolSchemas(tools)
    return Reply(
        text=text,
        content=parsed.content,
        tool_calls=parsed.tool_calls,
        problems=[schemas.problems(call) for call in parsed.tool_calls],
        parse_errors=parsed.errors,
        reasoning_content=parsed.reasoning_content,
        **measured,
    )


def unescaped(parsed: Parsed, tokenizer: Any, fmt: Any) -> Parsed:
    """The same answer with the control strings of the user's own data as the user wrote them."""
    return Parsed(
        unescape(parsed.content, tokenizer, fmt),
        unescape(parsed.tool_calls, tokenizer, fmt),
        parsed.errors,
        unescape(parsed.reasoning_content, tokenizer, fmt),
    )


class LiveText:
    """Which part of a growing answer may be shown already.

    Text is given out up to the first string that could begin a call, a control token or a reasoning tag; from there
    on everything waits for `finish`, since only the whole turn tells a call from text. What `feed` and `finish` give
    out together is the parsed content: nothing is shown that a later token would take back.
    """

    def __init__(self, tokenizer: Any, fmt: Any, tools: list[dict] | None = None, prompt: str = ""):
        self.tokenizer, self.fmt, self.tools = tokenizer, fmt, tools
        self.text, self.shown = "", ""
        tags = ("<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]")  # read by parsers that do not declare them
        named = {*fmt.call_markers, *fmt.control_tokens, *fmt.end_of_turn, *tags, *added_tokens(tokenizer)}
        self._marks = sorted(mark for mark in named if mark.strip(" \t\r\n\u2581"))
        neutral = [mark[0] + MARK + mark[1:] for mark in self._marks if len(mark) > 1]
        self._beginnings = {mark[:size] for mark in (*self._marks, *neutral) for size in range(1, len(mark))}
        self._longest = max(map(len, self._beginnings), default=0)
        # A prompt that opened the reasoning itself: text is reasoning until it is closed.
        self._thinking = fmt.reasoning and prompt.rstrip().endswith("<think>")

    def feed(self, text: str) -> str:
        """Take more text; returns what can be shown of the content now ("" while a call may be under way)."""
        self.text += text
        if self._thinking and "</think>" not in self.text:
            return ""
        answer = self.text.partition("</think>")[2] if self._reasoned() else self.text
        return self._show(answer.lstrip()[: self._safe(answer.lstrip())])

    def finish(self) -> tuple[str, Parsed]:
        """(the rest of the content, the parsed answer); the turn is over."""
        parsed = unescaped(self.fmt.parse(self.text, self.tools or None), self.tokenizer, self.fmt)
        return self._show(parsed.content, whole=True), parsed

    def _reasoned(self) -> bool:
        head, closing, _ = self.text.partition("</think>")
        return bool(closing) and (self._thinking or head.lstrip().startswith("<think>"))

    def _safe(self, text: str) -> int:
        """How many characters of `text` no later token can turn into a part of a call."""
        if self.fmt.read_calls is not None and text[:1] in ("{", "["):
            return 0  # formats whose whole turn is JSON or a list of calls
        end = min((at for mark in self._marks if (at := text.find(mark)) >= 0), default=len(text))
        if end == len(text):  # the end may be the beginning of a mark
            sizes = range(min(self._longest, len(text)), 0, -1)
            end -= next((size for size in sizes if text[-size:] in self._beginnings), 0)
        return len(text[:end].rstrip())  # the parsed content ends without whitespace

    def _show(self, text: str, whole: bool = False) -> str:
        if not whole:
            text = unescape(text, self.tokenizer, self.fmt)
        # Text that later tokens turned into something else is rather shown twice than lost.
        new = text[len(self.shown) :] if text.startswith(self.shown) else ("\n" + text if whole else "")
        self.shown += new
        return new


def call_line(call: dict[str, Any]) -> str:
    """A call as one line for people: `set_lamp(room="hall", level=3)`."""
    given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in call["arguments"].items())
    return f"{call['name']}({given})"
