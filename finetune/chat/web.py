"""The same conversation on a page: base and tuned side by side, calls as cards. Built with Gradio."""

from __future__ import annotations

import hmac
import html
import json
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.chat.reply import Reply
from finetune.chat.session import Conversation, Talk, tools_of
from finetune.chat.speaker import BASE, TUNED
from finetune.errors import UserError
from formats import FormatError

PASSWORD = "SANDWICH_WEB_PASSWORD"
log = logging.getLogger("sandwich")


def launch(talk: Talk, system: str, tools: list[dict], host: str, port: int, share: bool = False) -> None:
    """Show the page until Ctrl-C. UserError when gradio is missing or the port is taken."""
    page = open_page(talk, system, tools, host, port, share)
    password = " (a password is asked)" if os.environ.get(PASSWORD) else ""
    log.info("the page is at %s%s; Ctrl-C ends it", page.share_url or f"http://{host}:{port}", password)
    try:
        threading.Event().wait()  # gradio's own wait would end with status 0 and a sentence of its own
    finally:
        page.close(verbose=False)


def open_page(talk: Talk, system: str, tools: list[dict], host: str, port: int, share: bool = False) -> Any:
    """The page, being served by threads of this process; `close()` ends it."""
    page = build_page(talk, system, tools)
    import gradio

    password = os.environ.get(PASSWORD)
    try:
        page.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, inbrowser=False,
            auth=(lambda _user, given: hmac.compare_digest(given.encode(), password.encode())) if password else None,
            auth_message="Any user name will do; the password is the one this page was started with.",
            theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),  # no fonts from elsewhere
            enable_monitoring=False, footer_links=["api"], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on; choose another --port") from error
    return page


def build_page(talk: Talk, system: str = "", tools: list[dict] | None = None) -> Any:
    """The page as gradio.Blocks, not launched yet."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: gradio reads it then
    try:
        import gradio
    except ImportError as error:
        raise UserError("--web needs gradio; run: pip install -r requirements_optional.txt") from error

    sides = [side for side in (BASE, TUNED) if side in talk.speaker.sides]
    answers = _Answers(talk, sides)
    shown = json.dumps(tools, indent=2, ensure_ascii=False) if tools else ""
    with gradio.Blocks(title=f"Sandwich: {talk.speaker.name}", analytics_enabled=False) as page:
        state = gradio.State(None)  # {side: Conversation} of one visitor
        gradio.Markdown(f"### {html.escape(talk.speaker.name)} · format {talk.speaker.fmt.name}")
        with gradio.Row(equal_height=True):
            chats = [gradio.Chatbot(label=_label(side, sides), height=460, layout="panel") for side in sides]
        with gradio.Row():
            message = gradio.Textbox(label="Message", lines=2, scale=5, placeholder="Shift+Enter sends")
            send = gradio.Button("Send", variant="primary", scale=1)
        with gradio.Row(visible=talk.tool_command is None):
            result = gradio.Textbox(label="Result of the call that waits", scale=4, placeholder='{"ok": true}')
            whose = gradio.Radio(sides, value=TUNED, label="called by", scale=1, visible=len(sides) > 1)
            give = gradio.Button("Give the result", scale=1)
        with gradio.Accordion("Tools, system message, decoding", open=False):
            tools_box = gradio.Code(value=shown, language="json", label="Tools (JSON)", lines=8)
            system_box = gradio.Textbox(value=system, label="System message", lines=2)
            temperature = gradio.Slider(
                0, 2, value=talk.decoding.temperature, step=0.05, label="Temperature (0: greedy)"
            )
            longest = gradio.Slider(
                16, 4096, value=talk.decoding.max_new_tokens, step=16, label="Longest answer, tokens"
            )
        with gradio.Row():
            reset = gradio.Button("New conversation")
            save = gradio.DownloadButton("Save as JSON Lines")
        settings = [tools_box, system_box, temperature, longest]
        line = {"concurrency_limit": 1, "concurrency_id": "model"}  # one model: one answer at a time
        asked = [message, state, *settings]
        hidden = {"api_visibility": "private"}  # the same again for the keyboard
        for trigger, named in ((send.click, {"api_name": "ask"}), (message.submit, hidden)):
            trigger(answers.ask, asked, [message, state, *chats], **named, **line)
        given = [result, whose, state, *settings]
        for trigger, named in ((give.click, {"api_name": "give_result"}), (result.submit, hidden)):
            trigger(answers.give_result, given, [result, state, *chats], **named, **line)
        reset.click(lambda: (None, *([] for _ in chats)), None, [state, *chats], api_name="reset")
        save.click(answers.save, [state], [save], api_name="save")
    return page


def _label(side: str, sides: list[str]) -> str:
    return side if len(sides) > 1 else "model"


class _Answers:
    """What the page's buttons do; all of a visitor's state is in `state`, one Conversation for each side."""

    def __init__(self, talk: Talk, sides: list[str]):
        self.talk, self.sides = talk, sides

    def ask(
        self, text: str, state: dict | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """A message to every side; yields (message box, state, one list of chat messages for each side)."""
        state = self._set(state, tools, system)
        if not text.strip():
            raise _shown("write a message first")
        for side in self.sides:
            with state[side].all_or_nothing():
                state[side].say(text)
                yield from self._answer(side, state, temperature, longest)

    def give_result(
        self, text: str, side: str, state: dict | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """The result of the first call that waits on one side; when none is left, that side answers."""
        state = self._set(state, tools, system)
        side = side if side in state else self.sides[-1]
        try:
            with state[side].all_or_nothing():
                state[side].result(text.strip())
                yield "", state, *self._views(state)
                if not state[side].waiting:
                    yield from self._answer(side, state, temperature, longest)
        except UserError as error:
            raise _shown(str(error)) from error

    def save(self, state: dict | None) -> str:
        """A file with the tuned side's conversation as a row."""
        if not state:
            raise _shown("there is nothing to save yet")
        folder = Path(tempfile.mkdtemp(prefix="sandwich_chat_"))
        return str(state[self.sides[-1]].save(folder / time.strftime("chat_%Y%m%d_%H%M%S.jsonl")))

    def _set(self, state: dict | None, tools: str, system: str) -> dict[str, Conversation]:
        try:
            declared = tools_of(tools) if tools and tools.strip() else []
        except UserError as error:
            raise _shown(str(error)) from error
        state = state or {side: Conversation() for side in self.sides}
        for conversation in state.values():
            conversation.tools, conversation.system = declared, system or ""
        return state

    def _answer(self, side: str, state: dict, temperature: float, longest: float) -> Iterator[tuple]:
        conversation = state[side]
        decoding = replace(self.talk.decoding, temperature=float(temperature), max_new_tokens=int(longest))
        talk = replace(self.talk, side=side, decoding=decoding)
        try:
            for text in streamed(talk, conversation):
                views = self._views(state)
                if text is not None:  # an answer under way
                    views[self.sides.index(side)].append({"role": "assistant", "content": text or "…"})
                yield "", state, *views
        except (UserError, FormatError) as error:
            raise _shown(str(error)) from error

    def _views(self, state: dict[str, Conversation]) -> list[list[dict]]:
        return [chat_messages(state[side]) for side in self.sides]


def _shown(text: str) -> Exception:
    import gradio

    return gradio.Error(html.escape(text), print_exception=False)


def streamed(talk: Talk, conversation: Conversation) -> Iterator[str | None]:
    """Answer in a thread; yields the text of the answer so far as it grows, and None when a turn was added."""
    news: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            for _ in talk.answer(conversation, news.put, lambda: news.put("")):
                news.put(None)
            news.put(StopIteration())
        except BaseException as error:  # handed over to the page
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    text = ""
    while not isinstance(item := news.get(), BaseException):
        text = "" if item is None else text + item
        yield None if item is None else text
    if not isinstance(item, StopIteration):
        raise item


def chat_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation for gradio's Chatbot: calls, their results and what could not be read are cards."""
    shown: list[dict[str, Any]] = []
    for index, turn in enumerate(conversation.turns):
        if turn["role"] == "tool":
            shown.append(_card(f"result of {turn.get('name', 'a call')}", _fenced(turn["content"])))
        elif turn["role"] == "assistant":
            shown += _reply_messages(conversation.replies[index])
        else:
            shown.append({"role": turn["role"], "content": turn["content"]})
    return shown


def _reply_messages(reply: Reply) -> Iterator[dict[str, Any]]:
    if reply.reasoning_content:
        yield _card("reasoning", reply.reasoning_content, closed=True)
    if reply.content and not reply.parse_errors:
        yield {"role": "assistant", "content": reply.content}
    for call, problems in zip(reply.tool_calls, reply.problems, strict=True):
        verdict = "".join(f"\n\n✗ {problem}" for problem in problems) or "\n\n✓ arguments fit the schema"
        arguments = _fenced(json.dumps(call["arguments"], indent=2, ensure_ascii=False), "json")
        yield _card(f"call: {call['name']}", arguments + verdict)
    for error in reply.parse_errors:
        # As code: a browser would take the call's tags for unknown elements and show nothing of them.
        yield _card("not a call", f"{error}\n\n{_fenced(reply.text)}")
    if reply.finish_reason == "length":
        yield _card("cut off", "the answer reached its longest length")
    if not (reply.content or reply.tool_calls or reply.parse_errors):
        yield _card("an empty answer", "the model ended its turn at once")


def _card(title: str, body: str, closed: bool = False) -> dict[str, Any]:
    metadata = {"title": title, **({"status": "done"} if closed else {})}  # to gradio "done" means folded up
    return {"role": "assistant", "content": body, "metadata": metadata}


def _fenced(text: str, language: str = "") -> str:
    """A Markdown code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
