"""The conversation in the terminal or over a pipe."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat.model import BASE
from finetune.chat.reply import Reply, call_line
from finetune.chat.session import ChatAgent, ChatSession, ToolResult
from finetune.errors import UserError, user_errors
from finetune.json_schema import validator_of
from finetune.models.bundled import cache_dir
from finetune.progress import counted, printable
from finetune.reading.tool_schemas import load_tools_file
from formats import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

HELP = """\
/tools FILE      declare the tools of a JSON file; /tools shows them, /tools none removes them
/system TEXT     set the system message; /system shows it, /system none removes it
/result TEXT     the result of the pending call (at the keyboard you are asked for it)
/base            the base model's answer to the same prompt; it is shown but not kept
/raw             the last answer exactly as it was generated
/reset           delete the messages; system message and tools stay
/save [FILE]     append the conversation to a JSON Lines file, as a row that prepare_data.py reads
/help  /quit     a message that is only quit or exit ends the chat too
Enter sends. For a new line inside a message press Alt+Enter, or end the line with a backslash. If a message begins
with a slash, write two."""


LEAVING = ("quit", "exit")


class Terminal:
    """Reads messages and commands and shows answers; `console` writes to stdout."""

    def __init__(
        self, agent: ChatAgent, session: ChatSession, console: Console, read: Callable[[str], str] | None = None
    ):
        self.agent, self.session, self.console = agent, session, console
        self.keyboard = sys.stdin.isatty()
        self.read = read or (_keyboard_reader() if self.keyboard else _read_pipe)
        self.last: Reply | None = None

    def run(self) -> None:
        """Read until /quit, a bare quit or exit, or the end of the input.

        Ctrl-C stops the current answer; over a pipe it also ends the program.
        """
        if self.keyboard:
            self.say(f"{self.agent.model.name}, format {self.agent.model.fmt.name}; /help lists the commands")
        while True:
            pending = self.session.pending
            try:
                text = self.read(f"result of {pending[0][1]['name']} (Enter: none)> " if pending else "> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.keyboard:
                    raise
                continue
            if text.split(" ")[0] in ("/quit", "/exit", "/q") or text.strip().lower() in LEAVING:
                return
            try:
                with self.session.transaction():
                    self.handle(text)
            except (UserError, FormatError) as error:
                self.say(f"error: {error}", style="red")
            except KeyboardInterrupt:
                if not self.keyboard:
                    raise
                self.say("stopped; the message and its answer are not kept")

    def handle(self, text: str) -> None:
        """Execute a command, or answer a message or a result."""
        if text.startswith("/") and not text.startswith("//"):
            self._command(text)
        elif self.session.pending and self.keyboard:
            if text.strip():
                self._result(text.strip())
            else:
                self.session.pending = []
        elif text.strip():
            self.session.add_user(text.removeprefix("/") if text.startswith("//") else text)
            self._answer()

    def _answer(self) -> None:
        self._show(self.agent.answer(self.session))
        self.last = self.session.replies[max(self.session.replies)]
        if self.agent.tool_command is not None and self.session.pending:
            self.say(f"the last calls are pending: --max_rounds is {self.agent.max_rounds}", style="yellow")

    def _show(self, events: Iterable[str | Reply | ToolResult]) -> None:
        line_open = False
        try:
            for event in events:
                if isinstance(event, str):
                    line_open = True
                    self.say(event, end="")
                    continue
                if line_open:
                    self.console.print()
                    line_open = False
                if isinstance(event, Reply):
                    self._show_reply(event)
                else:
                    self.say(f"  -> {event.result}", style="cyan")
        finally:
            if line_open:
                self.console.print()

    def _show_reply(self, reply: Reply) -> None:
        """Calls, their problems and parse errors; the text has been shown already."""
        for call, problems in zip(reply.tool_calls, reply.problems, strict=True):
            self.say(f"call  {call_line(call)}", style="bold green" if not problems else "bold red")
            for problem in problems:
                self.say(f"      {problem}", style="red")
        for error in reply.parse_errors:
            self.say(f"not a call: {error}", style="red")
        if reply.finish_reason == "length":
            self.say("cut off at its maximum length (--max_new_tokens)", style="yellow")
        if not (reply.content or reply.tool_calls or reply.parse_errors):
            self.say("(an empty answer)", style="yellow")

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP),
            "tools": self._tools,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "base": self._base,
            "raw": self._raw,
            "result": self._result,
        }
        if name not in commands:
            raise UserError(f"unknown command /{name}; /help lists the commands")
        commands[name](rest.strip())

    def _tools(self, rest: str) -> None:
        if rest:
            self.session.tools = [] if rest == "none" else load_tools_file(_path(rest))
        for tool in self.session.tools:
            function = tool["function"]
            parameters = function.get("parameters") or {}
            names = parameters.get("properties") or {}
            self.say(
                f"{function['name']}({', '.join(names)})  {function.get('description', '')}"
                if isinstance(names, dict)
                else function["name"]
            )
            if reason := validator_of(json.dumps(parameters))[1]:
                self.say(f"      not checked: its parameters are not a JSON Schema ({reason})", style="red")
        self.say(f"{counted(len(self.session.tools), 'tool')} declared")

    def _system(self, rest: str) -> None:
        if rest:
            self.session.system = "" if rest == "none" else rest
        self.say(f"system: {self.session.system or '(none)'}")

    def _reset(self, _rest: str) -> None:
        self.session.reset()
        self.say("a new conversation")

    def _save(self, rest: str) -> None:
        path = self.session.save(_path(rest) if rest else Path(time.strftime("chat_%Y%m%d_%H%M%S.jsonl")))
        self.say(f"appended to {path}")

    def _result(self, rest: str) -> None:
        if not rest:
            raise UserError('/result needs the result: /result {"ok": true}')
        self.session.add_result(rest)
        if not self.session.pending:
            self._answer()

    def _base(self, _rest: str) -> None:
        messages = self.session.last_prompt()
        self._show(self.agent.model.stream(messages, self.session.tools, self.agent.decoding, BASE))

    def _raw(self, _rest: str) -> None:
        if self.last is None:
            raise UserError("nothing has been answered yet")
        self.say(json.dumps(self.last.text, ensure_ascii=False))

    def say(self, text: str, style: str | None = None, end: str = "\n") -> None:
        """Print text that may come from a model, a file or a program: no markup, no control characters."""
        self.console.print(printable(text), style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def _path(text: str) -> Path:
    try:
        parts = shlex.split(text) if text[:1] in "\"'" else [text]
    except ValueError as error:
        raise UserError(f"{text}: {error}; close the quotation mark") from error
    return Path(" ".join(parts)).expanduser()


def _keyboard_reader() -> Callable[[str], str]:
    """A reader with history and editing, where a pasted text is one message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.insert_text("\n")

    path = cache_dir() / "chat_history"
    with user_errors(f"cannot write {path}", "set SANDWICH_CACHE to a writable folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    names = ["/" + line.split()[0][1:] for line in HELP.splitlines() if line.startswith("/")]
    session = PromptSession(
        history=FileHistory(str(path)), key_bindings=keys, multiline=True, complete_while_typing=False,
        completer=WordCompleter(names, sentence=True),
    )  # fmt: skip
    return session.prompt


def _read_pipe(_prompt: str) -> str:
    """The next message on stdin: one line, or several that end with a backslash."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("the input is not UTF-8 text; convert it first") from error
        if not line and not lines:
            raise EOFError
        if not line:
            break
        lines.append(line.rstrip("\r\n"))
    return "\n".join(line.removesuffix("\\") for line in lines)
