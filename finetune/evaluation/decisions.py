"""Decisions without generation: the model chooses between answers by their likelihood, over one shared prompt.

Nothing is parsed, so formats whose calls cannot be read are scored too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.evaluation.answer_settings import answer_settings
from finetune.evaluation.folder import FILE_PREFIXES, adapter_of, describe_items
from finetune.evaluation.items import Item, Option
from finetune.evaluation.metrics import METRICS, REQUESTS, Scored, compute_metrics, paired_differences
from finetune.evaluation.options import OptionPool
from finetune.evaluation.rank_losses import LossMeter
from finetune.evaluation.report import table_markdown, write_report
from finetune.evaluation.scoring import score
from finetune.files import json_lines, write_json, write_text_atomic
from finetune.progress import counted, progress_bar, say
from finetune.runs.find import Run
from formats import Format, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHOWN = (
    "decision_accuracy", "decision_accuracy_norm", "tool_selection_accuracy", "tool_name_accuracy",
    "irrelevance_accuracy", "missing_parameter_accuracy",
)  # fmt: skip
DECISION_METRICS = [metric for metric in METRICS if metric.name in SHOWN]


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
    pool, decisions = OptionPool(items), Decisions()
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
    message: dict[str, Any] = {"role": "assistant", "content": option.text}
    if option.calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in option.calls]
    conversation = {"messages": [*item.messages, message], "tools": item.tools}
    encoded = encode(conversation, tokenizer, fmt, train_on="last", reasoning="drop", allow_unreadable_calls=True)
    if not encoded.sequences:
        return None, str(encoded.reason)
    return (encoded.sequences[-1].input_ids, encoded.sequences[-1].labels), ""


def choose(
    model: Any, tokenizer: PreTrainedTokenizerBase, decisions: Decisions, path: Path, *, name: str
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
        if not all(map(math.isfinite, totals)):
            where = f"{item.source} row {item.row}, turn {item.turn}"
            raise UserError(f"{where}: the likelihood of an answer is not finite; try another --dtype or checkpoint")
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
    return scored, {
        "decision_confusion": confusion,
        "decision_macro_f1": round(macro, 6),
        "seconds_per_item": round(seconds, 4),
    }


def report_decisions(
    run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, fmt: Format, items: Sequence[Item], sides: Sequence[str],
    folder: Path, *, longest: int | None, sources: str, seed: int,
) -> str:  # fmt: skip
    """Let the base and the tuned model choose, write the report into `folder`; returns its text.

    Raises UserError when no item can be scored.
    """
    decisions = make_decisions(items, tokenizer, fmt, longest=longest)
    if decisions.refused:
        item, reason = decisions.refused[0]
        say(f"{counted(len(decisions.refused), 'answer')} not scored, first: {item.source} row {item.row}: {reason}")
    if not decisions.items:
        raise UserError("no row is a request with tools whose answers can be expressed; nothing to choose from")
    scored, metrics = {}, {}
    for side in sides:
        with adapter_of(side, model):
            path = folder / f"{FILE_PREFIXES[side]}_decisions.jsonl"
            scored[side], found = choose(model, tokenizer, decisions, path, name=side)
        metrics[side] = {
            **compute_metrics(scored[side], seed=seed, metrics_of=DECISION_METRICS),
            "not_scored": len(decisions.refused),
            "data": describe_items(decisions.items),
            "settings": answer_settings(run, side, model, fmt, None),
            **found,
        }
        write_json(folder / f"{FILE_PREFIXES[side]}_metrics.json", metrics[side])
    compared = (
        paired_differences(scored["base"], scored["tuned"], seed=seed, metrics_of=DECISION_METRICS)
        if len(scored) == 2
        else {}
    )
    heading = f"{len(decisions.items)} decisions by likelihood ({sources}), format {fmt.name}, nothing generated."
    write_report(metrics, compared, [heading], folder)
    text = (folder / "comparison.md").read_text(encoding="utf-8") + _confusion_markdown(metrics)
    write_text_atomic(folder / "comparison.md", text)
    return text


def _confusion_markdown(found: dict[str, dict[str, Any]]) -> str:
    """A table of expected and chosen kinds for each model."""
    parts = []
    for side, one in found.items():
        chosen = sorted({name for row in one["decision_confusion"].values() for name in row})
        rows = [
            [name, *(str(row.get(other, 0)) for other in chosen)] for name, row in one["decision_confusion"].items()
        ]
        table = table_markdown(["expected", *chosen], rows)
        parts.append(f"\n## Chosen by {side} (macro F1 {one['decision_macro_f1']:.3f})\n\n{table}")
    return "".join(parts)
