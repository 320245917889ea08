"""Decisions without generation: the model chooses between answers by their likelihood, over one shared prompt.

The options of a request are the expected answer and, as far as they differ from it, a call, a call of another tool, a
question back and a refusal. Where the row does not bring them they come from other rows with the same tools, else from
the tools' schemas and from SENTENCES. Nothing is parsed, so formats whose calls cannot be read are scored too.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, IRRELEVANT, MISSING_PARAMETER, Item, Option
from finetune.evaluation.metrics import METRICS, REQUESTS, Metric, Scored
from finetune.evaluation.rank_losses import LossMeter
from finetune.evaluation.scoring import score
from finetune.files import json_lines, write_text_atomic
from finetune.progress import progress_bar
from finetune.synthetic.phrasing import read_json
from finetune.synthetic.schema_phrasing import FOLDER
from finetune.synthetic.schema_values import SchemaValues

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from formats import Format

EXPECTED_NAME = {CALL: "call", MISSING_PARAMETER: "ask_back", IRRELEVANT: "decline"}
SENTENCES = {
    "en": {"ask_back": "Could you give me the missing details?", "decline": "Sorry, none of my tools can do that."},
    "ko": {"ask_back": "필요한 정보를 더 알려 주시겠어요?", "decline": "죄송하지만 제가 가진 도구로는 할 수 없습니다."},
}
SHOWN = (
    "decision_accuracy", "decision_accuracy_norm", "tool_selection_accuracy", "tool_name_accuracy",
    "irrelevance_accuracy", "missing_parameter_accuracy",
)  # fmt: skip
DECISION_METRICS: list[Metric] = [metric for metric in METRICS if metric.name in SHOWN]


class _Pool:
    """Answers of all items, by their tools."""

    def __init__(self, items: Sequence[Item]):
        self.calls: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.texts: dict[tuple[str, str], list[str]] = {}
        self.words = {language: read_json(FOLDER / f"{language}.json")["values"] for language in SENTENCES}
        for item in items:
            if item.kind == CALL and len(item.expected_calls) == 1:
                self.calls.setdefault(_tools_key(item), {}).setdefault(
                    item.expected_calls[0]["name"], item.expected_calls
                )
            elif item.expected_text and item.kind in EXPECTED_NAME:
                self.texts.setdefault((_tools_key(item), EXPECTED_NAME[item.kind]), []).append(item.expected_text)

    def options(self, item: Item) -> list[Option]:
        """The expected answer first; the choice of the others depends on the item alone."""
        rng = random.Random(item.fingerprint())
        language = "ko" if any("가" <= letter <= "힣" for letter in item.messages[-1]["content"]) else "en"
        expected = EXPECTED_NAME[item.kind]
        options = [Option(expected, item.expected_calls, item.expected_text or "", True)]
        if item.kind != CALL and not item.expected_text:
            options[0].text = self._text(item, expected, language, rng)
        taken = {call["name"] for call in item.expected_calls}
        for name in ("call", "other_call")[item.kind == CALL :]:
            if call := self._call(item, taken, language, rng):
                options.append(Option(name, [call], ""))
                taken.add(call["name"])
        options += [
            Option(name, [], self._text(item, name, language, rng))
            for name in ("ask_back", "decline")
            if name != expected
        ]
        return options

    def _call(self, item: Item, taken: set[str], language: str, rng: random.Random) -> dict[str, Any] | None:
        made = self.calls.get(_tools_key(item), {})
        if names := sorted(made.keys() - taken):
            return made[rng.choice(names)][0]
        tools = {tool["function"]["name"]: tool["function"] for tool in item.tools}
        for name in rng.sample(sorted(tools.keys() - taken), len(tools.keys() - taken)):
            schema = tools[name].get("parameters") or {"type": "object"}
            try:
                return {"name": name, "arguments": SchemaValues(schema, self.words[language], rng).draw(name)}
            except UserError:  # a schema for which no arguments are found
                continue
        return None

    def _text(self, item: Item, name: str, language: str, rng: random.Random) -> str:
        texts = sorted(set(self.texts.get((_tools_key(item), name), ())) - {item.expected_text})
        return rng.choice(texts) if texts else SENTENCES[language][name]


def _tools_key(item: Item) -> str:
    return json.dumps(item.tools, sort_keys=True)


@dataclass
class Decisions:
    """Items with their options and the ids of each; `refused` holds (item, reason) of those that cannot be scored."""

    items: list[Item] = field(default_factory=list)
    options: list[list[Option]] = field(default_factory=list)
    sequences: list[list[tuple[list[int], list[int]]]] = field(default_factory=list)
    refused: list[tuple[Item, str]] = field(default_factory=list)


def make_decisions(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, fmt: Format, *, longest: int | None = None
) -> Decisions:
    """The options of all items that are a request with tools; longest: tokens of prompt and answer."""
    pool, decisions = _Pool(items), Decisions()
    with progress_bar("options", len(items)) as advance:
        for item in items:
            advance(1)
            if item.kind not in REQUESTS or not (item.tools or item.options):
                decisions.refused.append((item, "not a request with tools"))
                continue
            kept, reason = [], ""
            for option in item.options or pool.options(item):
                ids, why = _encoded(item, option, tokenizer, fmt)
                if ids and longest is not None and len(ids[0]) > longest:
                    ids, why = None, f"{len(ids[0]):,} tokens; the model has room for {longest:,}"
                if ids:
                    kept.append((option, ids))
                elif option.is_expected:
                    reason = why
            if reason or len(kept) < 2 or not any(option.is_expected for option, _ in kept):
                decisions.refused.append((item, reason or "fewer than two of its answers can be expressed"))
                continue
            decisions.items.append(item)
            decisions.options.append([option for option, _ in kept])
            decisions.sequences.append([ids for _, ids in kept])
    return decisions


def _encoded(
    item: Item, option: Option, tokenizer: PreTrainedTokenizerBase, fmt: Format
) -> tuple[tuple[list[int], list[int]] | None, str]:
    """((ids, labels) of prompt and answer, why there are none)."""
    from formats import encode

    message: dict[str, Any] = {"role": "assistant", "content": option.text}
    if option.calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in option.calls]
    conversation = {"messages": [*item.messages, message], "tools": item.tools}
    encoded = encode(conversation, tokenizer, fmt, train_on="last", reasoning="drop", allow_unreadable_calls=True)
    if not encoded.sequences:
        return None, str(encoded.reason)
    return (encoded.sequences[-1].input_ids, encoded.sequences[-1].labels), ""


def choose(
    model: Any, tokenizer: PreTrainedTokenizerBase, decisions: Decisions, path: Path, *, name: str, seed: int = 0
) -> tuple[list[Scored], dict[str, Any]]:
    """(the chosen options, scored as if they were answers; confusion of expected and chosen kinds, and macro F1).

    Chosen is the option with the highest log-likelihood, end of turn included; "norm": the highest per character.
    Every option with both is written to `path`.
    """
    from sklearn.metrics import f1_score

    meter = LossMeter(model, tokenizer, [pair for pairs in decisions.sequences for pair in pairs])
    started = time.perf_counter()
    with progress_bar(name, len(meter.rows)) as advance:
        predictions = iter(meter.predictions(advance))
    seconds = (time.perf_counter() - started) / max(1, len(decisions.items))
    scored, lines = [], []
    for item, options, pairs in zip(decisions.items, decisions.options, decisions.sequences, strict=True):
        found = [next(predictions) for _ in options]
        totals = [float(one.log_p.sum()) for one in found]
        trained = [[label for label in labels if label >= 0] for _, labels in pairs]
        sizes = [max(1, len(tokenizer.decode(ids[:-1]))) for ids in trained]
        norms = [total / size for total, size in zip(totals, sizes, strict=True)]
        chosen, by_norm = (options[max(range(len(options)), key=values.__getitem__)] for values in (totals, norms))
        verdicts = score(item, chosen.text, chosen.calls, []) | {
            "decision_correct": chosen.is_expected,
            "decision_correct_norm": by_norm.is_expected,
        }
        scored.append(Scored(item, chosen.text, chosen.calls, verdicts, seconds))
        lines.append(
            {
                "source": item.source, "row": item.row, "turn": item.turn, "kind": item.kind,
                "chosen": chosen.name, "chosen_norm": by_norm.name,
                "expected": next(option.name for option in options if option.is_expected),
                "options": [
                    {"name": option.name, "calls": option.calls, "text": option.text, "log_likelihood": round(total, 4),
                     "per_character": round(norm, 6)}
                    for option, total, norm in zip(options, totals, norms, strict=True)
                ],
            }
        )  # fmt: skip
    write_text_atomic(path, json_lines(lines))
    pairs_of_names = [(line["expected"], line["chosen"]) for line in lines]
    expected, picked = zip(*pairs_of_names, strict=True)
    labels = sorted({*expected, *picked})
    confusion = {one: {other: pairs_of_names.count((one, other)) for other in labels} for one in sorted({*expected})}
    macro = float(f1_score(expected, picked, average="macro", zero_division=0))
    return scored, {"confusion": confusion, "macro_f1": round(macro, 6), "seconds_per_item": round(seconds, 4)}


def confusion_markdown(found: dict[str, dict[str, Any]]) -> str:
    """A table of expected and chosen kinds for each model."""
    from finetune.evaluation.report import table_markdown

    parts = []
    for side, one in found.items():
        chosen = sorted({name for row in one["confusion"].values() for name in row})
        rows = [[name, *(str(row.get(other, 0)) for other in chosen)] for name, row in one["confusion"].items()]
        table = table_markdown(["expected", *chosen], rows)
        parts.append(f"\n## Chosen by {side} (macro F1 {one['macro_f1']:.3f})\n\n{table}")
    return "".join(parts)
