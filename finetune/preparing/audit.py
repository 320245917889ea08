"""Audit of what is trained over a whole data set: tokens by role, first and last tokens of trained turns, assertions.

The formats find `Sequence.roles` independently of the labels; the audit compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune.encoding.options import DEFAULT_OPTIONS, EncodingOptions
from finetune.encoding.rows import encode_answers, in_rows, warn_of_length, warning_kinds
from finetune.preparing.checks import refusal
from finetune.preparing.mask_view import trained_spans
from finetune.progress import counted
from finetune.reading.load_result import Rejected
from formats import check_tokenizer, decode


@dataclass
class Audit:
    """Counts over all rows; `failures` and `warnings` map each kind to its rows ("file, row N")."""

    rows: int = 0
    status: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    trained: Counter = field(default_factory=Counter)
    first_tokens: Counter = field(default_factory=Counter)
    last_tokens: Counter = field(default_factory=Counter)
    spans: int = 0
    turns: int = 0
    read_back: int = 0
    escaped: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.failures

    def add_rejected(self, rejected: Iterable[Rejected]) -> None:
        """Count rows that cannot be read as conversations as refused."""
        for row in rejected:
            self._refuse(row.reason)

    def _refuse(self, reason: str) -> None:
        self.rows += 1
        self.status["refused"] += 1
        self.reasons[reason] += 1

    def add(
        self, name: str, conversation: dict[str, Any], tokenizer, fmt, ends: set[int], options: EncodingOptions,
        positions: int | None = None,
    ) -> None:  # fmt: skip
        """Encode one row and check what its labels train."""
        if reason := refusal(conversation):
            self._refuse(reason)
            return
        encoded = encode_answers(conversation, tokenizer, fmt, options)
        if encoded.status == "refused":
            self._refuse(encoded.reason)
            return
        self.rows += 1
        self.status[encoded.status] += 1
        self.escaped += encoded.escaped
        warn_of_length(encoded, positions)
        for kind in warning_kinds(encoded):
            self.warnings.setdefault(kind, []).append(name)
        texts = [text for sequence in encoded.sequences for text in self._check(sequence, name, ends, tokenizer, fmt)]
        expected = trained_messages(conversation, options.train_on)
        self.turns += len(expected)
        if not texts:
            _add_row(self.failures, "a row without any trained token", name)
        elif len(texts) != len(expected):
            kind = "trained turns differ from assistant turns"
            _add_row(self.failures, kind, f"{name} ({len(texts)} of {len(expected)})")
        elif not encoded.escaped:
            for text, message in zip(texts, expected, strict=True):
                self._parse_back(text, message, conversation["tools"], fmt, name)

    def _check(self, sequence, name: str, ends: set[int], tokenizer, fmt) -> list[str]:
        """Check one sequence; returns the decoded text of each trained span."""
        ids, labels, roles = sequence.input_ids, sequence.labels, sequence.roles
        self.tokens.update(roles)
        texts = []
        for start, end, trained in trained_spans(labels):
            if not trained:
                continue
            self.spans += 1
            self.trained.update(roles[start:end])
            if labels[start:end] != ids[start:end]:
                _add_row(self.failures, "a label that is not its token", name)
            for role in set(roles[start:end]) - {"assistant"}:
                _add_row(self.failures, f"a trained token of the {role}", name)
            first, last = tokenizer.convert_ids_to_tokens([ids[start], ids[end - 1]])
            self.first_tokens[first] += 1
            self.last_tokens[last] += 1
            if ids[end - 1] not in ends:
                _add_row(self.failures, "a trained turn without its end-of-turn token", name)
            texts.append(decode(ids[start:end], tokenizer, fmt))
        return texts

    def _parse_back(self, text: str, message: dict[str, Any], tools: list[dict[str, Any]], fmt, name: str) -> None:
        """Parse a trained text and compare the calls with those of its message."""
        expected = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        if [(call["name"], call["arguments"]) for call in fmt.parse(text, tools).tool_calls] == expected:
            self.read_back += 1
        else:
            _add_row(self.warnings, "a trained turn that is parsed as other calls", name)


def _add_row(table: dict[str, list[str]], kind: str, name: str) -> None:
    rows = table.setdefault(kind, [])
    if not rows or rows[-1] != name:
        rows.append(name)


def audit(
    rows: Iterable[tuple[str, dict[str, Any]]], tokenizer, fmt, options: EncodingOptions = DEFAULT_OPTIONS,
    *, positions: int | None = None,
) -> Audit:  # fmt: skip
    """Encode every (name, conversation) and check what its labels train.

    Fails: a trained token of another role than the assistant; a label that is not its id; a trained turn that does not
    end in an end-of-turn token; a row without any trained token; a turn trained twice or not at all; nothing trained.
    Warns: a turn whose text is parsed as other calls than the conversation holds; a row with more tokens than
    `positions` (of the model).
    """
    ends = set(check_tokenizer(tokenizer, fmt))
    result = Audit()
    for name, conversation in rows:
        result.add(name, conversation, tokenizer, fmt, ends, options, positions)
    if not result.spans:
        _add_row(result.failures, "nothing is trained at all", "all rows")
    return result


def trained_messages(conversation: dict[str, Any], train_on: str) -> list[dict[str, Any]]:
    """The assistant messages that are to be trained."""
    found = [message for message in conversation["messages"] if message["role"] == "assistant"]
    found = found[-1:] if train_on == "last" else found
    return [message for message in found if message.get("train", True)]


def print_audit(result: Audit, console) -> None:
    """The audit as tables on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    total, trained = result.tokens.total(), result.trained.total()
    table = Table("role", "tokens", "trained", "share trained", title=counted(result.rows, "row"))
    for column in table.columns[1:]:
        column.justify = "right"
    for role, number in result.tokens.most_common():
        table.add_row(role, f"{number:,}", f"{result.trained[role]:,}", f"{result.trained[role] / number:.1%}")
    table.add_row("all", f"{total:,}", f"{trained:,}", f"{trained / total:.1%}" if total else "-", style="bold")
    console.print(table)
    console.print(", ".join(f"{counted(number, 'row')} {status}" for status, number in result.status.most_common()))
    for reason, number in result.reasons.most_common(10):
        console.print(f"  refused {number:,}: {escape(reason)}", highlight=False)
    console.print(
        f"{counted(result.spans, 'trained turn')} of {counted(result.turns, 'assistant turn')}; "
        f"parsed as the same calls: {result.read_back:,}; control tokens escaped: {result.escaped:,}"
    )
    for title, counter in (("first", result.first_tokens), ("last", result.last_tokens)):
        shown = ", ".join(f"{token!r} {number:,}" for token, number in counter.most_common(6))
        console.print(f"{title} trained tokens: {escape(shown)}", highlight=False)
    for level, table_of in (("warning", result.warnings), ("FAILED", result.failures)):
        for kind, rows in table_of.items():
            names = list(dict.fromkeys(rows))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = f"{escape('; '.join(names[:3]))}{more}"
            console.print(f"{level}: {kind} ({in_rows(rows)}): {shown}", highlight=False, soft_wrap=True)
    console.print("passed: all assertions hold" if result.passed else "failed")
