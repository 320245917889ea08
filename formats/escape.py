"""Control tokens inside contents are read as text, equally in training, evaluation and chat.

A mark after the first character of a control string keeps templates and parsers from reading it as control. Where the
tokenizer can encode the string as ordinary text, `formats.tokens` removes the mark and does so (`formats.as_text`).
Where it cannot (a marker that is no token of its own, or one that the tokenizer always finds), the mark is a zero-width
space (U+200B) that stays in the text.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from formats.as_text import TEXT_MARK, marked
from formats.base import Format, FormatError, place
from formats.rendering import CachedTools
from formats.tokens import Tokens, added_tokens, tokens_of

MARK = "\u200b"
CACHED_TOOL_LISTS = 1_000

# Vocabulary entries of some tokenizers (Gemma) that are ordinary markup, not control tokens.
_HTML = re.compile(
    "a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|s|span|strong|sub|sup|table|tbody|td|tfoot|th|"
    "thead|tr|u|ul"
)


class Escaper:
    """Finds and escapes the control strings of one tokenizer and one format.

    everywhere  pattern of strings that no content may contain
    assistant   the same, and the strings that are calls when the assistant writes them
    """

    def __init__(self, tokenizer: Any, fmt: Format) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        control = {text for text in added_tokens(tokenizer) if text in special or not _is_plain(text)}
        control = {text for text in control.union(fmt.control_tokens) if text.strip() and _can_be_split(text)}
        with_calls = control | {text for text in fmt.call_markers if _can_be_split(text)}
        self.everywhere = _pattern(frozenset(control))
        self.assistant = _pattern(frozenset(with_calls))
        self.as_text = frozenset(text for text in with_calls if marked(text) in tokens_of(tokenizer).as_text)
        self.encodable = _pattern(self.as_text)
        # Answers of models that were trained with an earlier version hold the visible mark.
        self.marked = _pattern(frozenset(marked(text, mark) for text in with_calls for mark in (MARK, TEXT_MARK)))
        self.stray = re.compile(f"({self.marked.pattern})|{TEXT_MARK}")
        self.keep_reasoning = fmt.reasoning or "</think>" in control
        self.lone_end = fmt.reasoning
        self._tools: dict[str, tuple[CachedTools, list[str]]] = {}

    def conversation(self, messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
        """(messages, tools, what was escaped: "message 4 (user): <|eot_id|>"); the input is not changed.

        The tools may be shared with other conversations: never change them in place.
        """
        found: list[str] = []
        out = [self._message(message, index, found) for index, message in enumerate(messages)]
        tools, found_in_tools = self._cached_tools(tools)
        return out, tools, found + found_in_tools

    def _cached_tools(self, tools: list[dict]) -> tuple[list[dict], list[str]]:
        """(tools, what was escaped); most rows repeat the tools of an earlier one, which are found by their JSON."""
        if not tools:
            return tools, []
        text = json.dumps(tools, ensure_ascii=False)
        if text not in self._tools:
            if len(self._tools) >= CACHED_TOOL_LISTS:
                self._tools.clear()
            found: list[str] = []
            escaped = [self._escaped(tool, self.everywhere, f"tool {n}", found) for n, tool in enumerate(tools, 1)]
            self._tools[text] = CachedTools(escaped, text), found
        return self._tools[text]

    def undo(self, value: Any) -> Any:
        """`value` without the marks inside control strings; other zero-width spaces stay."""
        if isinstance(value, str):
            if MARK not in value and TEXT_MARK not in value:
                return value
            return self.marked.sub(lambda match: match[0][0] + match[0][2:], value)
        if isinstance(value, list):
            return [self.undo(item) for item in value]
        if isinstance(value, dict):
            return {self.undo(key): self.undo(item) for key, item in value.items()}
        return value

    def decoded(self, text: str, controls: list[int]) -> str:
        """A generated text with marks in the control strings that do not start at one of the positions `controls`."""
        return self.encodable.sub(lambda match: match[0] if match.start() in controls else self._marked(match[0]), text)

    def _marked(self, text: str) -> str:
        return marked(text, TEXT_MARK if text in self.as_text else MARK)

    def _message(self, message: dict, index: int, found: list[str]) -> dict:
        role = message["role"]
        pattern = self.assistant if role == "assistant" else self.everywhere
        where = place(index, role)
        changed = {}
        for key, value in message.items():
            if key == "content" and role == "assistant" and self.keep_reasoning:
                changed[key] = self._answer(value, where, found)
            elif key != "role":
                changed[key] = self._escaped(value, pattern, where, found)
        return {**message, **changed}

    def _answer(self, text: str, where: str, found: list[str]) -> str:
        """An assistant's text; a reasoning block at its start keeps its two tags, because the model writes them."""
        head, closing, tail = text.partition("</think>")
        before, opening, inside = head.partition("<think>")
        if not closing or (opening and before.strip()) or not (opening or self.lone_end):
            return self._text(text, self.assistant, where, found)
        if not opening:
            before, inside = "", head
        inside = self._text(inside, self.assistant, where, found)
        return before + opening + inside + closing + self._text(tail, self.assistant, where, found)

    def _escaped(self, value: Any, pattern: re.Pattern, where: str, found: list[str]) -> Any:
        if isinstance(value, str):
            return self._text(value, pattern, where, found)
        if isinstance(value, list):
            return [self._escaped(item, pattern, where, found) for item in value]
        if isinstance(value, dict):
            return {
                self._escaped(key, pattern, where, found): self._escaped(item, pattern, where, found)
                for key, item in value.items()
            }
        return value

    def _text(self, text: str, pattern: re.Pattern, where: str, found: list[str]) -> str:
        if TEXT_MARK in text and (kept := self.stray.sub(lambda match: match[1] or "", text)) != text:
            found.append(f"{where}: U+F0000")
            text = kept
        # Control strings may overlap: escaping one can expose the next, so search until nothing is found.
        while match := pattern.search(text):
            pieces, at = [], 0
            while match:
                found.append(f"{where}: {match.group()}")
                pieces += [text[at : match.start() + 1], self._marked(match.group())[1]]
                at = match.start() + 1
                match = pattern.search(text, at)
            text = "".join([*pieces, text[at:]])
        return text


def _is_plain(text: str) -> bool:
    """Whether an added token that is not special is ordinary text: white space, markup, or a word or letter with
    which a vocabulary was extended."""
    bare = text.strip(" \t\r\n\u2581")
    return len(bare) <= 1 or bare.isalnum() or _HTML.fullmatch(text.strip("</>").lower()) is not None


def _can_be_split(text: str) -> bool:
    """False for a single character (a YAML format may end calls with ")"), which a mark cannot take apart."""
    return text not in marked(text)


@lru_cache(maxsize=64)
def _pattern(strings: frozenset[str]) -> re.Pattern:
    longest_first = sorted(strings, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _escaper_of(tokens: Tokens, fmt: Format) -> Escaper:
    key = (fmt.control_tokens, fmt.call_markers, fmt.reasoning)
    if key not in tokens.escapers:
        tokens.escapers[key] = Escaper(tokens.tokenizer, fmt)
    return tokens.escapers[key]


def escape_conversation(
    messages: list[dict],
    tools: list[dict],
    tokenizer: Any,
    fmt: Format,
    control_tokens: str = "escape",
) -> tuple[list[dict], list[dict], list[str]]:
    """(messages, tools, findings) under the policy `escape`, `error` (raises FormatError at the first) or `allow`."""
    if control_tokens == "allow":
        return messages, tools, []
    if control_tokens not in ("escape", "error"):
        raise FormatError(f"control_tokens must be escape, error or allow, not {control_tokens!r}")
    messages, tools, found = _escaper_of(tokens_of(tokenizer), fmt).conversation(messages, tools)
    if found and control_tokens == "error":
        raise FormatError(f"control token in {found[0]}; use --control_tokens escape to train it as text")
    return messages, tools, found


def unmarked_as_special(tokenizer: Any, fmt: Format) -> list[str]:
    """The control tokens that the tokenizer does not declare as special, so that a server has to be told of them."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(_escaper_of(tokens_of(tokenizer), fmt).as_text - special)


def unescape(value: Any, tokenizer: Any, fmt: Format) -> Any:
    """Remove the marks from generated text, a call's arguments, or anything built from strings.

    Use it on what is shown or executed; a text that goes back into a conversation is escaped again there.
    """
    return _escaper_of(tokens_of(tokenizer), fmt).undo(value)


def decode(ids: list[int], tokenizer: Any, fmt: Format) -> str:
    """The text of generated ids for `Format.parse`: control strings that ordinary tokens spell are marked."""
    ids, tokens = list(ids), tokens_of(tokenizer)

    def text_of(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text, escaper = text_of(ids), _escaper_of(tokens, fmt)
    found, control = escaper.encodable.findall(text), set(tokens.added.values())
    if len(found) <= sum(number in control for number in ids):
        return text
    return escaper.decoded(text, [len(text_of(ids[:at])) for at, number in enumerate(ids) if number in control])
