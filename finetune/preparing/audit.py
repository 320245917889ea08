"""What is really trained, over a whole data set: tokens by role, first and last token of each trained turn, assertions.

Roles come from `Sequence.roles`, which the formats find independently of the labels: the two are held against each
other here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune.reading.conversations import Rejected
from formats import IGNORE_INDEX


@dataclass
class Audit:
    """Counts over all rows and the assertions that failed (`failures`: what -> rows, as "file, row N")."""

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
        """Count rows that could not be read as conversations among the refused ones."""
        for row in rejected:
            self.rows += 1
            self.status["refused"] += 1
            self.reasons[row.reason] += 1


def audit(
    rows: Iterable[tuple[str, dict[str, Any]]], tokenizer, fmt, *, train_on: str = "all", control_tokens: str = "escape"
) -> Audit:
    """Encode every (name, conversation) and check what its labels train.

    Fails: a trained token that is no assistant token; a label that is not its id; a trained turn that does not end
    in an end-of-turn token; a row without any trained token; a turn trained twice or not at all; nothing trained.
    Warns: a turn whose text, parsed, gives other calls than the conversation holds.
    """
    from finetune.encoding.rows import encode_answers
    from formats import check_tokenizer

    ends = set(check_tokenizer(tokenizer, fmt))
    result = Audit()
    for name, conversation in rows:
        result.rows += 1
        encoded = encode_answers(conversation, tokenizer, fmt, train_on=train_on, control_tokens=control_tokens)
        result.status[encoded.status] += 1
        if encoded.status == "refused":
            result.reasons[encoded.reason] += 1
            continue
        result.escaped += encoded.escaped
        spans = [span for sequence in encoded.sequences for span in _check(sequence, name, ends, tokenizer, result)]
        wanted = trained_messages(conversation, train_on)
        result.turns += len(wanted)
        if not spans:
            _note(result.failures, "a row without any trained token", name)
        elif len(spans) != len(wanted):
            _note(
                result.failures, "trained turns differ from assistant turns", f"{name} ({len(spans)} of {len(wanted)})"
            )
        elif not encoded.escaped:
            for text, message in zip(spans, wanted, strict=True):
                _read_back(text, message, conversation["tools"], fmt, name, result)
    if not result.spans:
        _note(result.failures, "nothing is trained at all", "all rows")
    return result


def trained_messages(conversation: dict[str, Any], train_on: str) -> list[dict[str, Any]]:
    """The assistant messages that are to be trained."""
    found = [m for m in conversation["messages"] if m["role"] == "assistant"]
    found = found[-1:] if train_on == "last" else found
    return [message for message in found if message.get("train", True)]


def _check(sequence, name: str, ends: set[int], tokenizer, result: Audit) -> list[str]:
    """Check one sequence; returns the decoded text of each trained span."""
    ids, labels, roles = sequence.input_ids, sequence.labels, sequence.roles
    result.tokens.update(roles)
    result.trained.update(role for role, label in zip(roles, labels, strict=True) if label != IGNORE_INDEX)
    for token, label, role in zip(ids, labels, roles, strict=True):
        if label == IGNORE_INDEX:
            continue
        if label != token:
            _note(result.failures, "a label that is not its token", name)
        if role != "assistant":
            _note(result.failures, f"a trained token of the {role}", name)
    texts, start = [], None
    for position in range(len(ids) + 1):
        trained = position < len(ids) and labels[position] != IGNORE_INDEX
        if trained and start is None:
            start = position
        elif not trained and start is not None:
            span, start = ids[start:position], None
            result.spans += 1
            result.first_tokens[tokenizer.convert_ids_to_tokens(span[0])] += 1
            result.last_tokens[tokenizer.convert_ids_to_tokens(span[-1])] += 1
            if span[-1] not in ends:
                _note(result.failures, "a trained turn without its end-of-turn token", name)
            texts.append(tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return texts


def _read_back(text: str, message: dict[str, Any], tools, fmt, name: str, result: Audit) -> None:
    expected = [call["function"] for call in message.get("tool_calls", ())]
    parsed = fmt.parse(text, tools)
    found = [{"name": call["name"], "arguments": call["arguments"]} for call in parsed.tool_calls]
    if found == [{"name": call["name"], "arguments": call["arguments"]} for call in expected]:
        result.read_back += 1
    else:
        _note(result.warnings, "a trained turn that reads back as other calls", name)


def _note(table: dict[str, list[str]], what: str, name: str) -> None:
    rows = table.setdefault(what, [])
    if not rows or rows[-1] != name:
        rows.append(name)


def print_audit(result: Audit, console) -> None:
    """The audit as tables on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    total, trained = result.tokens.total(), result.trained.total()
    table = Table("role", "tokens", "trained", "share trained", title=f"{result.rows:,} rows")
    for column in table.columns[1:]:
        column.justify = "right"
    for role, number in result.tokens.most_common():
        table.add_row(role, f"{number:,}", f"{result.trained[role]:,}", f"{result.trained[role] / number:.1%}")
    table.add_row("all", f"{total:,}", f"{trained:,}", f"{trained / total:.1%}" if total else "-", style="bold")
    console.print(table)
    console.print(", ".join(f"{number:,} rows {status}" for status, number in result.status.most_common()))
    for reason, number in result.reasons.most_common(10):
        console.print(f"  refused {number:,}: {escape(reason)}", highlight=False)
    console.print(
        f"{result.spans:,} trained turns of {result.turns:,} assistant turns; read back as the same calls: "
        f"{result.read_back:,}; control strings neutralised: {result.escaped:,}"
    )
    for title, counter in (("first", result.first_tokens), ("last", result.last_tokens)):
        shown = ", ".join(f"{token!r} {number:,}" for token, number in counter.most_common(6))
        console.print(f"{title} trained tokens: {escape(shown)}", highlight=False)
    for kind, table_of in (("warning", result.warnings), ("FAILED", result.failures)):
        for what, rows in table_of.items():
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            console.print(f"{kind}: {what}: {escape('; '.join(rows[:3]))}{more}", highlight=False, soft_wrap=True)
    console.print("passed: all assertions hold" if result.passed else "failed")
