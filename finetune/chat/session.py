"""A conversation with its tools and pending calls, and the loop that answers it and executes calls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.chat.model import TUNED, ChatModel
from finetune.chat.reply import Reply
from finetune.chat.tool_command import failure
from finetune.errors import UserError, user_errors
from finetune.files import json_line

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding


class ToolResult(NamedTuple):
    """A call ({"name", "arguments"}) that was executed, and its result."""

    call: dict[str, Any]
    result: str


@dataclass
class ChatSession:
    """The messages of a conversation, its tools, and the calls of the last reply that have no result yet.

    turns    messages without the system message
    pending  (id, {"name", "arguments"}, problems) of every call without a result
    replies  the Reply of every assistant message, by its index in `turns`
    """

    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    pending: list[tuple[str, dict[str, Any], list[str]]] = field(default_factory=list)
    replies: dict[int, Reply] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def add_user(self, text: str) -> None:
        """Append a user message; pending calls are dropped."""
        self.pending = []
        self.turns.append({"role": "user", "content": text})

    def add_reply(self, reply: Reply) -> None:
        """Append an answer; its calls become pending. Their ids are unique within the conversation."""
        made = sum(len(turn.get("tool_calls", ())) for turn in self.turns)
        ids = [f"call_{made + number}" for number in range(1, len(reply.tool_calls) + 1)]
        self.replies[len(self.turns)] = reply
        self.turns.append(reply.message(ids))
        self.pending = list(zip(ids, reply.tool_calls, reply.problems, strict=True))

    def add_result(self, text: str) -> ToolResult:
        """Append the result of the first pending call. UserError when no call is pending."""
        if not self.pending:
            raise UserError("no call is waiting for a result")
        name, call, _ = self.pending.pop(0)
        self.turns.append({"role": "tool", "tool_call_id": name, "name": call["name"], "content": text})
        return ToolResult(call, text)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Restore the conversation when the block fails: no message is kept without its answer."""
        before = list(self.turns), list(self.pending), dict(self.replies)
        try:
            yield
        except BaseException:  # a closed page ends the answer with GeneratorExit
            self.turns, self.pending, self.replies = before
            raise

    def reset(self) -> None:
        """Delete the messages; system message and tools stay."""
        self.turns, self.pending, self.replies = [], [], {}

    def last_prompt(self) -> list[dict[str, Any]]:
        """The messages before the last answer. UserError when there is none."""
        if not self.replies:
            raise UserError("nothing has been answered yet")
        return self.messages[: max(self.replies) - len(self.turns)]

    def save(self, path: str | Path) -> Path:
        """Append the conversation to a JSON Lines file as a row of a data set; UserError when that fails."""
        path = Path(path)
        if not self.turns:
            raise UserError("there is nothing to save yet")
        row = {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}
        with user_errors(f"cannot write {path}", "choose another file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")  # end an incomplete last line
                file.write(json_line(row).encode("utf-8"))
        return path


@dataclass
class ChatAgent:
    """Answers conversations: the model, its decoding, and the function that executes calls ({"name", "arguments"})."""

    model: ChatModel
    decoding: Decoding
    tool_command: Callable[[dict[str, Any]], str] | None = None
    max_rounds: int = 5
    side: str = TUNED

    def answer(self, session: ChatSession) -> Iterator[str | Reply | ToolResult]:
        """Answer a conversation: yields pieces of content, then the Reply they belong to, and the results of its calls.

        With a tool command, results are answered again, up to `max_rounds` times; the calls after that stay pending.
        """
        for rounds in range(self.max_rounds + 1):
            for event in self.model.stream(session.messages, session.tools, self.decoding, self.side):
                if isinstance(event, Reply):
                    session.add_reply(event)
                yield event
            if self.tool_command is None or not session.pending or rounds == self.max_rounds:
                return
            while session.pending:
                _, call, problems = session.pending[0]
                # A call that does not fit its schema is not executed.
                yield session.add_result(failure("; ".join(problems)) if problems else self.tool_command(call))
