"""The conversation on a web page: base and tuned side by side, calls as cards. Built with Gradio."""

from __future__ import annotations

import hmac
import html
import itertools
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.guard import Access, Guard
from finetune.chat.model import BASE, TUNED
from finetune.chat.reply import Reply
from finetune.chat.session import ChatAgent, ChatSession, parse_tools
from finetune.errors import UserError
from formats import FormatError

if TYPE_CHECKING:
    import gradio

PASSWORD_VARIABLE = "SANDWICH_WEB_PASSWORD"
log = logging.getLogger("sandwich")


def launch(agent: ChatAgent, system: str, tools: list[dict], host: str, port: int, share: bool = False) -> None:
    """Serve the page until Ctrl-C. UserError when gradio is missing or the port is in use."""
    page = open_page(agent, system, tools, host, port, share)
    password = " (with a password)" if os.environ.get(PASSWORD_VARIABLE) else ""
    log.info("the page is at %s%s; stop with Ctrl-C", page.share_url or f"http://{host}:{port}", password)
    try:
        threading.Event().wait()  # gradio's own wait would catch Ctrl-C and end with status 0
    finally:
        page.close(verbose=False)


def open_page(
    agent: ChatAgent, system: str, tools: list[dict], host: str, port: int, share: bool = False
) -> gradio.Blocks:
    """The page, served by threads of this process until its `close()`."""
    page = build_page(agent, system, tools)
    import gradio
    from starlette.middleware import Middleware

    password = os.environ.get(PASSWORD_VARIABLE)
    access = Access(host, tunnel=share, form_paths=("/login", "/login/"))
    try:
        page.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, inbrowser=False,
            auth=(lambda _user, given: hmac.compare_digest(given.encode(), password.encode())) if password else None,
            auth_message="Any user name; the password that this page was started with.",
            theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),  # no downloads
            app_kwargs={"middleware": [Middleware(Guard, access=access)]},
            enable_monitoring=False, footer_links=["api"], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}; choose another --port") from error
    return page


def build_page(agent: ChatAgent, system: str = "", tools: list[dict] | None = None) -> gradio.Blocks:
    """The page, not launched yet."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio

    sides = [side for side in (BASE, TUNED) if side in agent.model.sides]
    handlers = _Handlers(agent, sides)
    shown = json.dumps(tools, indent=2, ensure_ascii=False) if tools else ""
    with gradio.Blocks(title=f"Sandwich: {agent.model.name}", analytics_enabled=False) as page:
        state = gradio.State(None)  # {side: ChatSession} of one visitor
        gradio.Markdown(f"### {as_text(agent.model.name)} · format {as_text(agent.model.fmt.name)}")
        with gradio.Row(equal_height=True):
            labels = sides if len(sides) > 1 else ["model"]
            chats = [gradio.Chatbot(label=label, height=460, layout="panel") for label in labels]
        with gradio.Row():
            message = gradio.Textbox(label="Message", lines=2, scale=5, placeholder="Shift+Enter sends")
            send = gradio.Button("Send", variant="primary", scale=1)
        with gradio.Row(visible=agent.tool_command is None):
            result = gradio.Textbox(label="Result of the pending call", scale=4, placeholder='{"ok": true}')
            whose = gradio.Radio(sides, value=TUNED, label="called by", scale=1, visible=len(sides) > 1)
            give = gradio.Button("Give the result", scale=1)
        with gradio.Accordion("Tools, system message, decoding", open=False):
            tools_box = gradio.Code(value=shown, language="json", label="Tools (JSON)", lines=8)
            system_box = gradio.Textbox(value=system, label="System message", lines=2)
            decoding = agent.decoding
            temperature = gradio.Slider(0, 2, value=decoding.temperature, step=0.05, label="Temperature (0: greedy)")
            longest = gradio.Slider(16, 4096, value=decoding.max_new_tokens, step=16, label="Longest answer, tokens")
        with gradio.Row():
            reset = gradio.Button("New conversation")
            save = gradio.DownloadButton("Save as JSON Lines")
        settings = [tools_box, system_box, temperature, longest]
        queue = {"concurrency_limit": 1, "concurrency_id": "model"}  # one answer at a time
        for handler, inputs, box, button in (
            (handlers.ask, [message, state, *settings], message, send),
            (handlers.give_result, [result, whose, state, *settings], result, give),
        ):
            button.click(handler, inputs, [box, state, *chats], api_name=handler.__name__, **queue)
            box.submit(handler, inputs, [box, state, *chats], api_visibility="private", **queue)
        reset.click(lambda: (None, *([] for _ in chats)), None, [state, *chats], api_name="reset")
        save.click(handlers.save, [state], [save], api_name="save")
    return page


class _Handlers:
    """What the buttons do; a visitor's conversations are in `state`, one ChatSession for each side."""

    def __init__(self, agent: ChatAgent, sides: list[str]):
        self.agent, self.sides = agent, sides

    def ask(
        self, text: str, state: dict | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """Send a message to every side; yields (message box, state, the chat messages of each side)."""
        state = self._sessions(state, tools, system)
        if not text.strip():
            raise _page_error("write a message first")
        for side in self.sides:
            with state[side].transaction():
                state[side].add_user(text)
                yield from self._answer(side, state, temperature, longest)

    def give_result(
        self, text: str, side: str, state: dict | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """Add the result of one side's first pending call; after the last one that side answers."""
        state = self._sessions(state, tools, system)
        side = side if side in state else self.sides[-1]
        with state[side].transaction():
            try:
                state[side].add_result(text.strip())
            except UserError as error:
                raise _page_error(error) from error
            yield "", state, *self._views(state)
            if not state[side].pending:
                yield from self._answer(side, state, temperature, longest)

    def save(self, state: dict | None) -> str:
        """Write the last side's conversation to a file, as a row of a data set; returns its path."""
        if not state:
            raise _page_error("there is nothing to save yet")
        folder = Path(tempfile.mkdtemp(prefix="sandwich_chat_"))
        return str(state[self.sides[-1]].save(folder / time.strftime("chat_%Y%m%d_%H%M%S.jsonl")))

    def _sessions(self, state: dict | None, tools: str, system: str) -> dict[str, ChatSession]:
        try:
            declared = parse_tools(tools) if tools and tools.strip() else []
        except UserError as error:
            raise _page_error(error) from error
        state = state or {side: ChatSession() for side in self.sides}
        for session in state.values():
            session.tools, session.system = declared, system or ""
        return state

    def _answer(self, side: str, state: dict, temperature: float, longest: float) -> Iterator[tuple]:
        session, text = state[side], ""
        decoding = replace(self.agent.decoding, temperature=float(temperature), max_new_tokens=int(longest))
        agent = replace(self.agent, side=side, decoding=decoding)
        try:
            for event in itertools.chain([""], agent.answer(session)):
                text = text + event if isinstance(event, str) else ""
                views = self._views(state)
                if session.turns[-1]["role"] != "assistant":
                    views[self.sides.index(side)].append({"role": "assistant", "content": as_text(text) or "…"})
                yield "", state, *views
        except (UserError, FormatError) as error:
            raise _page_error(error) from error

    def _views(self, state: dict[str, ChatSession]) -> list[list[dict]]:
        return [chat_messages(state[side]) for side in self.sides]


def _page_error(message: str | Exception) -> gradio.Error:
    import gradio

    return gradio.Error(html.escape(str(message)), print_exception=False)


def chat_messages(session: ChatSession) -> list[dict[str, Any]]:
    """The conversation for gradio's Chatbot; calls, results and parse errors are cards."""
    shown: list[dict[str, Any]] = []
    for index, turn in enumerate(session.turns):
        if turn["role"] == "tool":
            shown.append(_card(f"result of {as_text(turn.get('name', 'a call'))}", _fenced(turn["content"])))
        elif turn["role"] == "assistant":
            shown += _reply_messages(session.replies[index])
        else:
            shown.append({"role": turn["role"], "content": as_text(turn["content"])})
    return shown


def _reply_messages(reply: Reply) -> Iterator[dict[str, Any]]:
    if reply.reasoning_content:
        yield _card("reasoning", as_text(reply.reasoning_content), closed=True)
    if reply.content and not reply.parse_errors:
        yield {"role": "assistant", "content": as_text(reply.content)}
    for call, problems in zip(reply.tool_calls, reply.problems, strict=True):
        verdict = "".join(f"\n\n✗ {as_text(problem)}" for problem in problems) or "\n\n✓ arguments fit the schema"
        arguments = _fenced(json.dumps(call["arguments"], indent=2, ensure_ascii=False), "json")
        yield _card(f"call: {as_text(call['name'])}", arguments + verdict)
    for error in reply.parse_errors:
        # As code, because a browser does not show the tags of a call.
        yield _card("not a call", f"{as_text(error)}\n\n{_fenced(reply.text)}")
    if reply.finish_reason == "length":
        yield _card("cut off", "the answer reached its maximum length")
    if not (reply.content or reply.tool_calls or reply.parse_errors):
        yield _card("an empty answer", "the model ended its turn at once")


def _card(title: str, body: str, closed: bool = False) -> dict[str, Any]:
    metadata = {"title": title, **({"status": "done"} if closed else {})}  # gradio folds up what is done
    return {"role": "assistant", "content": body, "metadata": metadata}


# Outside of code blocks Markdown reads none of these in the form of character references.
_MARKUP = re.compile(r"[&<>\[\]`*#~|$!\\+=:]|(?<!\w)_|_(?!\w)|-(?=[-\s])|(?<=\d)[.)](?=\s)|^[^\S\n]+", re.MULTILINE)


def as_text(text: str) -> str:
    """Markdown that shows exactly this text: no HTML, no links, no images."""
    return _MARKUP.sub(lambda found: "".join(f"&#{160 if c.isspace() else ord(c)};" for c in found[0]), text)


def _fenced(text: str, language: str = "") -> str:
    """A Markdown code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
