"""The conversation at the keyboard, or over a pipe."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.chat.reply import Reply, call_line
from finetune.chat.session import Conversation, Talk, read_tools
from finetune.chat.speaker import BASE
from finetune.errors import UserError
from finetune.json_schema import validator_of
from finetune.models.bundled import cache_dir
from formats import FormatError

HELP = """\
/tools FILE      declare the tools of a JSON file; /tools shows them, /tools none takes them away
/system TEXT     set the system message; /system shows it, /system none takes it away
/result TEXT     the result of the call that waits (at the keyboard you are asked for it)
/base            what the base model answers to the same prompt; it is shown and not kept
/raw             the newest answer exactly as it was generated
/reset           forget the messages; system text and tools stay
/save [FILE]     append the conversation to a JSON Lines file, a row that prepare_data.py reads
/help  /quit
Enter sends. A new line inside a message: Alt+Enter, or a backslash at the end of the line. A message that begins with
a slash: write two."""


class Terminal:
    """Reads messages and commands, shows answers; `console` is a rich console on stdout."""

    def __init__(self, talk: Talk, conversation: Conversation, console: Any, read: Callable[[str], str] | None = None):
        self.talk, self.conversation, self.console = talk, conversation, console
        self.keyboard = sys.stdin.isatty()
        self.read = read or (_keyboard_reader() if self.keyboard else _pipe_reader())
        self.last: Reply | None = None
        self._open_line = False

    def run(self) -> None:
        """Until /quit or the end of the input.

        Ctrl-C at the keyboard stops the answer that is being written, not the program; over a pipe it ends both.
        """
        if self.keyboard:
            self.say(f"{self.talk.speaker.name}, format {self.talk.speaker.fmt.name}; /help lists the commands")
        while True:
            waiting = self.conversation.waiting
            try:
                text = self.read(f"result of {waiting[0][1]['name']} (Enter: none)> " if waiting else "> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.keyboard:
                    raise
                continue
            try:
                with self.conversation.all_or_nothing():
                    if self.heard(text) is False:
                        return
            except (UserError, FormatError) as error:
                self.say(f"error: {error}", style="red")
            except KeyboardInterrupt:
                self._end_line()
                if not self.keyboard:
                    raise
                self.say("stopped; message and answer are not kept")

    def heard(self, text: str) -> bool | None:
        """Do what a line asks for; False ends the conversation."""
        if text.startswith("/") and not text.startswith("//"):
            return self.command(text)
        if self.conversation.waiting and self.keyboard:
            self.given(text)
        elif text.strip():
            self.conversation.say(text.removeprefix("/") if text.startswith("//") else text)
            self.answer()
        return None

    def given(self, text: str) -> None:
        """What the person typed as the result of the first waiting call; nothing leaves all calls without one."""
        if not text.strip():
            self.conversation.waiting = []
            return
        self.conversation.result(text.strip())
        if not self.conversation.waiting:
            self.answer()

    def answer(self) -> None:
        """Let the model answer, and show it as it comes."""
        for made in self.talk.answer(self.conversation, self._stream, self._begin):
            if isinstance(made, Reply):
                self.last = made
                self._end_line()
                self.show_reply(made)
            else:
                self.say(f"  -> {made[1]}", style="cyan")
        if self.talk.tool_command is not None and self.conversation.waiting:
            self.say(f"{self.talk.max_rounds} rounds of calls are over (--max_rounds); the last calls wait", "yellow")

    def show_reply(self, reply: Reply) -> None:
        """Calls, their faults, and everything that could not be read; the text has been shown while it came."""
        for call, problems in zip(reply.tool_calls, reply.problems, strict=True):
            self.say(f"call  {call_line(call)}", style="bold green" if not problems else "bold red")
            for problem in problems:
                self.say(f"      {problem}", style="red")
        for error in reply.parse_errors:
            self.say(f"not a call: {error}", style="red")
        if reply.finish_reason == "length":
            self.say("cut off at --max_new_tokens", style="yellow")
        if not (reply.content or reply.tool_calls or reply.parse_errors):
            self.say("(an empty answer)", style="yellow")

    def command(self, text: str) -> bool | None:
        """Carry out one /command; False ends the conversation."""
        word, _, rest = text[1:].partition(" ")
        rest = rest.strip()
        if word in ("quit", "exit", "q"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP),
            "tools": self._tools,
            "system": self._system,
            "reset": lambda _: (self.conversation.reset(), self.say("a new conversation")),
            "save": self._save,
            "base": lambda _: self._base(),
            "raw": lambda _: self._raw(),
            "result": self._result,
        }
        if word not in commands:
            raise UserError(f"there is no command /{word}; /help lists them")
        commands[word](rest)
        return None

    def _tools(self, rest: str) -> None:
        if rest == "none":
            self.conversation.tools = []
        elif rest:
            self.conversation.tools = read_tools(_path(rest))
        for tool in self.conversation.tools:
            function = tool["function"]
            parameters = function.get("parameters") or {}
            given = parameters.get("properties") or {}
            self.say(f"{function['name']}({', '.join(given)})  {function.get('description', '')}"
                     if isinstance(given, dict) else function["name"])  # fmt: skip
            if reason := validator_of(json.dumps(parameters))[1]:
                self.say(f"      its parameters are no JSON Schema ({reason}); its arguments cannot be checked", "red")
        self.say(f"{len(self.conversation.tools)} tools declared")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = "" if rest == "none" else rest
        self.say(f"system: {self.conversation.system or '(none)'}")

    def _save(self, rest: str) -> None:
        path = self.conversation.save(_path(rest) if rest else Path(time.strftime("chat_%Y%m%d_%H%M%S.jsonl")))
        self.say(f"appended to {path}")

    def _result(self, rest: str) -> None:
        if not rest:
            raise UserError('/result needs the result: /result {"ok": true}')
        self.conversation.result(rest)
        if not self.conversation.waiting:
            self.answer()

    def _base(self) -> None:
        messages = self.conversation.last_prompt()
        self._begin()
        reply = self.talk.speaker.answer(messages, self.conversation.tools, self.talk.decoding, BASE, self._stream)
        self._end_line()
        self.show_reply(reply)

    def _raw(self) -> None:
        if self.last is None:
            raise UserError("nothing has been answered yet")
        self.say(json.dumps(self.last.text, ensure_ascii=False))

    def say(self, text: str, style: str | None = None) -> None:
        """One line from us; what the model, a file or a program wrote is never taken for markup or for control."""
        self.console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)

    def _begin(self) -> None:
        self._open_line = False

    def _stream(self, text: str) -> None:
        self._open_line = True
        self.console.print(printable(text), end="", markup=False, highlight=False, soft_wrap=True)

    def _end_line(self) -> None:
        if self._open_line:
            self.console.print()
        self._open_line = False


def printable(text: str) -> str:
    """Text without control characters: a model must not be able to drive the terminal."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


def _path(text: str) -> Path:
    try:
        words = shlex.split(text) if text[:1] in "\"'" else [text]
    except ValueError as error:
        raise UserError(f"{text}: {error}; close the quotation mark") from error
    return Path(" ".join(words)).expanduser()


def _keyboard_reader() -> Callable[[str], str]:
    """prompt_toolkit: history over sessions, editing, pasted lines as one message. Works on Windows too."""
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; set SANDWICH_CACHE to a folder you may use") from error
    names = ["/" + line.split()[0][1:] for line in HELP.splitlines() if line.startswith("/")]
    session = PromptSession(
        history=FileHistory(str(path)), key_bindings=keys, multiline=True, complete_while_typing=False,
        completer=WordCompleter(names, sentence=True),
    )  # fmt: skip
    return session.prompt


def _pipe_reader() -> Callable[[str], str]:
    """One message a line; a backslash at the end of a line joins the next."""

    def read(_prompt: str) -> str:
        lines = []
        while True:
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError as error:
                raise UserError("what comes over the pipe is not UTF-8 text; convert it first") from error
            if not line:
                if lines:
                    return "\n".join(lines)
                raise EOFError
            line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    return read
