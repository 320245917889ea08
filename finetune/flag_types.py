"""Types of command-line values that several commands share; argparse names them: `invalid positive int value`."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any


def _most(kind: type) -> float:
    """A whole number that 64 bits cannot hold is one too large for whatever it will be given to."""
    return 2**63 if kind is int else inf


def positive(kind: type) -> Callable[[str], Any]:
    """Converter to a finite `kind` above 0; ValueError otherwise."""

    def convert(word: str) -> Any:
        value = kind(word)
        if not 0 < value < _most(kind):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def port(word: str) -> int:
    """A TCP port that can be asked for; ValueError otherwise."""
    value = int(word)
    if not 0 < value < 65536:
        raise ValueError
    return value


def not_negative(kind: type) -> Callable[[str], Any]:
    """Converter to a finite `kind` of at least 0; ValueError otherwise."""

    def convert(word: str) -> Any:
        value = kind(word)
        if not 0 <= value < _most(kind):
            raise ValueError
        return value

    convert.__name__ = f"non-negative {kind.__name__}"
    return convert


def text(word: str) -> str:
    """Any text but none at all, which is what a shell makes of an unset variable; ValueError otherwise.

    Nor the bytes of a file's name that are no UTF-8: no config could hold them.
    """
    if not word.strip():
        raise ValueError
    word.encode()
    return word


text.__name__ = "non-empty text"


def folder_name(word: str) -> str:
    """The name of a folder to make inside another one; ValueError where it would lead elsewhere or be hidden."""
    if not text(word).isprintable() or set(word) & {"/", "\\"} or word.startswith(".") or len(word.encode()) > 200:
        raise ValueError
    return word


folder_name.__name__ = "folder name (no slash, no dot in front, at most 200 bytes)"
