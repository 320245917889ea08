"""The only file that writes labels.

Masks are not found by searching. For the assistant turn at index i

    prompt = what a server feeds:  render(messages[:i], tools, add_generation_prompt=True)
    upto   = render(messages[:i + 1], tools)

and the trained text is what `upto` adds to `prompt`, up to and including the end-of-turn token. The ids before it are
the ids of `prompt`, so training and serving see the same tokens. Where a template renders past turns differently later
on (hybrid reasoning, tools at the last user turn), the sequence is closed and a new one is started: a conversation
becomes several sequences, each exactly as served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from formats.as_text import TEXT_MARK
from formats.base import (
    Format,
    FormatError,
    clean_messages,
    place,
    render_messages,
    template_error,
    without_reasoning,
)
from formats.continuation import continuation
from formats.escape import escape_conversation
from formats.losses import lost_in_answer, lost_in_prompt, reasoning_of
from formats.roles import Answer, token_roles
from formats.tokens import Tokenized, check_tokenizer, tokens_of

IGNORE_INDEX = -100  # label of a token that is not trained; PyTorch's default


@dataclass
class Sequence:
    """One row for the trainer: `input_ids` and `labels` (the id where trained, else IGNORE_INDEX), not shifted."""

    text: str
    input_ids: list[int]
    labels: list[int]
    roles: list[str] = field(default_factory=list)


@dataclass
class Encoded:
    """A conversation's sequences, or the reason why there are none.

    status      "ok" (one sequence), "split" (several, the template does not keep its prefix), "refused" (none)
    escaped     number of control strings escaped in the contents
    warnings    what the template legitimately omits (reasoning that it has no place for)
    """

    status: str
    reason: str | None = None
    sequences: list[Sequence] = field(default_factory=list)
    escaped: int = 0
    warnings: list[str] = field(default_factory=list)


def encode(
    conversation: Mapping[str, Any],
    tokenizer: Any,
    fmt: Format,
    *,
    train_on: str = "all",
    control_tokens: str = "escape",
    reasoning: str = "keep",
    allow_unreadable_calls: bool = False,
    train_reasoning: str = "on",
    max_tokens: int | None = None,
) -> Encoded:
    """Token ids and labels of a conversation {"messages", "tools"}.

    train_on: "all" assistant turns or the "last" one; a message with "train": false is never trained.
    control_tokens: "escape", "error" (the row is refused) or "allow".
    reasoning: "keep" (where the template has no place for it: omitted, with a warning), "drop" or "refuse" such rows.
    allow_unreadable_calls: train calls although `fmt` cannot read them back; otherwise the row is refused.
    train_reasoning: "on", or "off" to mask answers up to the end of their reasoning; its closing tag is trained.
    max_tokens: the last sequence is the first one that is longer; later turns, longer still, are not encoded.
    Raises FormatError when tokenizer and format do not fit together; a row that cannot be expressed is "refused".
    """
    if train_on not in ("all", "last"):
        raise FormatError(f"train_on must be all or last, not {train_on!r}")
    if reasoning not in ("keep", "drop", "refuse"):
        raise FormatError(f"reasoning must be keep, drop or refuse, not {reasoning!r}")
    if train_reasoning not in ("on", "off"):
        raise FormatError(f"train_reasoning must be on or off, not {train_reasoning!r}")
    ends = _end_ids(tokenizer, fmt)
    turns = _trained_turns(conversation["messages"], train_on)
    escaped = 0
    try:
        messages = clean_messages(conversation["messages"], fmt)
        if reasoning == "drop":
            messages = [without_reasoning(message, fmt) for message in messages]
        tools = list(conversation.get("tools") or [])
        messages, tools, found = escape_conversation(messages, tools, tokenizer, fmt, control_tokens)
        escaped = len(found)
        if not turns:
            raise FormatError("no assistant message to train")
        encoder = _Encoder(
            messages,
            tools,
            tokenizer,
            fmt,
            ends,
            check_spelling=control_tokens == "escape",
            refuse_lost_reasoning=reasoning == "refuse",
            allow_unreadable_calls=allow_unreadable_calls,
            train_reasoning=train_reasoning == "on",
            max_tokens=max_tokens,
        )
        sequences = encoder.encode(turns)
        for sequence in sequences:
            sequence.text = sequence.text.replace(TEXT_MARK, "")
    except FormatError as error:
        return Encoded("refused", str(error), escaped=escaped)
    if len(sequences) == 1:
        return Encoded("ok", None, sequences, escaped, encoder.warnings)
    reason = f"the template changes earlier turns: {len(sequences)} sequences"
    return Encoded("split", reason, sequences, escaped, encoder.warnings)


def encode_prompt(
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    tokenizer: Any,
    fmt: Format,
    *,
    control_tokens: str = "escape",
) -> list[int]:
    """Ids that a server feeds before the model answers `messages`; the contents are escaped as in training.

    Raises FormatError when the template cannot express the messages, or drops one of them.
    """
    cleaned, tools, _ = escape_conversation(
        clean_messages(messages, fmt), list(tools or []), tokenizer, fmt, control_tokens
    )
    text = _prompt(cleaned, tools, fmt, tokenizer)
    if lost := lost_in_prompt(cleaned, tools, text, fmt, tokenizer):
        raise FormatError(lost)
    return list(tokens_of(tokenizer).tokenized(text).ids)


def _end_ids(tokenizer: Any, fmt: Format) -> set[int]:
    known = tokens_of(tokenizer).end_ids
    key = (fmt.name, fmt.end_of_turn, fmt.tokens)
    if key not in known:
        known[key] = set(check_tokenizer(tokenizer, fmt))
    return known[key]


def _trained_turns(messages: list[dict[str, Any]], train_on: str) -> list[int]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("train", True) is not False]


class _Turn(NamedTuple):
    """An assistant turn: `upto` starts with `prompt + completion`; `fmt` has the variables it was rendered with."""

    prompt: str
    completion: str
    upto: str
    fmt: Format


@dataclass
class _Encoder:
    """Encodes one conversation, whose messages are cleaned and escaped.

    check_spelling          refuse the row when a token sequence has a control token that its text does not spell
    refuse_lost_reasoning   refuse the row when the template has no place for an answer's reasoning
    allow_unreadable_calls  train calls that the format cannot read back
    train_reasoning         train the reasoning of answers
    max_tokens              stop behind the first turn whose prompt is longer
    """

    messages: list[dict]
    tools: list[dict]
    tokenizer: Any
    fmt: Format
    ends: set[int]
    check_spelling: bool
    refuse_lost_reasoning: bool = False
    allow_unreadable_calls: bool = False
    train_reasoning: bool = True
    max_tokens: int | None = None
    warnings: list[str] = field(default_factory=list)
    checked: tuple[str, int] = ("", 0)  # the last prompt in which nothing was lost, and its number of messages

    def encode(self, turns: list[int]) -> list[Sequence]:
        """The sequences that train the assistant messages `turns`. Raises FormatError with the reason of refusal."""
        tokens = tokens_of(self.tokenizer)
        sequences: list[Sequence] = []
        tokenized, turn, last = Tokenized(), None, -1
        answers: list[Answer] = []
        for index in turns:
            previous, previous_tokenized, previous_index = turn, tokenized, last
            turn, last = self._turn(index), index
            prompt_ids = tokens.tokenized(turn.prompt).ids
            tokenized = tokens.continued(turn.prompt, turn.completion, prompt_ids)
            answer_ids = tokenized.ids[len(prompt_ids) :]
            if not answer_ids or answer_ids[-1] not in self.ends:
                raise FormatError(f"{place(index, 'assistant')}: its last token is not the end of the turn")
            self._check_spelling(tokenized)
            labels: list[int] = []
            if previous is not None:
                if prompt_ids == sequences[-1].input_ids:
                    raise FormatError(
                        f"{place(index, 'assistant')}: the template writes nothing between it and the answer before it"
                    )
                if prompt_ids[: len(sequences[-1].input_ids)] == sequences[-1].input_ids:
                    labels = sequences.pop().labels
                else:
                    self._add_roles(sequences[-1], previous_tokenized, previous_index, previous.fmt, answers)
                    answers = []
            answers.append(Answer(index, len(turn.prompt), len(turn.prompt + turn.completion)))
            labels = labels + [IGNORE_INDEX] * (len(prompt_ids) - len(labels)) + answer_ids
            if not self.train_reasoning:
                self._mask_reasoning(index, turn, tokenized, len(prompt_ids), labels)
            sequences.append(Sequence(turn.prompt + turn.completion, tokenized.ids, labels))
            if self.max_tokens is not None and len(prompt_ids) > self.max_tokens:
                break
        assert turn is not None
        last, tokenized = self._append_rest(sequences[-1], turn, last, tokenized)
        self._check_spelling(tokenized)
        self._add_roles(sequences[-1], tokenized, last, turn.fmt, answers)
        return sequences

    def _mask_reasoning(self, index: int, turn: _Turn, tokenized: Tokenized, first: int, labels: list[int]) -> None:
        """Mask an answer from its token number `first` up to the end of its reasoning."""
        reasoning = reasoning_of(self.messages[index], self.fmt)
        start = turn.completion.find(reasoning) if reasoning else -1
        if start >= 0:
            start += len(turn.prompt)
            end = tokenized.before(start + len(reasoning))
            labels[first:end] = [IGNORE_INDEX] * (end - first)

    def _append_rest(self, sequence: Sequence, turn: _Turn, last: int, tokenized: Tokenized) -> tuple[int, Tokenized]:
        """Append, untrained, what the complete conversation has after the last trained turn: a newline, later turns.

        Returns the index of the last message that the sequence now contains, and its tokens.
        """
        text, end = turn.upto, len(self.messages) - 1
        if last != end:
            try:
                text = render_messages(self.messages, self.tools, turn.fmt, self.tokenizer)
            except Exception:  # later turns that the template cannot render are not needed
                return last, tokenized
        if text == sequence.text or not text.startswith(sequence.text):
            return last, tokenized
        complete = tokens_of(self.tokenizer).tokenized(text)
        trained = len(sequence.input_ids)
        if complete.ids[:trained] != sequence.input_ids:
            return last, tokenized
        sequence.text, sequence.input_ids = text, complete.ids
        sequence.labels = sequence.labels + [IGNORE_INDEX] * (len(complete.ids) - trained)
        return end, complete

    def _check_spelling(self, tokenized: Tokenized) -> None:
        if self.check_spelling and tokenized.unspelled:
            raise FormatError(
                f"a content becomes the control token {tokenized.unspelled[0]} although it does not spell it"
            )

    def _add_roles(
        self, sequence: Sequence, tokenized: Tokenized, last: int, fmt: Format, answers: list[Answer]
    ) -> None:
        messages = self.messages[: last + 1]
        sequence.roles = token_roles(sequence.text, tokenized, messages, self.tools, fmt, self.tokenizer, answers)

    def _turn(self, index: int) -> _Turn:
        """The assistant turn at `index`. Raises FormatError when it cannot be trained."""
        where = place(index, "assistant")
        past, answer = self.messages[:index], self.messages[index]
        problem = ""
        for fmt in _thinking_modes(answer, self.fmt):
            prompt = _prompt(past, self.tools, fmt, self.tokenizer)
            try:
                upto = render_messages(self.messages[: index + 1], self.tools, fmt, self.tokenizer)
            except Exception as error:
                raise FormatError(f"{where}: format {fmt.name} cannot express it: {template_error(error)}") from error
            completion = self._behind_prompt(index, prompt, upto, fmt)
            if completion is None:
                problem = f"{where}: the template does not render it after the prompt that a server feeds"
                continue
            upto = prompt + completion
            unwritten = fmt.unwritten_ends[bool(answer.get("tool_calls"))]
            if unwritten and not _ends_in(completion, fmt):
                completion += unwritten
                upto = prompt + completion
            ends = _ends_in(completion, fmt)
            if not ends:
                problem = f"{where}: the template renders no end of turn after it"
                continue
            if len(ends) > 1 and completion[ends[0] : ends[-1]].strip():
                problem = f"{where}: the template writes an end of turn before it or inside it"
                continue
            completion = completion[: ends[0]]
            lost, warning = lost_in_answer(answer, completion, self.tools, fmt)
            if not lost and warning and self.refuse_lost_reasoning:
                lost = warning
            if not lost and answer.get("tool_calls") and not self.allow_unreadable_calls and fmt.unreadable_calls:
                lost = f"{fmt.unreadable_calls}; choose another --format, or use --allow_unreadable_calls"
            if lost:
                problem = f"{where}: {lost}"
                continue
            if lost := lost_in_prompt(past, self.tools, prompt, self.fmt, self.tokenizer, self.checked):
                raise FormatError(lost)
            self.checked = (prompt, len(past))
            if warning:
                self.warnings.append(f"{where}: {warning}")
            return _Turn(prompt, completion, upto, fmt)
        raise FormatError(problem)

    def _behind_prompt(self, index: int, prompt: str, upto: str, fmt: Format) -> str | None:
        """What `upto` adds to the prompt that a server feeds, None for nothing.

        A template that always thinks opens reasoning in the prompt and writes none, or does not close it.
        """
        past, answer = self.messages[:index], self.messages[index]
        opening, closing = fmt.opened_reasoning
        if opening and prompt.endswith(opening):
            start = prompt if upto.startswith(prompt) else prompt.removesuffix(opening)
            written = upto.removeprefix(start)
            if upto.startswith(start) and (start != prompt or closing.strip() not in written):
                if closing.strip() in answer["content"]:  # a template may leave the line breaks behind its reasoning
                    written = written.lstrip("\n")
                return reasoning_of(answer, fmt) + closing + written
        return continuation(prompt, upto, past[-1]["content"], fmt.reasoning_tags)


def _ends_in(text: str, fmt: Format) -> list[int]:
    """Where the end-of-turn strings in a text end, in order."""
    return sorted(
        match.end() for mark in fmt.end_of_turn if mark in text for match in re.finditer(re.escape(mark), text)
    )


def _prompt(messages: list[dict], tools: list[dict], fmt: Format, tokenizer: Any) -> str:
    if not messages:
        raise FormatError(
            f"{place(0, 'assistant')}: nothing comes before it, so no server ever generates it; "
            'set "train": false on it'
        )
    try:
        return render_messages(messages, tools, fmt, tokenizer, add_generation_prompt=True)
    except Exception as error:  # templates raise anything: TemplateError, TypeError, UndefinedError …
        where = f"{place(len(messages) - 1)} and those before it"
        raise FormatError(f"{where}: format {fmt.name} cannot express them: {template_error(error)}") from error


def _thinking_modes(answer: dict, fmt: Format) -> list[Format]:
    """Variants to try in order: a turn with reasoning is served with thinking on, others as `template_kwargs` say."""
    if fmt.thinking is None:
        return [fmt]
    thinking = fmt.with_kwargs(**{fmt.thinking: True})
    reasons = bool(answer.get("reasoning_content")) or "</think>" in answer["content"]
    return [thinking] if reasons else [fmt, thinking]
