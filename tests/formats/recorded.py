"""Recorded ids and labels: what the formats encode must not change unnoticed.

python -m tests.formats.recorded rewrites tests/formats/recorded.json, after a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from formats import choose_format, encode
from formats.masks import Encoded
from tests.formats import own_templates
from tests.formats.cases import ROWS
from tests.formats.pairs import PAIRS
from tests.formats.public_templates import tokenizer_with

FILE = Path(__file__).with_suffix(".json")
GRANITE = "auto on Granite 4's layout"


def digest(encoded: Encoded) -> str:
    """A few characters that stand for a row's ids and labels."""
    if encoded.status == "refused":
        return "refused"
    numbers = [[sequence.input_ids, sequence.labels] for sequence in encoded.sequences]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]


def digests(tokenizer, fmt) -> dict[str, str]:
    """The digest of every hard conversation without control tokens."""
    return {label: digest(encode(made, tokenizer, fmt)) for label, made in ROWS.items()}


def granite() -> dict[str, str]:
    """Those of a template like Granite 4's, which no package here ships."""
    tokenizer = tokenizer_with(own_templates.ROLE_TOKENS, "qwen3")
    return digests(tokenizer, choose_format(tokenizer)[0])


def main() -> None:
    made = {f"{pair.format} on {pair.label}": digests(*pair.load()) for pair in PAIRS} | {GRANITE: granite()}
    FILE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
