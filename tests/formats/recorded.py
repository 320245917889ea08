"""Recorded ids and labels: what the formats encode must not change unnoticed.

python -m tests.formats.recorded > tests/formats/recorded.json, after a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from formats import encode
from formats.masks import Encoded
from tests.formats.cases import ROWS
from tests.formats.pairs import PAIRS, Pair

FILE = Path("tests/formats/recorded.json")


def digest(encoded: Encoded) -> str:
    """A few characters that stand for a row's ids and labels."""
    if encoded.status == "refused":
        return "refused"
    numbers = [[sequence.input_ids, sequence.labels] for sequence in encoded.sequences]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]


def digests(pair: Pair) -> dict[str, str]:
    """The digest of every hard conversation."""
    tokenizer, fmt = pair.load()
    return {label: digest(encode(made, tokenizer, fmt)) for label, made in ROWS.items()}


def key(pair: Pair) -> str:
    return f"{pair.format} on {pair.label}"


if __name__ == "__main__":
    print(json.dumps({key(pair): digests(pair) for pair in PAIRS}, indent=1, ensure_ascii=False))
