"""Answering one question or a file of questions without a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from finetune.chat.reply import Reply, call_line, read_reply
from finetune.chat.session import ChatAgent, ChatSession, ToolResult
from finetune.errors import UserError, user_errors
from finetune.files import json_line, read_text
from finetune.progress import printable, progress_bar
from finetune.reading.columns import match_columns
from finetune.reading.conversations import RowError, normalize_row
from finetune.reading.row_files import strict_json
from formats import FormatError, decode

Events = list[Reply | ToolResult]


def read_questions(path: str | Path, tools: list[dict] | None = None) -> list[str | dict[str, Any]]:
    """One question a line; a line of a .jsonl file is text, {"question": …} or a row of any shape for training.

    A .json file is a list of these, or has one under "questions". Returns text, or rows that end with a user message
    or a tool's result. Raises UserError with the line's number.
    """
    text = read_text(path, "--questions")
    if Path(path).suffix == ".json":
        return as_questions(_json(text, f"--questions {path}"), tools or [], f"--questions {path}")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--questions {path}: the file has no questions")
    if Path(path).suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in lines]
    wheres = [f"--questions {path}, line {number}" for number, _ in lines]
    return [_question(_json(line, where), tools or [], where) for where, (_, line) in zip(wheres, lines, strict=True)]


def as_questions(value: Any, tools: list[dict], where: str) -> list[str | dict[str, Any]]:
    """The questions of a JSON list, or of a list under "questions"; UserError with the item's number."""
    items = value.get("questions") if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise UserError(f'{where}: must be a list of questions, such as ["What is protein?"]')
    return [_question(item, tools, f"{where}, question {number}") for number, item in enumerate(items, 1)]


def _json(text: str, where: str) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: not valid JSON ({reason})") from error


def _question(value: Any, tools: list[dict], where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = {"prompt": value}
    known = set(match_columns(value).values()) if isinstance(value, dict) else set()
    asking = {"prompt", "messages", "chat", "text"}
    if "context" in known and not known & asking:
        value, known = {"prompt": value.get("input", value.get("context"))}, {"prompt"}
    if not known & asking:
        raise UserError(f'{where}: neither text, {{"question": …}} nor {{"messages": […]}}')
    # A question without an answer needs an empty one; an answer that the row has is removed below.
    answered = known & {"messages", "chat", "text", "completion", "answers", "tool"}
    try:
        row = normalize_row(value if answered else {**value, "completion": ""}, tools=tools)
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    messages = row["messages"]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise UserError(f"{where}: no user message")
    return row


def start_session(question: str | dict[str, Any], system: str, tools: list[dict]) -> ChatSession:
    """The conversation of a question; a row has its own messages, and may have its own tools."""
    if isinstance(question, str):
        session = ChatSession(system, tools)
        session.add_user(question)
        return session
    messages = list(question["messages"])
    own = messages.pop(0)["content"] if messages[0]["role"] == "system" else system
    return ChatSession(own, question.get("tools") or tools, messages)


def answer_all(
    agent: ChatAgent, questions: list[Any], system: str, tools: list[dict], sides: list[str], output: Path | None,
    *, with_questions: bool = False,
) -> None:  # fmt: skip
    """Answer every question by every side and write the answers to `output` or stdout as they are ready.

    with_questions: each question is written before its answers, where these are text.
    Without a tool command, `batch_size` questions are answered at a time.
    """
    sessions, prompts = [start_session(question, system, tools) for question in questions], []
    for number, session in enumerate(sessions, 1):  # before the first answer, which may take long
        try:
            prompts.append(agent.model.prompt_ids(session.messages, session.tools))
        except (UserError, FormatError) as error:
            raise UserError(f"question {number}: {error}" if len(questions) > 1 else str(error)) from error
    size, total = agent.decoding.batch_size, len(questions) * len(sides)
    with _open_output(output) as file, progress_bar("answers", total, shown=len(questions) > 1) as advance:
        for at in range(0, len(sessions), size):
            batch, ids = sessions[at : at + size], prompts[at : at + size]
            answers = [list(_answers(replace(agent, side=side), batch, ids, advance)) for side in sides]
            for number, by_side in enumerate(zip(*answers, strict=True), at + 1):
                if with_questions and not _is_json_lines(output):
                    asked = " ".join(batch[number - at - 1].messages[-1]["content"].split())
                    file.write(printable(f"Question: {asked}\n"))
                for side, (session, events) in zip(sides, by_side, strict=True):
                    label = side if len(sides) > 1 else None
                    _write(file, output, number, label, session, events, "Answer: " if with_questions else "")


def _answers(
    agent: ChatAgent, sessions: list[ChatSession], prompts: list[list[int]], advance: Callable[[int], None]
) -> Iterator[tuple[ChatSession, Events]]:
    """Each answered session, copied, with its replies and results; `prompts` are the ids of the sessions."""
    sessions = [ChatSession(session.system, session.tools, list(session.turns)) for session in sessions]
    chat, decoding = agent.model, agent.decoding
    fits = all(decoding.max_new_tokens <= chat.room(ids) for ids in prompts)
    if agent.tool_command is not None or len(sessions) == 1 or not fits:
        for session in sessions:
            yield session, [event for event in agent.answer(session) if not isinstance(event, str)]
            advance(1)
        return
    from finetune.generation.generate import generate

    with chat.side(agent.side) as model:
        results = generate(model, prompts, decoding=decoding, on_result=lambda *_: advance(1)).results
    for session, made in zip(sessions, results, strict=True):
        text = decode(made.input_ids, chat.tokenizer, chat.fmt)
        reply = read_reply(text, session.tools, chat.tokenizer, chat.fmt, finish_reason=made.finish_reason)
        session.add_reply(reply)
        yield session, [reply]


def _open_output(output: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    if output is None:
        return contextlib.nullcontext(sys.stdout)
    with user_errors(f"cannot write {output}", "choose another file with --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("x", encoding="utf-8", newline="\n")


def _write(
    file: TextIO, output: Path | None, number: int, side: str | None, session: ChatSession, events: Events, label: str
) -> None:
    if _is_json_lines(output):
        last = next(event for event in reversed(events) if isinstance(event, Reply))
        line = {"row": number, **({"side": side} if side else {}), "messages": session.messages, **last.as_json()}
        file.write(json_line(line))
    else:
        label = f"{side}: " if side else label
        file.write(printable(label + " ".join(" ".join(map(_one_line, events)).split())) + "\n")
    file.flush()


def _is_json_lines(output: Path | None) -> bool:
    return output is not None and output.suffix in (".jsonl", ".ndjson")


def _one_line(event: Reply | ToolResult) -> str:
    """An answer or a tool's result as one line; problems are in square brackets."""
    if isinstance(event, ToolResult):
        return f"-> {event.result}"
    parts = [event.content] if event.content else []
    for call, problems in zip(event.tool_calls, event.problems, strict=True):
        parts.append(call_line(call) + (f" [{'; '.join(problems)}]" if problems else ""))
    parts += [f"[not a call: {error}]" for error in event.parse_errors]
    if event.finish_reason == "length":
        parts.append("[cut off]")
    return " ".join(parts)
