"""Scores of plain text against a gold answer, and the quality rule of small question-answer projects."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache


def tokenize(text: str) -> list[str]:
    """Words in lower case, Unicode-normalised (NFKC), without punctuation; any script.

    Vowel signs belong to the word they stand in (to `\\w` they do not: two Hindi words would be one). A symbol outside
    ASCII (an emoji, a currency sign) is a word by itself, those of ASCII are dropped like punctuation.
    """
    return "".join(map(_part, unicodedata.normalize("NFKC", text).casefold())).split()


@cache
def _part(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LNM" or character == "_":
        # Variation selectors only choose between two looks of the same sign.
        return "" if "\ufe00" <= character <= "\ufe0f" else character
    return f" {character} " if kind[0] == "S" and not character.isascii() else " "


def exact_match(expected: str, made: str) -> bool:
    """Equal after lower-casing and dropping punctuation and extra space."""
    return tokenize(expected) == tokenize(made)


def token_f1(expected: str, made: str) -> float:
    """F1 of the two bags of words, as in SQuAD's evaluation (articles are kept: they are words of one language)."""
    wanted, got = tokenize(expected), tokenize(made)
    if not wanted or not got:
        return float(wanted == got)
    common = sum((Counter(wanted) & Counter(got)).values())
    return 2 * common / (len(wanted) + len(got))


def rouge_l(expected: str, made: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words (Lin 2004).

    The package rouge-score gives the same numbers for English; its tokenizer drops every other script, and importing
    it loads all of nltk. The tests hold the two together.
    """
    wanted, got = tokenize(expected), tokenize(made)
    if not wanted or not got:
        return 0.0
    row = [0] * (len(got) + 1)  # longest common subsequence of the words read so far with each beginning of `got`
    for word in wanted:
        diagonal = 0
        for at, other in enumerate(got, 1):
            above = row[at]
            row[at] = diagonal + 1 if word == other else max(above, row[at - 1])
            diagonal = above
    return 2 * row[-1] / (len(wanted) + len(got))


def quality_ok(text: str) -> bool:
    """The described rule: more than 5 characters, more than 2 words, and something alphanumeric."""
    text = text.strip()
    return len(text) > 5 and len(text.split()) > 2 and any(character.isalnum() for character in text)
