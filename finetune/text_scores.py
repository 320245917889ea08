"""Scores of plain text against a gold answer, and the quality rule of small question-answer projects."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache


def tokenize(text: str) -> list[str]:
    """Words in lower case, Unicode-normalised (NFKC), without punctuation; any script."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


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


class _Words:
    """rouge-score's own tokenizer drops everything but a-z and 0-9; this one keeps Korean."""

    def tokenize(self, text: str) -> list[str]:
        return tokenize(text)


@lru_cache(maxsize=1)
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(expected: str, made: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the package rouge-score."""
    return float(_scorer().score(expected, made)["rougeL"].fmeasure)


def quality_ok(text: str) -> bool:
    """The described rule: more than 5 characters, more than 2 words, and something alphanumeric."""
    text = text.strip()
    return len(text) > 5 and len(text.split()) > 2 and any(character.isalnum() for character in text)
