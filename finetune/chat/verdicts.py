"""What an answer is worth at a glance: a valid call, a call against its schema, a broken one, or none."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.chat.reply import Reply
from finetune.progress import counted

VALID, INVALID, BROKEN, NO_CALL, CUT = "valid call", "call against the schema", "broken call", "no call", "cut off"
GOOD, BAD, PLAIN = "good", "bad", "plain"
_TONES = {VALID: GOOD, INVALID: BAD, BROKEN: BAD, NO_CALL: PLAIN, CUT: BAD}
_RANKS = {VALID: 2, INVALID: 1, BROKEN: 0, CUT: 0, NO_CALL: 0}
STYLE = """
.verdict { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; font-size: 14px; min-height: 26px; }
.verdict b { padding: 2px 9px; border-radius: 999px; color: #fff; background: #5f6b7a; }
.verdict b.good { background: #00734f; } .verdict b.bad { background: #b3261e; }
.verdict .best { outline: 2px solid #00734f; border-radius: 999px; padding: 1px 9px; }
"""


class Verdict(NamedTuple):
    """kind: one of the five above; details: tools and problems; numbers: time and tokens; expected: None if unknown."""

    kind: str
    details: str
    numbers: str
    expected: bool | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Larger is better; calls that the data expects come first."""
        return int(self.expected or False), _RANKS[self.kind]


def verdict_of(reply: Reply, expected: Sequence[dict[str, Any]] | None = None) -> Verdict:
    """expected: the calls of the row that the request was taken from; None for a request of one's own."""
    names = ", ".join(call["name"] for call in reply.tool_calls)
    problems = [problem for found in reply.problems for problem in found]
    if reply.parse_errors:
        kind, details = BROKEN, reply.parse_errors[0]
    elif problems:
        kind, details = INVALID, f"{names}: {problems[0]}"
    elif reply.tool_calls:
        kind, details = VALID, names
    elif reply.finish_reason == "length":
        kind, details = CUT, "reached its maximum length"
    else:
        kind, details = NO_CALL, ""
    matches = None
    if expected is not None:
        wanted = [{"name": call["name"], "arguments": call["arguments"]} for call in expected]
        matches = reply.tool_calls == wanted and not reply.parse_errors
    numbers = f"{reply.seconds:.1f} s · {counted(reply.new_tokens, 'token')}"
    return Verdict(kind, details, numbers, matches)


def verdict_html(verdict: Verdict | str, best: bool = False) -> str:
    """A line under an answer; a text, such as "waiting", is shown as it is."""
    if isinstance(verdict, str):
        return f'<div class="verdict"><span>{html.escape(verdict)}</span></div>'
    parts = [f'<b class="{_TONES[verdict.kind]}">{verdict.kind}</b>']
    if verdict.details:
        parts.append(f"<span>{html.escape(verdict.details[:160])}</span>")
    if verdict.expected is not None:
        mark = "✓ as in the data" if verdict.expected else "✗ not as in the data"
        parts.append(f"<span>{mark}</span>")
    parts.append(f"<span>{verdict.numbers}</span>")
    if best:
        parts.append('<span class="best">better</span>')
    return f'<div class="verdict">{"".join(parts)}</div>'


def problem_html(problem: str) -> str:
    """A line that says why there is no answer."""
    return f'<div class="verdict"><b class="bad">not answered</b><span>{html.escape(problem)}</span></div>'


def better(verdicts: dict[str, Verdict]) -> str | None:
    """The side whose answer is better; None where neither is, or only one has answered.

    Without an expected call, an answer without a call may be right: it is not ranked against a call.
    """
    ranks = {side: verdict.rank for side, verdict in verdicts.items()}
    if len(ranks) < 2 or len(set(ranks.values())) == 1:
        return None
    unknown = any(verdict.expected is None for verdict in verdicts.values())
    if unknown and any(verdict.kind == NO_CALL for verdict in verdicts.values()):
        return None
    return max(ranks, key=lambda side: ranks[side])
