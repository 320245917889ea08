"""Seeds of every kind of input, and mutations of JSON values and bytes, for tests/fuzz.py."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

from tests.formats.cases import ROWS
from tests.formats.fuzz import FRAGMENTS, conversation
from tests.rows import GOOD
from tests.shape_rows import EXAMPLES

Path = tuple[Any, ...]
# Texts of the seeds that must not get lost; each gets a number of its own.
_TEXTS = re.compile(r"\b(Dim|Done|Hello|Hi|See you|No lamp|Greet|It is dim)\b")
PLANTED = re.compile(r"zq\d+z")
KEYS = (
    "role", "from", "content", "value", "messages", "conversations", "tools", "tool_calls", "function", "name",
    "arguments", "parameters", "parts", "text", "type", "prompt", "completion", "answer", "answers", "question",
    "chosen", "system", "reasoning_content", "train", "weight", "id", "tool_call_id", "input", "output",
    "thinking", "history", "", "$ref", "x" * 300, "<|im_end|>", "날씨", "__class__",
)  # fmt: skip
_SPECIAL: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, 1e308, -0.0, 1e-320, "", " ", "\n", "null", "[]", "{}", '"', "\x00", "\ud83d",
    "\x1b]52;c;eA==\x07", "007", "1e3", [], {}, [[]], [None], {"": None}, [{}], "[", '{"a": 1, "a": 2}', "NaN",
    '{"name": "dim", "arguments": {"pct": 5}}', '[dim(pct=5)]', "<tool_call>{}</tool_call>", "<think>", "</think>",
    "=cmd|' /C calc'!A1", "{{ 7*7 }}", "{% for x in range(9**9) %}", "\u202e", "\ufeff", "a" * 5000, "user",
    "assistant", "tool", "system", "function_call", "image_url", {"type": "text", "text": "part"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "more"}, {"type": "image", "url": "x"}, {"functionCall": {"name": "f"}},
    "[" * 3000, '{"a":' * 300 + "1" + "}" * 300,
)  # fmt: skip


def planted(row: Any) -> Any:
    """The row with a number behind every text that must stay: "Dim" -> "Dim zq3z"."""
    numbers = iter(range(10**6))
    text = _TEXTS.sub(lambda match: f"{match[0]} zq{next(numbers)}z", json.dumps(row, ensure_ascii=False))
    return json.loads(text)


def row_seeds() -> list[dict[str, Any]]:
    """One row of each shape, rows of the tests, and canonical conversations of many kinds."""
    shaped = [planted(row) for row, _ in EXAMPLES.values()]
    return [*shaped, *shaped, *GOOD.values(), *ROWS.values(), *(conversation(seed) for seed in range(20))]


def any_value(chance: random.Random, pool: list[Any]) -> Any:
    """A value out of nowhere: special ones, texts of control tokens, or a part of another seed."""
    kind = chance.randrange(4)
    if kind == 0:
        return "".join(chance.choice(FRAGMENTS) for _ in range(chance.randint(1, 5)))
    if kind == 1:
        return copy.deepcopy(chance.choice(list(parts(chance.choice(pool)).values())))
    return copy.deepcopy(chance.choice(_SPECIAL))


def parts(value: Any) -> dict[Path, Any]:
    """path -> value of a value and of everything inside it."""
    found: dict[Path, Any] = {}
    waiting: list[tuple[Path, Any]] = [((), value)]
    while waiting:
        path, inner = waiting.pop()
        found[path] = inner
        if isinstance(inner, dict):
            waiting += [((*path, key), item) for key, item in inner.items()]
        elif isinstance(inner, list):
            waiting += [((*path, number), item) for number, item in enumerate(inner)]
    return found


def changed(value: Any, path: Path, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change(container, key)` was made to what contains the path's last key."""
    box = [copy.deepcopy(value)]
    container: Any = box
    for key in ((0, *path))[:-1]:
        container = container[key]
    change(container, (0, *path)[-1])
    return box[0] if box else None


def mutated(value: Any, chance: random.Random, pool: list[Any], most: int = 4) -> Any:
    """The value after one or several random changes of its structure or its texts."""
    for _ in range(chance.choice([1] * 4 + list(range(2, most + 1)))):
        value = changed(value, chance.choice(list(parts(value))), lambda box, key: _change(box, key, chance, pool))
    return value


def _change(box: Any, key: Any, chance: random.Random, pool: list[Any]) -> None:
    kind, old = chance.randrange(9), box[key]
    if kind == 0 and len(box) > 1:
        del box[key]
    elif kind == 1 and isinstance(box, dict):
        box[chance.choice(KEYS)] = box.pop(key) if chance.random() < 0.7 else copy.deepcopy(old)
    elif kind == 2:
        box[key] = [old] if chance.random() < 0.5 else {chance.choice(KEYS): old}
    elif kind == 3:
        box[key] = json.dumps(old, ensure_ascii=chance.random() < 0.5)
    elif kind == 4 and isinstance(box, list):
        box.insert(chance.randint(0, len(box)), copy.deepcopy(old))
    elif kind == 5 and isinstance(box, list):
        other = chance.randrange(len(box))
        box[key], box[other] = box[other], old
    elif kind in (5, 6) and isinstance(old, str):
        at, new = chance.randint(0, len(old)), chance.choice(FRAGMENTS)
        if chance.random() < 0.02:  # patterns that take quadratic time
            new = chance.choice((*FRAGMENTS, " ", "\n")) * 3000
        box[key] = old[:at] + new + old[at + chance.choice((0, 0, 1, 5)) :]
    elif kind == 7 and isinstance(old, dict):
        old[chance.choice(KEYS)] = any_value(chance, pool)
    else:
        box[key] = any_value(chance, pool)


_BYTES = (b"\n", b"\r", b'"', b"\x00", b"\xff", b"{", b"}", b"[", b",", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
          b"NaN", b"1e999", b"&a", b"*a", b"!!timestamp 1", b"!!python/name:os.system", b": ", b"- ", b"'", b"9" * 400,
          b"null", b";", b"\t", b"inf", b"-", b"\xe2\x80\xa8")  # fmt: skip


def edited(data: bytes, chance: random.Random) -> bytes:
    """The bytes after a few cuts, repeats and insertions, as a broken download or a wrong editor leaves them."""
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randint(0, len(data)), chance.choice((0, 1, 1, 2, 8, 40))
        kind = chance.randrange(5)
        if kind == 0:
            data = data[:at] + data[at + length :]
        elif kind == 1:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 2 and chance.random() < 0.3:
            data = data[:at]
        elif kind == 3 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
        else:
            data = data[:at] + chance.choice(_BYTES) + data[at + length :]
    return data


def shrunk(value: Any, fails: Callable[[Any], bool], tries: int = 400) -> Any:
    """A smaller value for which `fails` still holds: parts removed, replaced by their own parts, texts halved."""
    while tries > 0:
        for smaller in _smaller(value):
            tries -= 1
            if tries <= 0:
                return value
            if fails(smaller):
                value = smaller
                break
        else:
            return value
    return value


def _smaller(value: Any) -> Any:
    if isinstance(value, bytes):
        size = len(value) // 2
        while size:
            yield from (value[:at] + value[at + size :] for at in range(0, len(value), size))
            size //= 2
        return
    for path, inner in sorted(parts(value).items(), key=lambda item: -len(repr(item[1]))):
        if path:
            yield changed(value, path, lambda box, key: box.__delitem__(key))
        if isinstance(inner, str | bytes) and len(inner) > 1:
            half = len(inner) // 2
            for piece in (inner[:half], inner[half:], inner[1:], inner[:-1]):
                yield changed(value, path, lambda box, key, piece=piece: box.__setitem__(key, piece))
        elif isinstance(inner, list | dict):
            for item in (inner.values() if isinstance(inner, dict) else inner) if path else ():
                yield changed(value, path, lambda box, key, item=item: box.__setitem__(key, item))
