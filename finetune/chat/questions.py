"""One question or a file of them, answered and written out; no person at the keyboard."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finetune.chat.reply import Reply, call_line, read_reply
from finetune.chat.session import Conversation, Talk
from finetune.chat.terminal import printable
from finetune.errors import UserError
from finetune.files import json_line
from finetune.progress import progress_bar
from finetune.reading.conversations import RowError, normalize_row
from finetune.reading.row_files import strict_json
from finetune.reading.shapes import FIELDS
from formats import FormatError


def read_questions(path: str | Path, tools: list[dict] | None = None) -> list[Any]:
    """One question a line; lines of a .jsonl file are text, {"question": …} or a row of any shape that is trained on.

    Each comes as text or as a canonical row that ends where an answer is due. Raises UserError that names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--questions {path}: the file holds no question")
    if path.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in lines]
    return [_question(line, tools or [], f"--questions {path}, line {number}") for number, line in lines]


def _question(line: str, tools: list[dict], where: str) -> Any:
    try:
        value = strict_json(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: no JSON ({reason})") from error
    if isinstance(value, str):
        value = {"prompt": value}
    known = {field for field, names in FIELDS.items() if isinstance(value, dict) and set(names) & value.keys()}
    if known & {"context"} and not known & {"prompt", "messages", "chat", "text"}:
        value, known = {"prompt": value.get("input", value.get("context"))}, {"prompt"}
    if not known & {"prompt", "messages", "chat", "text"}:
        raise UserError(f'{where}: neither text, {{"question": …}} nor {{"messages": […]}}')
    # A question has no answer yet; one that a row brings is not shown to the model.
    missing = {} if known & {"messages", "chat", "text", "completion", "answers", "tool"} else {"completion": ""}
    try:
        row = normalize_row({**value, **missing}, tools=tools)
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    messages = row["messages"]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise UserError(f"{where}: no user message in it")
    return row


def start(question: Any, system: str, tools: list[dict]) -> Conversation:
    """The conversation that a question opens; a row brings its own messages, and tools where it declares them."""
    if isinstance(question, str):
        conversation = Conversation(system, tools)
        conversation.say(question)
        return conversation
    messages = list(question["messages"])
    own = messages.pop(0)["content"] if messages[0]["role"] == "system" else system
    return Conversation(own, question.get("tools") or tools, messages)


def answer_all(
    talk: Talk, questions: list[Any], system: str, tools: list[dict], sides: list[str], output: Path | None
) -> int:
    """Answer every question by every side; lines go to `output` as they are ready, or to stdout. Returns how many.

    Without a tool command the prompts of several questions are computed side by side (finetune.generation).
    """
    conversations = [start(question, system, tools) for question in questions]
    for number, one in enumerate(conversations, 1):  # all before the first is answered, which may take hours
        try:
            talk.speaker.prompt_ids(one.messages, one.tools, talk.decoding.max_new_tokens)
        except (UserError, FormatError) as error:
            raise UserError(f"question {number}: {error}" if len(questions) > 1 else str(error)) from error
    many = len(questions) > 1
    with _opened(output) as file, progress_bar("answers", len(questions) * len(sides), shown=many) as advance:
        size = talk.decoding.batch_size
        for at in range(0, len(conversations), size):
            part = conversations[at : at + size]
            answers = [list(_answers(talk, part, side, advance)) for side in sides]
            for number, given in enumerate(zip(*answers, strict=True), at + 1):
                for side, (conversation, replies) in zip(sides, given, strict=True):
                    _write(file, output, number, side if len(sides) > 1 else None, conversation, replies)
    return len(questions)


def _answers(talk: Talk, conversations: list[Conversation], side: str, advance: Any) -> Iterator[tuple]:
    """(conversation, [Reply or (call, result)]) of each."""
    fresh = [Conversation(c.system, c.tools, list(c.turns)) for c in conversations]
    if talk.tool_command is not None or len(fresh) == 1:
        for conversation in fresh:
            talk.side = side
            yield conversation, list(talk.answer(conversation))
            advance(1)
        return
    from finetune.generation.generate import generate

    speaker = talk.speaker
    prompts = [speaker.prompt_ids(c.messages, c.tools, talk.decoding.max_new_tokens) for c in fresh]
    with speaker.side(side) as model:
        done = generate(model, prompts, decoding=talk.decoding, on_result=lambda *_: advance(1)).results
    for conversation, ids, made in zip(fresh, prompts, done, strict=True):
        text = speaker.tokenizer.decode(made.input_ids, skip_special_tokens=False)
        reply = read_reply(
            text, conversation.tools, speaker.tokenizer, speaker.fmt, finish_reason=made.finish_reason,
            prompt_tokens=len(ids), new_tokens=len(made.input_ids), seconds=made.latency_s,
        )  # fmt: skip
        conversation.take(reply)
        yield conversation, [reply]


def _opened(output: Path | None):
    import contextlib

    if output is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("x", encoding="utf-8", newline="\n")
    except FileExistsError as error:
        raise UserError(f"{output} exists already; name another file with --output") from error
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; name another file with --output") from error


def _write(
    file: TextIO, output: Path | None, number: int, side: str | None, conversation: Conversation, made: list
) -> None:
    if output is not None and output.suffix in (".jsonl", ".ndjson"):
        last = next(reply for reply in reversed(made) if isinstance(reply, Reply))
        line = {"row": number, **({"side": side} if side else {}), "messages": conversation.messages, **last.as_json()}
        file.write(json_line(line))
    else:
        label = f"{side}: " if side else ""
        file.write(printable(label + " ".join(" ".join(map(one_line, made)).split())) + "\n")
    file.flush()


def one_line(made: Reply | tuple[dict[str, Any], str]) -> str:
    """An answer, or a call with its result, without line breaks; faults are in square brackets."""
    if not isinstance(made, Reply):
        return f"-> {made[1]} "
    parts = [made.content] if made.content else []
    for call, problems in zip(made.tool_calls, made.problems, strict=True):
        parts.append(call_line(call) + (f" [{'; '.join(problems)}]" if problems else ""))
    parts += [f"[no call: {error}]" for error in made.parse_errors]
    if made.finish_reason == "length":
        parts.append("[cut off]")
    return " ".join(parts)
