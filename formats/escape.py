"""Control tokens inside contents are escaped in the text itself, equally for training, evaluation and chat.

A zero-width space (U+200B) after the first character of a control string makes any tokenizer and any template read it
as text. Splitting special tokens in the tokenizer would not help, because a server tokenises complete prompts.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

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
        self.marked = _pattern(frozenset(map(_split, with_calls)))
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
        # Control strings may overlap: escaping one can expose the next, so search until nothing is found.
        while match := pattern.search(text):
            while match:
                found.append(f"{where}: {match.group()}")
                at = match.start() + 1
                text = text[:at] + MARK + text[at:]
                match = pattern.search(text, at)
        return text


def _is_plain(text: str) -> bool:
    """Whether an added token that is not special is ordinary text: white space, markup, or a word or letter with
    which a vocabulary was extended."""
    bare = text.strip(" \t\r\n\u2581")
    return len(bare) <= 1 or bare.isalnum() or _HTML.fullmatch(text.strip("</>").lower()) is not None


def _split(text: str) -> str:
    return text[0] + MARK + text[1:]


def _can_be_split(text: str) -> bool:
    """False for a single character (a YAML format may end calls with ")"), which a mark cannot take apart."""
    return text not in _split(text)


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


def unescape(value: Any, tokenizer: Any, fmt: Format) -> Any:
    """Remove the marks from generated text, a call's arguments, or anything built from strings.

    Use it on what is shown or executed; a text that goes back into a conversation is escaped again there.
    """
    return _escaper_of(tokens_of(tokenizer), fmt).undo(value)
