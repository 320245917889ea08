"""One answer: its text, reasoning and calls, and which part of an incomplete answer can be shown."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.json_schema import ToolSchemas
from formats import Format, Parsed, unescape
from formats.escape import MARK
from formats.tokens import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FIRST_WORD = re.compile(r"[\[{][\s\[{\"']*[\w.-]*")  # of JSON or a list that may become a call


@dataclass
class Reply:
    """A complete answer.

    text            what the model generated, without the end of the turn
    content         the text outside calls; it includes calls that cannot be read, unless the answer was cut in one
    tool_calls      [{"name", "arguments"}], with control tokens of the user's data restored
    problems        for each call the violations of its tool's schema
    parse_errors    one line for everything that looks like a call and cannot be read
    finish_reason   "stop" or "length"
    seconds         from the request to the end of the answer, where it was measured
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

    def message(self, ids: list[str]) -> dict[str, Any]:
        """The assistant message; `ids` are those of its calls."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": name, "type": "function", "function": dict(call)}
                for name, call in zip(ids, self.tool_calls, strict=True)
            ]
        return message

    def as_json(self) -> dict[str, Any]:
        """The answer as a line of JSON Lines."""
        calls = [call | {"problems": found} for call, found in zip(self.tool_calls, self.problems, strict=True)]
        return {
            "content": self.content,
            "tool_calls": calls,
            "parse_errors": self.parse_errors,
            "text": self.text,
            "finish_reason": self.finish_reason,
            **({"reasoning_content": self.reasoning_content} if self.reasoning_content else {}),
        }


def read_reply(text: str, tools: list[dict], tokenizer: PreTrainedTokenizerBase, fmt: Format, **measured: Any) -> Reply:
    """Parse a generated turn as the evaluation does and check its calls against their tools' schemas.

    measured  finish_reason, prompt_tokens and new_tokens of the Reply
    """
    parsed = parsed_answer(text, tools, tokenizer, fmt, is_cut=measured.get("finish_reason") == "length")
    schemas = ToolSchemas(tools)
    return Reply(
        text=unescape(text, tokenizer, fmt),
        content=parsed.content,
        tool_calls=parsed.tool_calls,
        problems=[schemas.problems(call) for call in parsed.tool_calls],
        parse_errors=parsed.errors,
        reasoning_content=parsed.reasoning_content,
        **measured,
    )


def parsed_answer(
    text: str, tools: list[dict] | None, tokenizer: PreTrainedTokenizerBase, fmt: Format, *, is_cut: bool
) -> Parsed:
    """A generated turn as its format reads it; if it reached its maximum length, without a half call."""
    parsed = fmt.parse(text, tools or None)
    if is_cut and fmt.read_calls is not None:
        parsed.content = LiveText(tokenizer, fmt).before_half_call(parsed, has_tools=bool(tools))
    return unescaped(parsed, tokenizer, fmt)


def unescaped(parsed: Parsed, tokenizer: PreTrainedTokenizerBase, fmt: Format) -> Parsed:
    """The same answer with the control tokens of the user's data restored."""
    return Parsed(
        unescape(parsed.content, tokenizer, fmt),
        unescape(parsed.tool_calls, tokenizer, fmt),
        parsed.errors,
        unescape(parsed.reasoning_content, tokenizer, fmt),
    )


class LiveText:
    """The part of an incomplete answer that can be shown.

    Text is released up to the first string that may begin a call, a control token or a reasoning tag; the rest waits
    for `finish`, because only the complete turn tells a call from text. The pieces that `feed` and `finish` return add
    up to the parsed content.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, fmt: Format, tools: list[dict] | None = None, prompt: str = ""
    ):
        self.tokenizer, self.fmt, self.tools = tokenizer, fmt, tools
        self.text, self.shown = "", ""
        tags = (
            "<think>",
            "</think>",
            "<|python_tag|>",
            "[TOOL_CALLS]",
        )  # read by parsers that do not declare them
        named = {*fmt.call_markers, *fmt.control_tokens, *fmt.end_of_turn, *tags, *added_tokens(tokenizer)}
        self._marks = sorted(mark for mark in named if mark.strip(" \t\r\n\u2581"))
        escaped = [mark[0] + MARK + mark[1:] for mark in self._marks if len(mark) > 1]
        self._beginnings = {mark[:size] for mark in (*self._marks, *escaped) for size in range(1, len(mark))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._thinking = fmt.reasoning and prompt.rstrip().endswith("<think>")  # the prompt opened the reasoning

    def feed(self, text: str) -> str:
        """Append text; returns the content that can be shown now ("" while it may be a call)."""
        self.text += text
        head, closing, answer = self.text.partition("</think>")
        if not closing and self._thinking:
            return ""
        if not (closing and (self._thinking or head.lstrip().startswith("<think>"))):
            answer = self.text
        answer = answer.lstrip()
        return self._show(unescape(answer[: self._safe_length(answer)], self.tokenizer, self.fmt))

    def finish(self, is_cut: bool = False) -> tuple[str, Parsed]:
        """End the turn; returns (the rest of the content, the parsed answer)."""
        parsed = parsed_answer(self.text, self.tools, self.tokenizer, self.fmt, is_cut=is_cut)
        # Rather show text twice than not at all, should the parser read it differently.
        return self._show(parsed.content) if parsed.content.startswith(self.shown) else "\n" + parsed.content, parsed

    def _safe_length(self, text: str) -> int:
        """The number of characters of `text` that no later token can make a part of a call."""
        if self.fmt.read_calls is not None and text[:1] in ("{", "["):
            return 0  # the complete turn is JSON or a list of calls
        text = "\n" + text  # a mark may be the beginning of a line
        end = min((at for mark in self._marks if (at := text.find(mark)) >= 0), default=self._before_beginning(text))
        return max(0, len(text[:end].rstrip()) - 1)  # the parsed content ends without whitespace

    def _before_beginning(self, text: str) -> int:
        """The length of `text` without the beginning of a mark at its end."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return len(text) - next((size for size in sizes if text[-size:] in self._beginnings), 0)

    def before_half_call(self, parsed: Parsed, *, has_tools: bool) -> str:
        """The content of a cut answer up to a call that is not complete."""
        content = parsed.content
        if content[:1] in ("{", "["):
            is_call = has_tools and (parsed.errors or _FIRST_WORD.fullmatch(content))
            return "" if is_call else content
        content = "\n" + content
        marks = [at for mark in self._marks if parsed.errors and (at := content.find(mark)) >= 0]
        return content[: min([*marks, self._before_beginning(content)])].strip()

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :] if text.startswith(self.shown) else ""
        self.shown += new
        return new


def call_line(call: dict[str, Any]) -> str:
    """A call as one line: `set_lamp(room="hall", level=3)`."""
    given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in call["arguments"].items())
    return f"{call['name']}({given})"
