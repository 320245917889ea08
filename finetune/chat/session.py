"""The state of one conversation: messages, tools, calls that wait for their result."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.reply import Reply
from finetune.chat.speaker import TUNED, Speaker
from finetune.chat.tool_command import ToolCommand, failure
from finetune.errors import UserError
from finetune.files import json_line
from formats.calls import MAX_JSON_DEPTH, json_depth, reject_lone_surrogates

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding


@dataclass
class Conversation:
    """Messages in the order they came, the tools declared, and the newest answer's calls without a result.

    `waiting` holds (id, {"name", "arguments"}, problems) of them, `replies` each Reply by its number in `turns`.
    """

    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[tuple[str, dict[str, Any], list[str]]] = field(default_factory=list)
    replies: dict[int, Reply] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> None:
        """A user's message; calls that wait get no result any more."""
        self.waiting = []
        self.turns.append({"role": "user", "content": text})

    def take(self, reply: Reply) -> None:
        """An answer; its calls wait for their results. Ids are unique within the conversation."""
        made = sum(len(turn.get("tool_calls", ())) for turn in self.turns)
        ids = [f"call_{made + number}" for number in range(1, len(reply.tool_calls) + 1)]
        self.replies[len(self.turns)] = reply
        self.turns.append(reply.message(ids))
        self.waiting = list(zip(ids, reply.tool_calls, reply.problems, strict=True))

    def result(self, text: str) -> dict[str, Any]:
        """The result of the first waiting call; returns that call. UserError when none waits."""
        if not self.waiting:
            raise UserError("no call waits for a result")
        name, call, _ = self.waiting.pop(0)
        self.turns.append({"role": "tool", "tool_call_id": name, "name": call["name"], "content": text})
        return call

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A with block after whose failure the conversation stands as before: no message without its answer."""
        before = list(self.turns), list(self.waiting), dict(self.replies)
        try:
            yield
        except (Exception, KeyboardInterrupt):
            self.turns, self.waiting, self.replies = before
            raise

    def reset(self) -> None:
        """Forget the messages; system text and tools stay."""
        self.turns, self.waiting, self.replies = [], [], {}

    def last_prompt(self) -> list[dict[str, Any]]:
        """The messages in front of the newest answer. UserError before the first one."""
        at = max((i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"), default=None)
        if at is None:
            raise UserError("nothing has been answered yet")
        return self.messages[: at + len(self.messages) - len(self.turns)]

    def as_row(self) -> dict[str, Any]:
        """The conversation as a row of a data set."""
        return copy.deepcopy({"messages": self.messages, **({"tools": self.tools} if self.tools else {})})

    def save(self, path: str | Path) -> Path:
        """Append the row to a JSON Lines file, which may hold others; UserError when that cannot be done."""
        path = Path(path)
        if not self.turns:
            raise UserError("there is nothing to save yet")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    cut_off = file.read(1) != b"\n"  # a file whose last line was never ended
                    file.seek(0, 2)
                    file.write(b"\n" if cut_off else b"")
                file.write(json_line(self.as_row()).encode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error
        return path


@dataclass
class Talk:
    """What answering needs besides the conversation: who answers, how, and who carries out calls."""

    speaker: Speaker
    decoding: Decoding
    tool_command: ToolCommand | None = None
    max_rounds: int = 5
    side: str = TUNED

    def answer(
        self,
        conversation: Conversation,
        on_text: Callable[[str], None] | None = None,
        on_round: Callable[[], None] | None = None,
    ) -> Iterator[Reply | tuple[dict[str, Any], str]]:
        """Answer the conversation as it stands; yields each Reply, and (call, result) of every call carried out.

        With a tool command, results are answered again, at most `max_rounds` times; calls that are left then wait.
        `on_round()` is called before each answer is computed.
        """
        for rounds in range(self.max_rounds + 1):
            if on_round:
                on_round()
            reply = self.speaker.answer(conversation.messages, conversation.tools, self.decoding, self.side, on_text)
            conversation.take(reply)
            yield reply
            if self.tool_command is None or not conversation.waiting or rounds == self.max_rounds:
                return
            while conversation.waiting:
                _, call, problems = conversation.waiting[0]
                # A call that its schema refuses is told so and never reaches the program.
                result = failure("; ".join(problems)) if problems else self.tool_command(call)
                yield conversation.result(result), result


def read_tools(path: str | Path) -> list[dict[str, Any]]:
    """Tools of a JSON file: a list in any usual spelling, {"tools": […]}, or the first row of a JSON Lines file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"tools {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"tools {path}: not UTF-8 text") from error
    if not (tools := tools_of(text, str(path))):
        raise UserError(f"tools {path}: no tool is declared in it")
    return tools


def tools_of(text: str, where: str = "tools") -> list[dict[str, Any]]:
    """The same from text that is already there; UserError names the tool that cannot be read."""
    from finetune.reading.row_files import strict_json
    from finetune.reading.tool_schemas import normalize_tools

    try:
        value = strict_json(text)
    except ValueError as error:
        try:
            value = strict_json(text.lstrip().partition("\n")[0])  # a data set: the tools of its first row
        except ValueError:
            place = f"{error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: no JSON ({place}); give a list of tools") from error
    if isinstance(value, dict) and "tools" in value:
        value = value["tools"]
    try:
        tools = normalize_tools(value)
        reject_lone_surrogates(tools)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if json_depth(tools) > MAX_JSON_DEPTH:
        raise UserError(f"{where}: nested deeper than {MAX_JSON_DEPTH} levels")
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise UserError(f"{where}: two tools have the same name")
    return tools
