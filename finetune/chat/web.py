"""The conversation on a web page: base and tuned side by side, calls as cards. Built with Gradio."""

from __future__ import annotations

import atexit
import hmac
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.address import url
from finetune.chat.examples import Example
from finetune.chat.guard import Access, Guard
from finetune.chat.model import BASE, TUNED
from finetune.chat.reply import Reply
from finetune.chat.session import ChatAgent, ChatSession
from finetune.chat.verdicts import STYLE, Verdict, better, problem_html, verdict_html, verdict_of
from finetune.errors import UserError
from finetune.reading.tool_schemas import parse_tools
from formats import FormatError

if TYPE_CHECKING:
    import gradio

PASSWORD_VARIABLE = "SANDWICH_WEB_PASSWORD"  # noqa: S105  (the name of a variable)
# The message box stays in sight: on a phone, two panes are higher than the screen.
PAGE_STYLE = """
#composer { position: sticky; bottom: 0; z-index: 20; background: var(--body-background-fill); padding: 6px 0; }
@media (max-width: 640px) {
  .pane { height: 30vh !important; min-height: 150px; }
  .gradio-container { padding: 6px !important; }
  #composer { flex-wrap: wrap; }
}
"""
log = logging.getLogger("sandwich")


def launch(
    agent: ChatAgent, system: str, tools: list[dict], host: str, port: int, share: bool = False,
    examples: Sequence[Example] = (),
) -> None:  # fmt: skip
    """Serve the page until Ctrl-C. UserError when gradio is missing or the port is in use."""
    page = open_page(agent, system, tools, host, port, share, examples)
    password = " (with a password)" if os.environ.get(PASSWORD_VARIABLE) else ""
    log.info("the page is at %s%s; stop with Ctrl-C", page.share_url or url(host, port), password)
    try:
        threading.Event().wait()  # gradio's own wait would catch Ctrl-C and end with status 0
    finally:
        page.close(verbose=False)


def open_page(
    agent: ChatAgent, system: str, tools: list[dict], host: str, port: int, share: bool = False,
    examples: Sequence[Example] = (),
) -> gradio.Blocks:  # fmt: skip
    """The page, served by threads of this process until its `close()`."""
    page = build_page(agent, system, tools, examples)
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
            css=STYLE + PAGE_STYLE,
            app_kwargs={"middleware": [Middleware(Guard, access=access)]},
            enable_monitoring=False, footer_links=["api"], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}; choose another --port") from error
    return page


def build_page(
    agent: ChatAgent, system: str = "", tools: list[dict] | None = None, examples: Sequence[Example] = ()
) -> gradio.Blocks:
    """The page, not launched yet."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    if not os.environ.get("GRADIO_TEMP_DIR"):  # else /tmp/gradio, where others can read saved conversations
        os.environ["GRADIO_TEMP_DIR"] = private = tempfile.mkdtemp(prefix="sandwich_page_")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
    import gradio

    sides = [side for side in (BASE, TUNED) if side in agent.model.sides]
    handlers = _Handlers(agent, sides, examples)
    shown = json.dumps(tools, indent=2, ensure_ascii=False) if tools else ""
    with gradio.Blocks(title=f"Sandwich: {agent.model.name}", analytics_enabled=False) as page:
        state = gradio.State(None)  # the Visit of one visitor
        gradio.Markdown(f"### {as_text(agent.model.name)} · format {as_text(agent.model.fmt.name)}")
        with gradio.Row(equal_height=True):
            chats, verdicts = [], []
            for label in sides if len(sides) > 1 else ["model"]:
                with gradio.Column(min_width=280):
                    # Formulas are read before code blocks, and would let text out of them.
                    looks = {"height": "44vh", "layout": "panel", "elem_classes": "pane", "latex_delimiters": []}
                    chats.append(gradio.Chatbot(label=label, **looks))
                    verdicts.append(gradio.HTML(verdict_html(""), padding=False))
        with gradio.Row(elem_id="composer"):
            message = gradio.Textbox(
                label="Message", lines=1, max_lines=8, scale=5, min_width=180, autofocus=True,
                placeholder="Enter sends, Shift+Enter starts a new line",
            )  # fmt: skip
            send = gradio.Button("Send", variant="primary", scale=1, min_width=70)
            stop = gradio.Button("Stop", variant="stop", scale=1, min_width=70)
        gallery = gradio.Dataset(
            components=[gradio.Textbox(visible=False)], samples=[[example.text] for example in examples],
            label="Requests from the data of this run", type="index", visible=bool(examples),
        )  # fmt: skip
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
            save = gradio.DownloadButton("Save as JSON Lines", interactive=False)
        settings = [tools_box, system_box, temperature, longest]
        # One answer at a time. Hidden progress: gradio would lay errors over every output, the message box included.
        queue = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        for handler, inputs, box, button in (
            (handlers.ask, [message, state, *settings], message, send),
            (handlers.give_result, [result, whose, state, *settings], result, give),
        ):
            outputs = [box, state, *chats, *verdicts, save]
            button.click(handler, inputs, outputs, api_name=handler.__name__, **queue)
            box.submit(handler, inputs, outputs, api_visibility="private", **queue)
        stop.click(handlers.stop, [state], None, queue=False, api_name="stop")
        emptied = [state, *chats, *verdicts, save]
        reset.click(handlers.empty, None, emptied, api_name="reset")
        for chat in chats:  # the bin
            chat.clear(handlers.empty, None, emptied, api_visibility="private")
        gallery.click(handlers.example, [gallery], [message, tools_box, system_box], api_visibility="private")
    return page


@dataclass
class Visit:
    """What one visitor has said: a conversation with each side; `stopped` ends the answer that is being computed."""

    sessions: dict[str, ChatSession]
    stopped: threading.Event = field(default_factory=threading.Event)
    waiting: dict[str, str] = field(default_factory=dict)  # the message that a side has not begun to answer

    def __deepcopy__(self, memo: dict) -> Visit:
        return self  # gradio copies initial values only; an event cannot be copied


class _Stopped(Exception):
    """The visitor has stopped the answer."""

    def __str__(self) -> str:
        return "stopped; the message is in the box again"


class _Handlers:
    """What the buttons do."""

    def __init__(self, agent: ChatAgent, sides: list[str], examples: Sequence[Example] = ()):
        self.agent, self.sides, self.examples = agent, sides, examples
        self.expected = {example.text: example.calls for example in examples}

    def ask(
        self, text: str, visit: Visit | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """Send a message to every side, the tuned one first; yields (message box, visit, panes, verdicts, save)."""
        visit = visit or Visit({side: ChatSession() for side in self.sides})
        order, answered = self.sides[::-1], False
        try:
            self._prepare(visit, tools, system)
            if not text.strip():
                raise UserError("write a message first")
            visit.waiting = dict.fromkeys(order, text)
            for side in order:
                with visit.sessions[side].transaction():
                    visit.waiting.pop(side)
                    visit.sessions[side].add_user(text)
                    yield from self._answer(side, visit, temperature, longest)
                answered = True
        except (_Stopped, UserError, FormatError) as error:
            visit.waiting = {}
            yield self._shown("" if answered else text, visit, problem=str(error))
            return
        finally:
            visit.waiting = {}
        yield self._shown("", visit)

    def give_result(
        self, text: str, side: str, visit: Visit | None, tools: str, system: str, temperature: float, longest: float
    ) -> Iterator[tuple]:
        """Add the result of one side's first pending call; after the last one that side answers."""
        visit = visit or Visit({side: ChatSession() for side in self.sides})
        side = side if side in visit.sessions else self.sides[-1]
        session = visit.sessions[side]
        try:
            self._prepare(visit, tools, system)
            with session.transaction():
                session.add_result(text.strip())
                yield self._shown("", visit)
                if not session.pending:
                    yield from self._answer(side, visit, temperature, longest)
        except (_Stopped, UserError, FormatError) as error:
            yield self._shown(text, visit, problem=str(error))
            return
        yield self._shown("", visit)

    def stop(self, visit: Visit | None) -> None:
        """End the answer that is being computed; it and its message are dropped."""
        if visit is not None:
            visit.stopped.set()

    def empty(self) -> tuple:
        """A new conversation: the same outputs as `ask`, without the message box."""
        import gradio

        count = len(self.sides)
        button = gradio.DownloadButton(value=None, interactive=False)
        return (None, *([] for _ in range(count)), *(verdict_html("") for _ in range(count)), button)

    def example(self, index: int) -> tuple[str, str, str]:
        """(message, tools, system message) of an entry of the gallery."""
        example = self.examples[index]
        return example.text, json.dumps(example.tools, indent=2, ensure_ascii=False), example.system

    def _prepare(self, visit: Visit, tools: str, system: str) -> None:
        """Give both sides these tools and this system message. Raises UserError for tools that cannot be read."""
        declared = parse_tools(tools) if tools and tools.strip() else []
        visit.stopped.clear()
        for session in visit.sessions.values():
            session.tools, session.system = declared, system or ""

    def _answer(self, side: str, visit: Visit, temperature: float, longest: float) -> Iterator[tuple]:
        session, text, started = visit.sessions[side], "", time.monotonic()
        decoding = replace(self.agent.decoding, temperature=float(temperature), max_new_tokens=int(longest))
        events = replace(self.agent, side=side, decoding=decoding).answer(session)
        try:
            yield self._shown("", visit, {side: ""})
            for event in events:
                if visit.stopped.is_set():
                    raise _Stopped
                if isinstance(event, Reply):
                    event.seconds, started = time.monotonic() - started, time.monotonic()
                text = text + event if isinstance(event, str) else ""
                yield self._shown("", visit, {side: text})
        finally:
            events.close()

    def _shown(self, box: str, visit: Visit, partial: dict[str, str] | None = None, problem: str = "") -> tuple:
        """All outputs of `ask`; partial: the text so far of the side that is answering; problem: shown as a line.

        Not as an exception: gradio would replace the panes by the word Error until the next answer.
        """
        import gradio

        partial = partial or {}
        panes, verdicts = [], {}
        for side in self.sides:
            session = visit.sessions[side]
            pane = chat_messages(session)
            if side in visit.waiting:
                pane += [{"role": "user", "content": as_text(visit.waiting[side])},
                         {"role": "assistant", "content": "…"}]  # fmt: skip
            elif session.turns and session.turns[-1]["role"] != "assistant" and side in partial:
                pane.append({"role": "assistant", "content": as_text(partial[side]) or "…"})
            panes.append(pane)
            verdicts[side] = self._verdict(side, visit, side in partial)
        known = {side: one for side, one in verdicts.items() if isinstance(one, Verdict)}
        best = better(known) if len(known) == len(self.sides) else None
        lines = [verdict_html(verdicts[side], side == best) for side in self.sides]
        if problem:
            lines[-1] = problem_html(problem)
        return box, visit, *panes, *lines, gradio.skip() if partial or visit.waiting else self._saved(visit)

    def _verdict(self, side: str, visit: Visit, is_answering: bool) -> Verdict | str:
        session = visit.sessions[side]
        if side in visit.waiting:
            return "waits for the other side"
        if is_answering and session.turns[-1]["role"] != "assistant":
            return "answers …"
        if not session.replies:
            return ""
        at = max(session.replies)
        request = next((turn for turn in reversed(session.turns[:at]) if turn["role"] == "user"), None)
        first = request is not None and session.turns[at - 1] is request and at == 1
        expected = self.expected.get(request["content"]) if first and request else None
        return verdict_of(session.replies[at], expected)

    def _saved(self, visit: Visit) -> Any:
        """The save button with the last side's conversation as it is now, a row of a data set."""
        import gradio

        session = visit.sessions[self.sides[-1]]
        if not session.turns:
            return gradio.DownloadButton(value=None, interactive=False)
        folder = Path(tempfile.mkdtemp(prefix="sandwich_chat_", dir=os.environ.get("GRADIO_TEMP_DIR")))
        return gradio.DownloadButton(value=str(session.save(folder / "chat.jsonl")), interactive=True)


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
_MARKUP = re.compile(
    r"[&<>\[\]`*#~|$!\\+=:@]|(?<!\w)_|_(?!\w)|-(?=[-\s])|(?<=\d)[.)](?=\s)|(?<=www)\.|^[^\S\n]+", re.MULTILINE
)


def as_text(text: str) -> str:
    """Markdown that shows exactly this text: no HTML, no links, no images."""
    return _MARKUP.sub(lambda found: "".join(f"&#{160 if c.isspace() else ord(c)};" for c in found[0]), text)


def _fenced(text: str, language: str = "") -> str:
    """A Markdown code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
