"""Control tokens inside contents: neutralised on the text, the same way for training, evaluation and chat.

A zero-width space (U+200B) goes behind the first character of every control string, so that it is read as text by any
tokenizer and any template. Splitting special tokens in the tokenizer would not do: a server tokenises whole prompts.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from formats.base import Format, FormatError, place
from formats.rendering import KnownTools
from formats.tokens import Tokens, added_tokens, tokens_of

MARK = "\u200b"
SEEN_TOOLS = 1_000  # lists of tools whose neutralised copy is kept

# Vocabulary entries of some tokenizers (Gemma) that are ordinary mark-up, not control: a user's HTML stays as it is.
_HTML = frozenset(
    (
        *("a", "b", "blockquote", "br", "caption", "code", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i"),
        *("img", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "tfoot", "th"),
        *("thead", "tr", "u", "ul"),
    )
)


class Escaper:
    """Finds and neutralises the control strings of one tokenizer and one format.

    `everywhere` are strings that no content may hold, `assistant` those that additionally are calls when the
    assistant writes them.
    """

    def __init__(self, tokenizer: Any, fmt: Format) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        control = {text for text in added_tokens(tokenizer) if text in special or not _is_plain(text)}
        control = {text for text in control.union(fmt.control_tokens) if text.strip() and _can_be_split(text)}
        with_calls = control | {text for text in fmt.call_markers if _can_be_split(text)}
        self.everywhere = _pattern(tuple(sorted(control)))
        self.assistant = _pattern(tuple(sorted(with_calls)))
        self.marked = _pattern(tuple(sorted(_split(text) for text in with_calls)))
        self._seen: dict[str, tuple[KnownTools, list[str]]] = {}
        self.keep_reasoning = fmt.reasoning or "</think>" in control
        self.lone_end = fmt.reasoning

    def conversation(self, messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
        """(messages, tools, what was neutralised: "message 4 (user): <|eot_id|>"); the input is not changed.

        The tools may be shared with other conversations: never change them in place.
        """
        found: list[str] = []
        out = [self._message(message, index, found) for index, message in enumerate(messages)]
        tools, in_tools = self._known_tools(tools)
        return out, tools, found + in_tools

    def _known_tools(self, tools: list[dict]) -> tuple[list[dict], list[str]]:
        """(tools, what was neutralised in them); tools repeat row after row, so their JSON leads to those seen before.

        The result is a copy of its own: a caller who changes tools in place gets the changed ones next time.
        """
        if not tools:
            return tools, []
        try:
            text = json.dumps(tools, ensure_ascii=False)
        except (TypeError, ValueError):  # objects of Python that some template may know how to print
            return self._escaped_tools(tools)
        if text not in self._seen:
            if len(self._seen) >= SEEN_TOOLS:
                self._seen.clear()
            escaped, found = self._escaped_tools(json.loads(text))
            self._seen[text] = KnownTools(escaped, text), found
        return self._seen[text]

    def _escaped_tools(self, tools: list[dict]) -> tuple[list[dict], list[str]]:
        found: list[str] = []
        tools = [self._deep(tool, self.everywhere, f"tool {n}", found) for n, tool in enumerate(tools, start=1)]
        return tools, found

    def undo(self, value: Any) -> Any:
        """`value` with the marks inside control strings removed; other zero-width spaces stay."""
        if isinstance(value, str):
            return self.marked.sub(lambda match: match.group().replace(MARK, "", 1), value) if MARK in value else value
        if isinstance(value, list):
            return [self.undo(item) for item in value]
        if isinstance(value, dict):
            return {self.undo(key): self.undo(item) for key, item in value.items()}
        return value

    def _message(self, message: dict, index: int, found: list[str]) -> dict:
        role = message["role"]
        pattern = self.assistant if role == "assistant" else self.everywhere
        where = place(index, role)
        changed = {}
        for key, value in message.items():
            if key == "role":
                continue
            if key == "content" and role == "assistant" and self.keep_reasoning:
                changed[key] = self._answer(value, where, found)
            elif _holds(value, pattern):
                changed[key] = self._deep(value, pattern, where, found)
        return {**message, **changed} if changed else message

    def _answer(self, text: str, where: str, found: list[str]) -> str:
        """An assistant's text; a reasoning block at its start keeps its two tags, they are what the model writes."""
        head, closing, tail = text.partition("</think>")
        before, opening, inside = head.partition("<think>")
        if not closing or (opening and before.strip()) or not (opening or self.lone_end):
            return self._text(text, self.assistant, where, found)
        if not opening:
            before, inside = "", head
        inside = self._text(inside, self.assistant, where, found)
        return before + opening + inside + closing + self._text(tail, self.assistant, where, found)

    def _deep(self, value: Any, pattern: re.Pattern, where: str, found: list[str]) -> Any:
        if isinstance(value, str):
            return self._text(value, pattern, where, found)
        if isinstance(value, list):
            return [self._deep(item, pattern, where, found) for item in value]
        if isinstance(value, dict):
            return {
                self._text(key, pattern, where, found): self._deep(item, pattern, where, found)
                for key, item in value.items()
            }
        return value

    def _text(self, text: str, pattern: re.Pattern, where: str, found: list[str]) -> str:
        # Again and again, because control strings may overlap: neutralising one can lay bare the next.
        while match := pattern.search(text):
            while match:
                found.append(f"{where}: {match.group()}")
                at = match.start() + 1
                text = text[:at] + MARK + text[at:]
                match = pattern.search(text, at)
        return text


def _is_plain(text: str) -> bool:
    """Whether an added token that is not special is ordinary text: white space, mark-up, a word or a letter of a
    vocabulary that was extended."""
    bare = text.strip(" \t\r\n\u2581")
    return len(bare) <= 1 or bare.isalnum() or text.strip("</>").lower() in _HTML


def _split(text: str) -> str:
    return text[0] + MARK + text[1:]


def _can_be_split(text: str) -> bool:
    """Not one character alone (the end ")" of a format of one's own): a mark cannot take that apart."""
    return text not in _split(text)


@lru_cache(maxsize=64)
def _pattern(strings: tuple[str, ...]) -> re.Pattern:
    if not strings:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True)))


def _holds(value: Any, pattern: re.Pattern) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, list):
        return any(_holds(item, pattern) for item in value)
    if isinstance(value, dict):
        return any(_holds(key, pattern) or _holds(item, pattern) for key, item in value.items())
    return False


def escaper_of(tokens: Tokens, fmt: Format) -> Escaper:
    key = (fmt.control_tokens, fmt.call_markers, fmt.reasoning)
    known = tokens.escapers
    if key not in known:
        known[key] = Escaper(tokens.tokenizer, fmt)
    return known[key]


def escape_conversation(
    messages: list[dict],
    tools: list[dict],
    tokenizer: Any,
    fmt: Format,
    control_tokens: str = "escape",
    *,
    tokens: Tokens | None = None,
) -> tuple[list[dict], list[dict], list[str]]:
    """(messages, tools, findings) under the policy `escape`, `error` (raises FormatError at the first) or `allow`.

    tokens: `tokens_of(tokenizer)` where the caller has it at hand; finding it takes longer than most messages do.
    """
    if control_tokens == "allow":
        return messages, tools, []
    if control_tokens not in ("escape", "error"):
        raise FormatError(f"control_tokens must be escape, error or allow, not {control_tokens!r}")
    messages, tools, found = escaper_of(tokens or tokens_of(tokenizer), fmt).conversation(messages, tools)
    if found and control_tokens == "error":
        raise FormatError(f"control token in {found[0]}; use --control_tokens escape to train it as text")
    return messages, tools, found


def unescape(value: Any, tokenizer: Any, fmt: Format) -> Any:
    """Take the marks out of generated text, of a call's arguments, or of anything built from strings.

    Use it on what is shown or executed; a text that is put back into a conversation is escaped again there.
    """
    return escaper_of(tokens_of(tokenizer), fmt).undo(value)
