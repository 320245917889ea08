"""The tokens that end a turn, derived from renderings of a template."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from formats.derivation import ANSWER, IDS, NAMES, TEXT, USER, VALUES, Turns, answer, behind_last, call


class Ends(NamedTuple):
    """tokens: the added tokens that end a turn. behind_answer, behind_call: what the template writes behind a turn only
    when the conversation continues, up to its end token; "" where the turn itself has it."""

    tokens: tuple[str, ...]
    behind_answer: str = ""
    behind_call: str = ""


def ends_of_turn(turns: Turns, added: set[str]) -> Ends:
    """The added tokens that end a turn; none where no token follows a plain answer.

    That is the token behind both a plain answer and a call. Where they end differently, it is the first behind the
    answer and the last behind the call. A token that also occurs inside a turn ends nothing. Templates that end only
    past turns are asked for a conversation that continues: the token between an answer and a user's message ends the
    answer (an end, or the next role's own token, as of GLM), that between a call and its result the call.
    """
    tokens = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    plain, one = turns.text(ANSWER) or "", turns.text("", call()) or ""
    pair = turns.text("", call(), call(1)) or turns.text(TEXT, call(), call(1)) or ""
    head, _, tail = plain.partition(ANSWER)
    behind_answer, behind_call = tokens.findall(tail), tokens.findall(behind_last(VALUES[1], one))
    inside = {*tokens.findall(head), *tokens.findall(one[: max(0, one.rfind(VALUES[1]))])}
    between = inside.union(tokens.findall(pair[: max(0, pair.rfind(VALUES[1]))]))
    # A template that gives each call a turn of its own has its end between two calls.
    if not behind_answer or not between.issuperset(behind_answer):
        inside = between
    ends = [token for token in behind_answer if token not in inside]
    if both := [token for token in ends if token in behind_call]:
        return Ends((both[0],))
    of_call = [token for token in reversed(behind_call) if token not in inside][:1]
    follows = _Follows(turns, tokens, inside)
    if ends:
        unwritten, end_of_call = ("", of_call[0]) if of_call else follows.call(one)
        if not of_call and not unwritten:
            return Ends((ends[0],))
        return Ends(tuple(dict.fromkeys((ends[0], end_of_call))), "", unwritten)
    if not plain:
        return Ends(())
    unwritten_answer, end = follows.turn(ANSWER, answer(ANSWER), plain, USER)
    unwritten, end_of_call = follows.call(one)
    if not unwritten_answer or (end_of_call and not unwritten):
        return Ends(())
    # A token that the template itself writes behind the call is its end, unless another one follows.
    if of_call and (not end_of_call or of_call[0] == end):
        unwritten, end_of_call = "", of_call[0]
    return Ends(tuple(dict.fromkeys(filter(None, (end, end_of_call)))), unwritten_answer, unwritten)


class _Follows(NamedTuple):
    """Finds what a template writes behind a turn when the conversation continues."""

    turns: Turns
    tokens: re.Pattern[str]
    inside: set[str]

    def turn(self, word: str, turn: dict[str, Any], written: str, following: dict[str, Any]) -> tuple[str, str]:
        """(what follows the turn, up to its first token; that token), "" where no token follows at once."""
        rest = self.turns.continuation(turn, word, following) or ""
        own = written.rpartition(word)[2]
        if not rest.startswith(own):
            return "", "changed"
        token = self.tokens.search(rest, len(own))
        if token is None or rest[len(own) : token.start()].strip() or token[0] in self.inside:
            return "", ""
        return rest[len(own) : token.end()], token[0]

    def call(self, written: str) -> tuple[str, str]:
        """What follows a turn with a call when its result comes; nothing of a template that writes no calls."""
        if VALUES[1] not in written:
            return "", ""
        result = {"role": "tool", "tool_call_id": IDS[0], "name": NAMES[0], "content": USER["content"]}
        return self.turn(VALUES[1], answer("", call()), written, result)
