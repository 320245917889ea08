"""The suites of `evaluate_lora.py --suite NAME:WHAT`, one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.evaluation import acebench, bfcl, functionchat, when2call
from finetune.evaluation.items import Item

Verdict = Callable[[Item, list[dict[str, Any]], list[str], dict[str, Any]], dict[str, bool]]


@dataclass(frozen=True)
class Suite:
    """Rows that others have published, and how they judge an answer.

    name     before the colon, and in the `source` of its items; its verdict `NAME_valid` becomes `NAME_accuracy`
    takes    what comes behind the colon
    load     (that text, limit=rows of each category) -> items
    verdict  (item, calls, parse errors, our verdicts) -> further verdicts; None: ours alone
    """

    name: str
    takes: str
    load: Callable[..., list[Item]]
    verdict: Verdict | None = None


SUITES = {
    suite.name: suite
    for suite in (
        Suite("bfcl", "CATEGORY,CATEGORY… (package bfcl-eval)", bfcl.load_items, bfcl.verdict),
        Suite(functionchat.NAME, "FOLDER", functionchat.load_items, functionchat.verdict),
        Suite(acebench.NAME, "FOLDER", acebench.load_items, acebench.verdict),
        Suite(when2call.NAME, "FILE", when2call.load_items),
    )
}


def load_suite(text: str, *, limit: int | None = None) -> list[Item]:
    """Items of `NAME:WHAT`. Raises UserError for a suite that does not exist, and where its data are missing."""
    name, _, what = text.partition(":")
    if name not in SUITES:
        forms = ", ".join(f"{suite.name}:{suite.takes}" for suite in SUITES.values())
        raise UserError(f"--suite {text}: there is no suite {name!r}; choose from {forms}")
    items = SUITES[name].load(what, limit=limit)
    if not items:
        raise UserError(f"--suite {text} has no row to score")
    return items


def suite_verdict(item: Item, made: list[dict], errors: list[str], ours: dict[str, Any]) -> dict[str, bool]:
    """What the item's suite adds to our verdicts; {} for rows of no suite."""
    suite = SUITES.get(item.source.partition(":")[0])
    return suite.verdict(item, made, errors, ours) if suite and suite.verdict else {}
