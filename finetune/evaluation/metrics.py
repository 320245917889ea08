"""From verdicts to numbers: each rate is a ratio of two sums over items, so that one resampling serves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.evaluation.items import ANSWER, CALL, IRRELEVANT, MISSING_PARAMETER, QUESTION, Item
from finetune.evaluation.scoring import BROKEN, NO_CALL, UNDECLARED, confusion_pairs

RESAMPLES = 2000


@dataclass
class Scored:
    """One answer with its verdicts."""

    item: Item
    text: str
    parsed_calls: list[dict[str, Any]]
    verdicts: dict[str, Any]
    latency_s: float
    new_tokens: int
    parse_errors: Sequence[str] = ()


Ratio = Callable[[Scored], tuple[float, float] | None]


def _share(verdict: str, *kinds: str, given: Callable[[Scored], bool] = lambda _: True) -> Ratio:
    """Share of the items of `kinds` for which the verdict is true (or its mean, for a verdict between 0 and 1)."""

    def ratio(scored: Scored) -> tuple[float, float] | None:
        if (kinds and scored.item.kind not in kinds) or verdict not in scored.verdicts or not given(scored):
            return None
        return float(scored.verdicts[verdict]), 1.0

    return ratio


def _one_right_answer(item: Item) -> bool:
    """A call with one right value for each argument; a row of BFCL allows several, so nothing can be counted there."""
    return item.kind == CALL and item.possible_answers is None


def _arguments(denominator: str) -> Ratio:
    def ratio(scored: Scored) -> tuple[float, float] | None:
        if not _one_right_answer(scored.item):
            return None
        return scored.verdicts["arguments_matched"], scored.verdicts[denominator]

    return ratio


def _tool_selection(scored: Scored) -> tuple[float, float] | None:
    if scored.item.kind == CALL:
        return float(scored.verdicts["name_correct"]), 1.0
    if scored.item.kind in (IRRELEVANT, MISSING_PARAMETER):
        return float(scored.verdicts["no_call_correct"]), 1.0
    return None


def _asks_back(scored: Scored) -> tuple[float, float] | None:
    if scored.item.kind != MISSING_PARAMETER:
        return None
    return float(scored.verdicts["no_call_correct"] and any(mark in scored.text for mark in "?？")), 1.0


def _quality(scored: Scored) -> tuple[float, float] | None:
    if scored.item.label is None:
        return None
    return float(scored.verdicts["quality_ok"] == scored.item.label), 1.0


# docs/evaluation.md has the same list with formulas; a test holds the two together.
RATIOS: dict[str, Ratio] = {
    "tool_name_accuracy": _share("name_correct", CALL),
    "parameter_accuracy": _share("arguments_correct", CALL),
    "argument_precision": _arguments("arguments_made"),
    "argument_recall": _arguments("arguments_expected"),
    "json_validity_rate": _share("json_valid", CALL),
    "schema_valid_rate": _share("schema_valid", CALL),
    "hallucination_rate": _share("hallucinated"),
    "irrelevance_accuracy": _share("no_call_correct", IRRELEVANT),
    "missing_parameter_accuracy": _share("no_call_correct", MISSING_PARAMETER),
    "asks_back_rate": _asks_back,
    "answer_accuracy": _share("no_call_correct", ANSWER),
    "tool_selection_accuracy": _tool_selection,
    "parallel_accuracy": _share("arguments_correct", CALL, given=lambda scored: scored.verdicts["parallel"]),
    "multi_step_accuracy": _share("arguments_correct", CALL, given=lambda scored: scored.verdicts["step"] > 0),
    "exact_match": _share("exact_match"),
    "token_f1": _share("token_f1"),
    "rouge_l": _share("rouge_l"),
    "quality_ok_rate": _share("quality_ok", QUESTION),
    "quality_accuracy": _quality,
    "bfcl_accuracy": _share("bfcl_valid"),
    "bfcl_checker_agreement": _share("bfcl_agrees"),
}
LOWER_IS_BETTER = {"hallucination_rate", "latency_p50_s", "latency_p95_s"}


def ratio_arrays(scored: Sequence[Scored], ratio: Ratio) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, summed over the items of each row (float64, one entry a row that has any item)."""
    rows = {key: at for at, key in enumerate(dict.fromkeys((s.item.source, s.item.row) for s in scored))}
    sums = np.zeros((2, len(rows)))
    for one in scored:
        if (parts := ratio(one)) is not None:
            sums[:, rows[one.item.source, one.item.row]] += parts
    return sums[0], sums[1]


def resampling_weights(rows: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each row is drawn in each bootstrap sample, shape (resamples, rows), each line summing to `rows`."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)


def resampled_ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratio in each bootstrap sample; nan where a sample drew no row with such an item."""
    below = weights @ denominator
    return np.divide(weights @ numerator, below, out=np.full(len(weights), np.nan), where=below > 0)


def interval_95(samples: np.ndarray) -> list[float] | None:
    """The percentile interval [2.5%, 97.5%] of bootstrap samples; None when there are none."""
    samples = samples[~np.isnan(samples)]
    return [round(float(bound), 4) for bound in np.percentile(samples, [2.5, 97.5])] if len(samples) else None


def compute_metrics(scored: Sequence[Scored], *, seed: int = 0) -> dict[str, Any]:
    """Metric names with plain numbers at the top, then intervals, per-tool tables, the confusion matrix and counts.

    A metric for which the data has no item is absent, and listed under "not_measured".
    """
    metrics: dict[str, Any] = {}
    intervals: dict[str, list[float] | None] = {}
    missing: list[str] = []
    weights = resampling_weights(len({(s.item.source, s.item.row) for s in scored}), seed) if scored else None
    for name, ratio in RATIOS.items():
        numerator, denominator = ratio_arrays(scored, ratio)
        if denominator.sum() > 0:
            metrics[name] = round(float(numerator.sum() / denominator.sum()), 6)
            intervals[name] = interval_95(resampled_ratio(numerator, denominator, weights))
        elif name == "argument_precision" and any(_one_right_answer(s.item) for s in scored):
            metrics[name] = 0.0  # no argument was made at all
        else:
            missing.append(name)
    if "argument_precision" in metrics and "argument_recall" in metrics:
        both = metrics["argument_precision"] + metrics["argument_recall"]
        product = metrics["argument_precision"] * metrics["argument_recall"]
        metrics["argument_f1"] = round(2 * product / both, 6) if both else 0.0
    metrics |= _quality_scores(scored)
    per_tool = _tool_tables(scored)
    metrics |= per_tool.pop("averages", {})
    if scored:
        latencies = [s.latency_s for s in scored]
        metrics["latency_p50_s"] = round(float(np.percentile(latencies, 50)), 4)
        metrics["latency_p95_s"] = round(float(np.percentile(latencies, 95)), 4)
    for category in sorted({s.item.category for s in scored if "bfcl_valid" in s.verdicts}):
        right = [s.verdicts["bfcl_valid"] for s in scored if s.item.category == category]
        metrics[f"bfcl_{category}_accuracy"] = round(sum(right) / len(right), 6)
    kinds = [s.item.kind for s in scored]
    return metrics | {
        "items": len(scored),
        "rows": len({(s.item.source, s.item.row) for s in scored}),
        "intervals_95": intervals,
        "items_by_kind": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "calls": {
            "expected": sum(len(s.item.expected_calls) for s in scored),
            "made": sum(len(s.parsed_calls) for s in scored),
            "of_undeclared_tools": sum(len(s.verdicts.get("hallucinated_tools", ())) for s in scored),
            "undeclared_arguments": sum(len(s.verdicts.get("hallucinated_arguments", ())) for s in scored),
        },
        "not_measured": missing,
        **per_tool,
    }


def _tool_tables(scored: Sequence[Scored]) -> dict[str, Any]:
    """Precision, recall and F1 of every tool (and of making no call), and the confusion matrix, by scikit-learn."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    requests = [s for s in scored if s.item.kind in (CALL, IRRELEVANT, MISSING_PARAMETER)]
    pairs = [pair for s in requests for pair in confusion_pairs(s.item, s.parsed_calls, len(s.parse_errors))]
    if not pairs:
        return {}
    expected, made = zip(*pairs, strict=True)
    tools = sorted({name for pair in pairs for name in pair} - {NO_CALL, UNDECLARED, BROKEN})
    # Averages run over what the data asks for; a tool that is only called by mistake costs its victim's recall.
    asked = [name for name in [*tools, NO_CALL] if name in set(expected)]
    precision, recall, f1, support = precision_recall_fscore_support(expected, made, labels=asked, zero_division=0)
    averages = {}
    for average in ("macro", "weighted"):
        values = precision_recall_fscore_support(expected, made, labels=asked, average=average, zero_division=0)[:3]
        for name, value in zip(("precision", "recall", "f1"), values, strict=True):
            averages[f"{average}_{name}"] = round(float(value), 6)
    labels = [*tools, NO_CALL, UNDECLARED, BROKEN]
    return {
        "averages": averages,
        "per_tool": {
            name: {"precision": round(float(p), 6), "recall": round(float(r), 6), "f1": round(float(f), 6),
                   "support": int(n)}
            for name, p, r, f, n in zip(asked, precision, recall, f1, support, strict=True)
        },
        "confusion_matrix": {
            "labels": labels,
            "rows": "expected",
            "columns": "made",
            "matrix": confusion_matrix(expected, made, labels=labels).tolist(),
        },
    }  # fmt: skip


def _quality_scores(scored: Sequence[Scored]) -> dict[str, float]:
    """Precision, recall and F1 of the quality rule's "ok" against the rows' labels."""
    labelled = [s for s in scored if s.item.label is not None]
    if not labelled:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    truth, rule = [s.item.label for s in labelled], [s.verdicts["quality_ok"] for s in labelled]
    values = precision_recall_fscore_support(truth, rule, average="binary", pos_label=True, zero_division=0)[:3]
    return {
        f"quality_{name}": round(float(v), 6) for name, v in zip(("precision", "recall", "f1"), values, strict=True)
    }


def compare(base: Sequence[Scored], tuned: Sequence[Scored], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For every metric both have: difference (tuned - base), its paired bootstrap interval, and an exact test.

    The items must be the same in the same order. The interval resamples rows, the same ones for both models. The
    p value is McNemar's exact test over items (a binomial test on those that one model alone got right); it is None
    for metrics that are no yes-or-no verdict.
    """
    from scipy.stats import binomtest

    if [s.item for s in base] != [s.item for s in tuned]:
        raise ValueError("base and tuned were not scored on the same items")
    weights = resampling_weights(len({(s.item.source, s.item.row) for s in base}), seed)
    comparison: dict[str, dict[str, Any]] = {}
    for name, ratio in RATIOS.items():
        parts = [ratio_arrays(side, ratio) for side in (base, tuned)]
        if any(denominator.sum() == 0 for _, denominator in parts):
            continue
        before, after = (numerator.sum() / denominator.sum() for numerator, denominator in parts)
        samples = resampled_ratio(*parts[1], weights) - resampled_ratio(*parts[0], weights)
        pairs = [(ratio(b), ratio(t)) for b, t in zip(base, tuned, strict=True)]
        pairs = [(b[0], t[0]) for b, t in pairs if b is not None and t is not None]
        p_value = None
        if name not in ("argument_precision", "argument_recall", "token_f1", "rouge_l"):
            only_base = sum(b > t for b, t in pairs)
            only_tuned = sum(t > b for b, t in pairs)
            p_value = float(binomtest(only_tuned, only_base + only_tuned).pvalue) if only_base + only_tuned else 1.0
        comparison[name] = {
            "base": round(float(before), 6),
            "tuned": round(float(after), 6),
            "difference": round(float(after - before), 6),
            "interval_95": interval_95(samples),
            "p_value": p_value,
        }
    return comparison


__all__ = ["LOWER_IS_BETTER", "RATIOS", "Scored", "compare", "compute_metrics"]
