"""Phrases that are not used: a reader looks for the standard word (CONTRIBUTING.md, "English")."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# phrase -> what to write instead
PHRASES = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bleav(e|es|ing)\b[^.\n]{0,30}\baway\b|\bleft away\b": "omit",
    r"\bgo(es)? on (with|from|at|where|training)\b": "continue, resume",
    r"\bpassed over\b": "skip",
    r"(?<!there )\b(is|are) no (file|JSON|YAML|run folder|call|list|text|number|config|program|model)\b": "is not a …",
    r"\bstands? in it\b|\bstands? (twice|beside)\b": "duplicate, is beside",
    r"\bstrangers?\b(?!'s row)": "third-party, untrusted",
    r"\bat most so many\b|\bnot including\b": "must be <= N",
    r"\b(met|without|sees?|finds?|of) an? card\b|\bseveral cards\b": "GPU",
    r"\bset aside\b": "reject, archive",
    r"\b(first|last) words\b": "arguments, last lines",
    r"\bin the way of\b": "blocking",
    r"\bstand(s|ing)? in for\b|\btake(s|n)? over\b": "replace, become the leader",
    r"\bwhole checkpoint": "complete checkpoint",
}
SKIPPED = ("benchmarks/results/", "data/", "tests/test_style.py", "tests/formats/", "configs/")


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if not name.startswith(SKIPPED)]


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrase_is_not_used(phrase):
    pattern = re.compile(phrase, re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {PHRASES[phrase]!r} instead:\n" + "\n".join(found)


def test_phrases_are_found():
    """The patterns can fail."""
    bad = "We mend it anew; leave it away and go on with it: it is no file, stands in it, by a stranger, set aside."
    assert sum(bool(re.search(phrase, bad, re.IGNORECASE)) for phrase in PHRASES) == 8
