"""What a chat template writes for calls, derived from differences between its renderings.

The template renders turns made of words that occur nowhere else; what stands between the words is its grammar. The idea
is that of llama.cpp's common/chat-diff-analyzer.cpp, which derives parsers for serving.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from formats.call_grammar import (
    ANY_ID,
    ANY_NAME,
    ANY_NUMBER,
    CallGrammar,
    Core,
    NamedJsonCore,
    ObjectCore,
    PythonCore,
    RelaxedCore,
    TaggedCore,
)
from formats.calls import STRICT

# JSON and Python write these words as they are, and no template has them.
NAMES, KEYS, VALUES = ("fq0zk", "gq0zk"), ("kq1zk", "kq2zk"), ("vq1zk", "vq2zk")
ANSWER, TEXT = "aq1zk", "tq0zk"
ARGUMENTS = dict(zip(KEYS, VALUES, strict=True))
IDS = ("callid000", "callid001")  # nine characters, as Mistral's templates require
USER = {"role": "user", "content": "wq0zk"}
_PARAMETERS = {
    "type": "object",
    "properties": {key: {"type": "string", "description": "d"} for key in KEYS},
    "required": list(KEYS),
}
TOOLS = [{"type": "function", "function": {"name": n, "description": "d", "parameters": _PARAMETERS}} for n in NAMES]


def call(number: int = 0, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """The first or second probe call."""
    return {"name": NAMES[number], "arguments": ARGUMENTS if arguments is None else arguments}


def answer(content: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    """An assistant message."""
    entries = [{"type": "function", "id": number, "function": one} for number, one in zip(IDS, calls, strict=False)]
    return {"role": "assistant", "content": content, **({"tool_calls": entries} if entries else {})}


@dataclass(frozen=True)
class Turns:
    """A template's assistant turns. render(messages, add_generation_prompt=…) -> text, None where it raises."""

    render: Callable[..., str | None]

    def text(self, content: str = "", *calls: dict[str, Any]) -> str | None:
        """What the template writes for an assistant turn behind a user's, without reasoning; None where it raises."""
        prompt = self.render([USER], add_generation_prompt=True)
        whole = self.render([USER, answer(content, *calls)])
        if prompt is None or whole is None:
            return None
        start = prompt if whole.startswith(prompt) else _without_partial_tag(_common_prefix(prompt, whole))
        text = whole[len(start) :]
        reasoning, end, rest = text.partition("</think>")
        return rest if end and not any(word in reasoning for word in (*NAMES, ANSWER, TEXT)) else text

    def continuation(self, turn: dict[str, Any], word: str, following: dict[str, Any]) -> str | None:
        """What stands between the last `word` of an assistant turn and the content of the message that follows it."""
        text = self.render([{**USER, "content": "xq0zk"}, turn, following])
        before, found, _ = (text or "").rpartition(following["content"])
        return before.rpartition(word)[2] if found and word in before else None


def behind_last(word: str, text: str) -> str:
    """What follows the last `word` in `text`; "" where it does not occur."""
    return text.rpartition(word)[2] if word in text else ""


def cut(text: str, ends: tuple[str, ...]) -> str:
    """`text` up to its first end of turn."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def writes_calls(turns: Turns) -> bool:
    """Whether the template shows the model its tools and writes calls."""
    one, prompt = turns.text("", call()), turns.render([USER], add_generation_prompt=True)
    return bool(one and prompt and NAMES[0] in prompt and all(word in one for word in (NAMES[0], *VALUES)))


@dataclass(frozen=True)
class _Found:
    """A turn with one call, taken apart."""

    opening: str
    core: Core
    between: str | None
    closing: str


def call_grammar(turns: Turns, ends: tuple[str, ...]) -> CallGrammar | None:
    """The grammar of the template's calls; None when it writes none, or none of the kinds in `formats.call_grammar`."""
    one = turns.text("", call())
    if one is None or not all(word in one for word in (NAMES[0], *VALUES)):
        return None
    one = cut(one, ends).replace(IDS[0], ANY_ID)
    pair = cut(turns.text("", call(), call(1)) or "", ends)
    pair = pair.replace(IDS[0], ANY_ID).replace(IDS[1], ANY_ID) if NAMES[1] in pair else ""
    found = _object(one, pair) or _named_json(one, pair) or _python(one, pair) or _relaxed(one, pair)
    found = found or _tagged(one, pair, turns, ends)
    if found is None:
        return None
    plain = cut(turns.text(ANSWER) or "", ends).partition(ANSWER)
    wrappers = [(plain[0].strip(), plain[2].strip())] if plain[1] else []
    opening, more = _opening_beside_text(found, one, cut(turns.text(TEXT, call()) or "", ends))
    # The longest first; of two equally long ones that of an answer without calls.
    ordered = sorted(filter(any, dict.fromkeys(wrappers + more)), key=lambda pair: -len("".join(pair)))
    return CallGrammar(opening, found.core, found.between, found.closing, tuple(ordered))


def _opening_beside_text(found: _Found, one: str, beside: str) -> tuple[str, list[tuple[str, str]]]:
    """(the opening that turns with and without text share, what the template puts around the text)."""
    opening, behind = found.opening.strip(), one[len(found.opening) :]
    head, text, rest = beside.replace(IDS[0], ANY_ID).partition(TEXT)
    if not text or not opening or behind not in rest:
        return opening, []
    other = rest[: rest.index(behind)].replace(NAMES[0], ANY_NAME).rstrip()
    shared = _without_partial_first_tag(_common_suffix(opening, other))
    if not shared:
        return opening, []
    wrappers = [(head.strip(), other.removesuffix(shared).strip())]
    if opening != shared:
        wrappers.append((opening.removesuffix(shared).strip(), ""))
    return shared, wrappers


# --- the ways to write a call: each takes a turn with one call, and one with two calls ("" where there is none) -------


def _json_values(text: str, start: int, *words: str) -> Iterator[tuple[Any, int, int]]:
    """(value, start, end) of the JSON objects and lists that hold all the words, outermost first."""
    for match in re.compile(r"[{\[]").finditer(text, start):
        try:
            value, end = STRICT.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if all(word in text[match.start() : end] for word in words):
            yield value, match.start(), end


def _object(one: str, pair: str) -> _Found | None:
    for depth, (value, start, end) in enumerate(_json_values(one, 0, NAMES[0], *VALUES)):
        item = value[0] if isinstance(value, list) else value
        arguments = _path(item, _is_arguments)
        name = _path(item, lambda node: node == NAMES[0])
        if arguments is None or (name is None and arguments != (NAMES[0],)):
            continue
        first = next(islice(_json_values(pair, 0, NAMES[0], *VALUES), depth, None), None)
        second = first and next(islice(_json_values(pair, first[2], NAMES[1], *VALUES), depth, None), None)
        if second and isinstance(value, list):  # a list for each call
            continue
        core = ObjectCore(None, ()) if name is None else ObjectCore(name, arguments)
        return _Found(one[:start], core, pair[first[2] : second[1]] if first and second else None, one[end:])
    return None


def _is_arguments(node: Any) -> bool:
    try:
        return node == ARGUMENTS or (isinstance(node, str) and json.loads(node) == ARGUMENTS)
    except ValueError:
        return False


def _path(node: Any, hit: Callable[[Any], bool]) -> tuple[str, ...] | None:
    """The keys that lead to the value for which `hit` holds."""
    if hit(node):
        return ()
    for key, inner in node.items() if isinstance(node, dict) else ():
        if (rest := _path(inner, hit)) is not None:
            return (key, *rest)
    return None


def _named_json(one: str, pair: str) -> _Found | None:
    value, start, end = next(_json_values(one, 0, *VALUES), (None, 0, 0))
    name = one.rfind(NAMES[0], 0, start)
    if name < 0 or value != ARGUMENTS:
        return None
    middle, between = one[name + len(NAMES[0]) : start], None
    first = next(_json_values(pair, 0, *VALUES), None)
    second = first and next(_json_values(pair, first[2], *VALUES), None)
    if first and second and (at := pair.rfind(NAMES[1], first[2], second[1])) >= 0:
        middle = _with_any_number(middle, pair[at + len(NAMES[1]) : second[1]])
        between = pair[first[2] : at].replace(NAMES[1], ANY_NAME)
    return _Found(one[:name].replace(NAMES[0], ANY_NAME), NamedJsonCore(middle), between, one[end:])


def _python(one: str, pair: str) -> _Found | None:
    start = one.find(f"{NAMES[0]}({KEYS[0]}=")
    return _measured(PythonCore(), one, start, pair) if start >= 0 else None


def _relaxed(one: str, pair: str) -> _Found | None:
    key, value = KEYS[0], VALUES[0]
    match = re.search(rf"{NAMES[0]}(\S*?)\{{{key}:(?P<quote>\S+?){value}(?P=quote),{KEYS[1]}:", one)
    return _measured(RelaxedCore(match[1], match["quote"]), one, match.start(), pair) if match else None


def _measured(core: Core, one: str, start: int, pair: str) -> _Found | None:
    """The parts around calls whose ends `core` finds."""
    try:
        _, end = core(one, start, None)
        between = None
        if pair:
            _, first = core(pair, pair.find(NAMES[0]), None)
            second = pair.find(NAMES[1], first)
            between = pair[first:second] if second >= 0 else None
    except ValueError:
        return None
    return _Found(one[:start], core, between, one[end:])


def _tagged(one: str, pair: str, turns: Turns, ends: tuple[str, ...]) -> _Found | None:
    name = one.rfind(NAMES[0], 0, one.find(KEYS[0]))  # the name may occur twice
    words = (NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    parts = re.fullmatch("(.*?)".join(map(re.escape, words)) + "(.*)", one[max(0, name) :], re.DOTALL)
    if name < 0 or not parts:
        return None
    behind_name, equals, separator, equals_again, tail = parts.groups()
    if equals != equals_again or any(word in "".join(parts.groups()) for word in (*KEYS, *VALUES)):
        return None  # such as <key>value</key>
    empty = cut(turns.text("", call(0, {})) or "", ends)
    name_end = _without_partial_tag(_common_prefix(behind_name, behind_last(NAMES[0], empty)))
    if NAMES[0] not in empty:
        name_end = behind_name.removesuffix(_common_suffix(behind_name, separator))
    key_start = behind_name.removeprefix(name_end).strip()
    if not key_start or not separator.rstrip().endswith(key_start):
        return None
    value_end = _common_prefix(separator[: separator.rindex(key_start)], tail).rstrip()
    if not value_end.strip():
        return None
    closing, between = tail.removeprefix(value_end), None
    if pair and (second := pair.find(NAMES[1])) >= 0:
        last = pair.rfind(NAMES[1], 0, pair.find(KEYS[0], second))
        end = pair.rfind(VALUES[1], 0, second) + len(VALUES[1])
        between = pair[end:last].removeprefix(value_end).replace(NAMES[1], ANY_NAME)
        name_end = _with_any_number(name_end, pair[last + len(NAMES[1]) :][: len(name_end)])
    number = turns.text("", call(0, {KEYS[0]: 7})) or ""
    match = re.search(rf"{KEYS[0]}(.*?)7{re.escape(value_end)}", number, re.DOTALL)
    marks = _difference(equals, match[1]) if match else (equals, None, "")
    json_values = equals.endswith('"') and value_end.startswith('"') and _writes_json(turns, KEYS[0] + equals[:-1])
    if json_values:
        marks, value_end = (equals[:-1], None, ""), value_end[1:]
    core = TaggedCore(name_end, key_start, marks, value_end, (key_start, closing, between or ""), json_values)
    return _Found(one[:name].replace(NAMES[0], ANY_NAME), core, between, closing)


def _writes_json(turns: Turns, before: str) -> bool:
    """Whether the template writes JSON behind `before`, whatever the value."""
    for value in ('"\n', 7, {"a": ["b", None]}):
        try:
            written, _ = STRICT.raw_decode((turns.text("", call(0, {KEYS[0]: value})) or "").partition(before)[2])
        except ValueError:
            return False
        if written != value:
            return False
    return True


def _difference(text: str, other: str) -> tuple[str, str | None, str]:
    """(common start, what `text` has in between, common end); (text, None, "") where the texts are equal."""
    if text == other:
        return text, None, ""
    head = _common_prefix(text, other)
    tail = _common_suffix(text[len(head) :], other[len(head) :])
    return head, text[len(head) : len(text) - len(tail)], tail


def _with_any_number(first: str, second: str) -> str:
    """`first` with a wildcard for its numbers where `second` differs from it in them alone."""
    generic = re.sub(r"\d+", ANY_NUMBER, first)
    return generic if first != second and generic == re.sub(r"\d+", ANY_NUMBER, second) else first


def _common_prefix(first: str, second: str) -> str:
    size = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        size += 1
    return first[:size]


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]


def _without_partial_tag(text: str) -> str:
    """`text` without a tag that is only begun at its end."""
    start = max(text.rfind(mark) for mark in "<[")
    return text[:start] if start >= 0 and not re.search(r"[>\]]", text[start:]) else text


def _without_partial_first_tag(text: str) -> str:
    """`text` without the rest of a tag at its start."""
    match = re.match(r"[^<\[>\]]*[>\]]", text)
    return text[match.end() :] if match else text
