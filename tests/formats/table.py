"""The table in docs/formats_table.md: every format, tokenizer and hard conversation.

python -m tests.formats.table > docs/formats_table.md
"""

from __future__ import annotations

from collections import Counter, defaultdict

from formats import encode
from tests.formats.cases import HOSTILE, ROWS
from tests.formats.checks import assert_exact
from tests.formats.pairs import PAIRS, Pair

ALL = {**ROWS, **{f"hostile_{name}": made for name, made in HOSTILE.items()}}
HEAD = f"""# Formats, tokenizers and hard conversations

Made by `python -m tests.formats.table`; a test keeps it up to date. {len(ALL)} conversations, one per class of
difficulty (`tests/formats/cases.py`), {len(HOSTILE)} of them with control tokens in their contents.

*exact*: one sequence; at every trained turn the ids in front of the answer are the ids that `apply_chat_template`
gives a server, and nothing but answers and their end-of-turn token is trained. *split*: the same, in several sequences,
because the template renders the past differently later on. *refused*: not trained, with a reason. *wrong* would be a
row that is trained otherwise.

| format | tokenizer, template | exact | split | refused | wrong |
| --- | --- | ---: | ---: | ---: | ---: |
"""


def outcome(pair: Pair) -> tuple[Counter, dict[str, list[str]]]:
    """(how many rows are ok, split, refused, wrong; rows refused by reason)."""
    tokenizer, fmt = pair.load()
    counts: Counter = Counter()
    reasons: dict[str, list[str]] = defaultdict(list)
    for label, made in ALL.items():
        encoded = encode(made, tokenizer, fmt)
        try:
            assert_exact(made, encoded, tokenizer, fmt)
        except AssertionError as error:
            counts["wrong"] += 1
            reasons[f"WRONG: {error}"].append(label)
            continue
        counts[encoded.status] += 1
        if encoded.reason and encoded.status == "refused":
            reasons[encoded.reason.partition(": ")[2] or encoded.reason].append(label)
    return counts, reasons


def table() -> tuple[str, int]:
    """(the page, number of wrong rows)."""
    lines, details, wrong = [], [], 0
    for pair in PAIRS:
        counts, reasons = outcome(pair)
        wrong += counts["wrong"]
        numbers = " | ".join(str(counts[key]) for key in ("ok", "split", "refused", "wrong"))
        lines.append(f"| {pair.format} | {pair.label} | {numbers} |")
        details.append(f"\n**{pair.format}** on {pair.label}\n")
        details += [f"- {reason}: {', '.join(rows)}" for reason, rows in sorted(reasons.items())]
    return HEAD + "\n".join(lines) + "\n\n## What is refused, and why\n" + "\n".join(details) + "\n", wrong


if __name__ == "__main__":
    print(table()[0], end="")
