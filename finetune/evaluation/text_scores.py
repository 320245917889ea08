"""Scores of text against an expected answer, and a rule of thumb for the quality of an answer."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache


def tokenize(text: str) -> list[str]:
    """Words of any script in lower case, Unicode-normalised (NFKC), without punctuation.

    Vowel signs are parts of words (a regular expression's `\\w` excludes them). A symbol outside ASCII (an emoji, a
    currency sign) is a word of its own; ASCII symbols are dropped like punctuation.
    """
    return "".join(map(_part, unicodedata.normalize("NFKC", text).casefold())).split()


@cache
def _part(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LNM" or character == "_":
        # A variation selector only changes the look of the character before it.
        return "" if "\ufe00" <= character <= "\ufe0f" else character
    return f" {character} " if kind[0] == "S" and not character.isascii() else " "


def exact_match(expected: str, made: str) -> bool:
    """Equal after lower-casing and dropping punctuation and extra space."""
    return tokenize(expected) == tokenize(made)


def token_f1(expected: str, made: str) -> float:
    """F1 of the two bags of words, as in SQuAD's evaluation, but with articles, which not every language has."""
    wanted, got = tokenize(expected), tokenize(made)
    if not wanted or not got:
        return float(wanted == got)
    common = sum((Counter(wanted) & Counter(got)).values())
    return 2 * common / (len(wanted) + len(got))


def rouge_l(expected: str, made: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words (Lin 2004).

    The package rouge-score gives the same numbers, but its tokenizer drops every script other than Latin.
    """
    wanted, got = tokenize(expected), tokenize(made)
    if not wanted or not got:
        return 0.0
    row = [0] * (len(got) + 1)  # longest common subsequence of the words so far and each prefix of `got`
    for word in wanted:
        diagonal = 0
        for at, other in enumerate(got, 1):
            above = row[at]
            row[at] = diagonal + 1 if word == other else max(above, row[at - 1])
            diagonal = above
    return 2 * row[-1] / (len(wanted) + len(got))


def quality_ok(text: str) -> bool:
    """More than 5 characters, more than 2 words, and something alphanumeric."""
    text = text.strip()
    return len(text) > 5 and len(text.split()) > 2 and any(character.isalnum() for character in text)
