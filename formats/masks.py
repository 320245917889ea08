"""The one file that writes labels.

A mask is never searched for. For the assistant turn at index i

    prompt = what a server feeds:  render(messages[:i], tools, add_generation_prompt=True)
    upto   = render(messages[:i + 1], tools)

and the trained text is what `upto` has behind `prompt`, up to and including the end-of-turn token. The ids in front of
it are the ids of `prompt`, so training and serving see the same tokens. Where a template renders the past differently
once the conversation goes on (hybrid reasoning, tools at the last user turn), the sequence is closed and a new one is
started: a conversation becomes several sequences, each exactly as served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.base import Format, FormatError, clean_messages, place, render_messages
from formats.escape import escape_conversation
from formats.losses import lost_in_answer, lost_in_prompt
from formats.rendering import JsonOnce
from formats.roles import token_roles
from formats.tokens import Tokenized, Tokens, check_tokenizer, tokens_of

IGNORE_INDEX = -100  # label of a token that is not trained; PyTorch's default


@dataclass
class Sequence:
    """One row for the trainer: `input_ids` and `labels` (the id where trained, else -100), equally long, unshifted."""

    text: str
    input_ids: list[int]
    labels: list[int]
    roles: list[str] = field(default_factory=list)


@dataclass
class Encoded:
    """A conversation's sequences, or the reason why there are none.

    status      "ok" (one sequence), "split" (several, the template does not keep its prefix), "refused" (none)
    escaped     number of control strings neutralised in the contents
    warnings    what the template legitimately leaves out (reasoning it has no place for)
    """

    status: str
    reason: str | None = None
    sequences: list[Sequence] = field(default_factory=list)
    escaped: int = 0
    warnings: list[str] = field(default_factory=list)


class _Refusal(Exception):
    pass


def encode(
    conversation: Mapping[str, Any],
    tokenizer: Any,
    fmt: Format,
    *,
    train_on: str = "all",
    control_tokens: str = "escape",
) -> Encoded:
    """Token ids and labels of a conversation {"messages", "tools"}.

    train_on: "all" assistant turns or the "last" one; a message with "train": false is never trained.
    control_tokens: "escape", "error" (the row is refused) or "allow".
    Raises FormatError when tokenizer and format do not fit together; a row that cannot be expressed is "refused".
    """
    if train_on not in ("all", "last"):
        raise FormatError(f"train_on must be all or last, not {train_on!r}")
    tokens = tokens_of(tokenizer)
    ends = _end_ids(tokens, fmt)
    try:
        messages = clean_messages(conversation["messages"], fmt)
        tools = list(conversation.get("tools") or [])
        messages, tools, found = escape_conversation(messages, tools, tokenizer, fmt, control_tokens, tokens=tokens)
    except FormatError as error:
        return Encoded("refused", str(error))
    turns = _trained_turns(conversation["messages"], train_on)
    if not turns:
        return Encoded("refused", "no assistant message to train", escaped=len(found))
    warnings: list[str] = []
    try:
        with JsonOnce(tools):
            sequences = _sequences(messages, tools, turns, tokens, fmt, ends, warnings, control_tokens == "escape")
    except _Refusal as refusal:
        return Encoded("refused", str(refusal), escaped=len(found))
    status = "ok" if len(sequences) == 1 else "split"
    reason = None if status == "ok" else f"the template changes earlier turns: {len(sequences)} sequences"
    return Encoded(status, reason, sequences, len(found), warnings)


def encode_prompt(
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    tokenizer: Any,
    fmt: Format,
    *,
    control_tokens: str = "escape",
) -> list[int]:
    """Ids a server feeds before the model answers `messages`; the contents are neutralised as in training.

    Raises FormatError when the template cannot express the messages, or loses one of them.
    """
    cleaned, tools, _ = escape_conversation(
        clean_messages(messages, fmt), list(tools or []), tokenizer, fmt, control_tokens
    )
    try:
        text = _prompt(cleaned, tools, fmt, tokenizer)
        if lost := lost_in_prompt(cleaned, tools, text, fmt, tokenizer):
            raise _Refusal(lost)
    except _Refusal as refusal:
        raise FormatError(str(refusal)) from refusal
    return list(tokens_of(tokenizer).ids(text))


def _end_ids(tokens: Tokens, fmt: Format) -> set[int]:
    key = (fmt.name, fmt.end_of_turn, fmt.tokens)
    if key not in tokens.end_ids:
        tokens.end_ids[key] = set(check_tokenizer(tokens.tokenizer, fmt))
    return tokens.end_ids[key]


def _trained_turns(messages: list[dict[str, Any]], train_on: str) -> list[int]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("train", True) is not False]


def _sequences(
    messages: list[dict],
    tools: list[dict],
    turns: list[int],
    tokens: Tokens,
    fmt: Format,
    ends: set[int],
    warnings: list[str],
    spelled: bool,
) -> list[Sequence]:
    """With `spelled` a control token that no text spells refuses the row: no content may have become one."""
    sequences: list[Sequence] = []
    placed = None  # the open sequence's tokens and their places in its text
    last, served = -1, fmt
    for index in turns:
        prompt, upto, completion, kwargs = _turn(messages, tools, index, tokens.tokenizer, fmt, warnings)
        prompt_tokens = tokens.tokenized(prompt, placed)
        whole = tokens.continued(prompt, completion, prompt_tokens)
        prompt_ids = prompt_tokens.ids
        answer_ids = whole.ids[len(prompt_ids) :]
        if not answer_ids or answer_ids[-1] not in ends:
            raise _Refusal(f"{place(index, 'assistant')}: its last token is not the end of the turn")
        if spelled and whole.stray:
            raise _Refusal(f"a content turns into the control token {whole.stray[0]} although it does not spell it")
        done = sequences[-1] if sequences else None
        if done is not None and prompt_ids[: len(done.input_ids)] == done.input_ids:
            labels = done.labels + [IGNORE_INDEX] * (len(prompt_ids) - len(done.labels))
        else:
            if done is not None:
                done.roles = token_roles(done.text, placed, messages[: last + 1], tools, served, tokens.tokenizer)
            done = Sequence("", [], [])
            sequences.append(done)
            labels = [IGNORE_INDEX] * len(prompt_ids)
        done.text = prompt + completion
        done.input_ids = whole.ids
        done.labels = labels + answer_ids
        placed = whole
        last, served = index, fmt.with_kwargs(**kwargs) if kwargs else fmt
    done = sequences[-1]
    text = upto if last == len(messages) - 1 else _all(messages, tools, tokens.tokenizer, served)
    placed, last = _append_tail(done, placed, last, text, tokens, len(messages))
    if spelled and placed.stray:
        raise _Refusal(f"a content turns into the control token {placed.stray[0]} although it does not spell it")
    done.roles = token_roles(done.text, placed, messages[: last + 1], tools, served, tokens.tokenizer)
    return sequences


def _append_tail(
    sequence: Sequence, placed: Tokenized, last: int, text: str | None, tokens: Tokens, count: int
) -> tuple[Tokenized, int]:
    """Add, untrained, what the whole conversation's text has behind the last trained turn (a newline, later turns).

    Returns the tokens and the number of the last of its `count` messages that the sequence now holds.
    """
    if text is None or text == sequence.text or not text.startswith(sequence.text):
        return placed, last
    whole = tokens.tokenized(text, placed)
    if whole.ids[: len(sequence.input_ids)] != sequence.input_ids:
        return placed, last
    sequence.text = text
    sequence.labels = sequence.labels + [IGNORE_INDEX] * (len(whole.ids) - len(sequence.labels))
    sequence.input_ids = whole.ids
    return whole, count - 1


def _all(messages: list[dict], tools: list[dict], tokenizer: Any, fmt: Format) -> str | None:
    try:
        return render_messages(messages, tools, fmt, tokenizer)
    except Exception:  # what cannot be rendered behind the last trained turn is not needed
        return None


def _prompt(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any, **kwargs: Any) -> str:
    if not messages:
        raise _Refusal(
            f"{place(0, 'assistant')}: nothing comes before it, so no server ever generates it; "
            'set "train": false on it'
        )
    try:
        return render_messages(messages, tools, fmt, tokenizer, add_generation_prompt=True, **kwargs)
    except Exception as error:  # templates raise anything: TemplateError, TypeError, UndefinedError …
        where = f"{place(len(messages) - 1)} and those before it"
        raise _Refusal(f"{where}: format {fmt.name} cannot express them: {error}") from error


def _turn(
    messages: list[dict], tools: list[dict], index: int, tokenizer: Any, fmt: Format, warnings: list[str]
) -> tuple[str, str, str, dict[str, Any]]:
    """(prompt, upto, completion, variables) of the assistant turn at `index`.

    Raises _Refusal when it cannot be trained.
    """
    where = place(index, "assistant")
    answer = messages[index]
    problem = ""
    for kwargs in _thinking_modes(answer, fmt):
        prompt = _prompt(messages[:index], tools, fmt, tokenizer, **kwargs)
        try:
            upto = render_messages(messages[: index + 1], tools, fmt, tokenizer, **kwargs)
        except Exception as error:
            raise _Refusal(f"{where}: format {fmt.name} cannot express it: {error}") from error
        if not upto.startswith(prompt):
            problem = f"{where}: the template does not render it behind the prompt a server feeds"
            continue
        completion = upto[len(prompt) :]
        end = max((at + len(mark) for mark in fmt.end_of_turn if (at := completion.rfind(mark)) >= 0), default=0)
        if not end:
            problem = f"{where}: the template renders no end of turn behind it"
            continue
        completion = completion[:end]
        lost, note = lost_in_answer(answer, completion, prompt, tools, fmt)
        if lost:
            problem = f"{where}: {lost}"
            continue
        if lost := lost_in_prompt(messages[:index], tools, prompt, fmt, tokenizer):
            raise _Refusal(lost)
        if note:
            warnings.append(f"{where}: {note}")
        return prompt, upto, completion, kwargs
    raise _Refusal(problem)


def _thinking_modes(answer: dict, fmt: Format) -> list[dict[str, Any]]:
    """Variables to try, in order. A turn with reasoning is served with thinking switched on, others as pinned."""
    if fmt.thinking is None:
        return [{}]
    reasons = bool(answer.get("reasoning_content")) or "</think>" in answer["content"]
    return [{fmt.thinking: True}] if reasons else [{}, {fmt.thinking: True}]
