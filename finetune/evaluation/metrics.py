"""From verdicts to metrics: one list of metrics, their values, intervals, and the paired comparison of two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

import numpy as np

from finetune.evaluation.items import ANSWER, CALL, IRRELEVANT, MISSING_PARAMETER, QUESTION, Item, asks_back
from finetune.evaluation.scoring import BROKEN, NO_CALL, UNDECLARED, confusion_pairs
from finetune.evaluation.suites import SUITES

BOOTSTRAP_SAMPLES = 2000
REQUESTS = (CALL, IRRELEVANT, MISSING_PARAMETER)  # kinds of items where the model chooses a tool or none


@dataclass
class Scored:
    """One answer with its verdicts."""

    item: Item
    text: str
    parsed_calls: list[dict[str, Any]]
    verdicts: dict[str, Any]
    latency_s: float
    parse_errors: Sequence[str] = ()


Value = bool | float | tuple[float, float] | None


@dataclass(frozen=True)
class Metric:
    """One number in the metrics files: the sum of numerators over items / the sum of denominators.

    name             key in the metrics files; docs/metrics.md has the definition
    verdict          key in `Scored.verdicts`, or a function of Scored. Its value is a number (denominator 1), a
                     (numerator, denominator) or, for an item that does not count, None. A metric without a verdict is
                     derived from other numbers.
    kinds            kinds of items that count; empty: all
    binary           every item is right or wrong, so that McNemar's test can compare two models
    lower_is_better  as the tables say
    zero_division    value when items count but their denominators sum to 0; None: not measured
    """

    name: str
    verdict: str | Callable[[Scored], Value] | None = None
    kinds: tuple[str, ...] = ()
    binary: bool = True
    lower_is_better: bool = False
    zero_division: float | None = None

    def ratio(self, scored: Scored) -> tuple[float, float] | None:
        """(numerator, denominator) of one answer; None when it does not count."""
        if self.kinds and scored.item.kind not in self.kinds:
            return None
        value = self.verdict(scored) if callable(self.verdict) else scored.verdicts.get(self.verdict)
        return value if value is None or isinstance(value, tuple) else (float(value), 1.0)


def _matched_arguments(total: str) -> Callable[[Scored], Value]:
    """Matching argument leaves / `total`; not where they are unknown, and not for BFCL, which allows several values."""

    def ratio(scored: Scored) -> Value:
        if scored.item.possible_answers is not None or not scored.verdicts.get("arguments_known", True):
            return None
        return scored.verdicts["arguments_matched"], scored.verdicts[total]

    return ratio


# In the order of the tables.
METRICS = [
    Metric("tool_name_accuracy", "name_correct", (CALL,)),
    Metric("parameter_accuracy", "arguments_correct", (CALL,)),
    Metric("argument_precision", _matched_arguments("arguments_made"), (CALL,), binary=False, zero_division=0.0),
    Metric("argument_recall", _matched_arguments("arguments_expected"), (CALL,), binary=False),
    Metric("json_validity_rate", "json_valid", (CALL,)),
    Metric("schema_valid_rate", "schema_valid", (CALL,)),
    Metric("hallucination_rate", "hallucinated", lower_is_better=True),
    Metric("irrelevance_accuracy", "no_call_correct", (IRRELEVANT,)),
    Metric("missing_parameter_accuracy", "no_call_correct", (MISSING_PARAMETER,)),
    Metric("asks_back_rate", lambda s: s.verdicts["no_call_correct"] and asks_back(s.text), (MISSING_PARAMETER,)),
    Metric("answer_accuracy", "no_call_correct", (ANSWER,)),
    Metric(
        "tool_selection_accuracy",
        lambda s: s.verdicts["name_correct" if s.item.kind == CALL else "no_call_correct"],
        REQUESTS,
    ),
    Metric("parallel_accuracy", lambda s: s.verdicts["arguments_correct"] if s.verdicts["parallel"] else None, (CALL,)),
    Metric("multi_step_accuracy", lambda s: s.verdicts["arguments_correct"] if s.verdicts["step"] else None, (CALL,)),
    Metric("exact_match", "exact_match"),
    Metric("token_f1", "token_f1", binary=False),
    Metric("rouge_l", "rouge_l", binary=False),
    Metric("quality_ok_rate", "quality_ok", (QUESTION,)),
    Metric("quality_accuracy", lambda s: None if s.item.label is None else s.verdicts["quality_ok"] == s.item.label),
    *(Metric(f"{name}_accuracy", f"{name}_valid") for name, suite in SUITES.items() if suite.verdict),
    Metric("bfcl_checker_agreement", "bfcl_agrees"),
    Metric("decision_accuracy", "decision_correct"),
    Metric("decision_accuracy_norm", "decision_correct_norm"),
    Metric("argument_f1"),
    *(Metric(f"{average}_{name}") for average in ("macro", "weighted") for name in ("precision", "recall", "f1")),
    *(Metric(f"quality_{name}") for name in ("precision", "recall", "f1")),
    Metric("latency_p50_s", lower_is_better=True),
    Metric("latency_p95_s", lower_is_better=True),
    Metric("tokens_per_second"),
]


def metric_names(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Names of all numbers that any of the models has, in the order of the tables."""
    rates, derived = ([m.name for m in METRICS if (m.verdict is None) is empty] for empty in (False, True))
    of_suites = tuple(f"{suite}_" for suite in SUITES)
    categories = sorted({name for m in metrics.values() for name in m if name.startswith(of_suites)} - set(rates))
    return [name for name in (*rates, *categories, *derived) if any(m.get(name) is not None for m in metrics.values())]


def _row_sums(scored: Sequence[Scored], metric: Metric) -> np.ndarray | None:
    """Numerators and denominators summed over the items of each row, shape (2, rows); None when no item counts."""
    rows = {key: at for at, key in enumerate(dict.fromkeys(one.item.origin for one in scored))}
    sums, counted = np.zeros((2, len(rows))), False
    for one in scored:
        if (ratio := metric.ratio(one)) is not None:
            sums[:, rows[one.item.origin]] += ratio
            counted = True
    return sums if counted else None


def _bootstrap_weights(scored: Sequence[Scored], seed: int) -> np.ndarray:
    """How often each row is drawn in each bootstrap sample, shape (BOOTSTRAP_SAMPLES, rows)."""
    rows = len({one.item.origin for one in scored})
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=BOOTSTRAP_SAMPLES)
    return draws.astype(np.float64)


def _resampled(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratio in each bootstrap sample; nan for a sample without any counting item."""
    below = weights @ sums[1]
    return np.divide(weights @ sums[0], below, out=np.full(len(weights), np.nan), where=below > 0)


def _interval_95(samples: np.ndarray) -> list[float] | None:
    samples = samples[~np.isnan(samples)]
    return [round(float(bound), 4) for bound in np.percentile(samples, [2.5, 97.5])] if len(samples) else None


def compute_metrics(
    scored: Sequence[Scored], *, seed: int = 0, metrics_of: Sequence[Metric] | None = None
) -> dict[str, Any]:
    """Metric names with plain numbers, then intervals, per-tool tables, the confusion matrix and counts.

    A metric that no item counts for is absent and listed under "not_measured". metrics_of: other than METRICS.
    """
    metrics: dict[str, Any] = {}
    intervals: dict[str, list[float] | None] = {}
    counted: dict[str, int] = {}
    missing: list[str] = []
    weights = _bootstrap_weights(scored, seed) if scored else None
    for metric in METRICS if metrics_of is None else metrics_of:
        if metric.verdict is None:
            continue
        sums = _row_sums(scored, metric)
        if sums is not None:
            counted[metric.name] = sum(metric.ratio(one) is not None for one in scored)
        if sums is not None and sums[1].sum() > 0:
            metrics[metric.name] = round(float(sums[0].sum() / sums[1].sum()), 6)
            intervals[metric.name] = _interval_95(_resampled(sums, weights))
        elif sums is not None and metric.zero_division is not None:
            metrics[metric.name] = metric.zero_division
        else:
            missing.append(metric.name)
    if "argument_precision" in metrics and "argument_recall" in metrics:
        both = metrics["argument_precision"], metrics["argument_recall"]
        metrics["argument_f1"] = round(harmonic_mean(both), 6)
    quality, quality_table = _quality_scores(scored)
    averages, tables = _tool_tables(scored)
    metrics |= quality | averages
    if scored and metrics_of is None:
        latencies = [one.latency_s for one in scored]
        metrics["latency_p50_s"] = round(float(np.percentile(latencies, 50)), 4)
        metrics["latency_p95_s"] = round(float(np.percentile(latencies, 95)), 4)
    for suite in SUITES:
        by_category: dict[str, list[bool]] = {}
        for one in scored:
            if f"{suite}_valid" in one.verdicts:
                by_category.setdefault(str(one.item.category), []).append(one.verdicts[f"{suite}_valid"])
        for category, valid in sorted(by_category.items()):
            metrics[f"{suite}_{category}_accuracy"] = round(sum(valid) / len(valid), 6)
    kinds = [one.item.kind for one in scored]
    return metrics | {
        "items": len(scored),
        "rows": len({one.item.origin for one in scored}),
        "counted": counted,
        "intervals_95": intervals,
        "items_by_kind": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "calls": {
            "expected": sum(len(one.item.expected_calls) for one in scored),
            "made": sum(len(one.parsed_calls) for one in scored),
            "of_undeclared_tools": sum(len(one.verdicts.get("hallucinated_tools", ())) for one in scored),
            "undeclared_arguments": sum(len(one.verdicts.get("hallucinated_arguments", ())) for one in scored),
        },
        "not_measured": missing,
        **quality_table,
        **tables,
    }


def _tool_tables(scored: Sequence[Scored]) -> tuple[dict[str, float], dict[str, Any]]:
    """(averages over tools, precision, recall and F1 of every tool and of making no call with the confusion matrix)."""
    from sklearn.metrics import classification_report, confusion_matrix

    requests = [one for one in scored if one.item.kind in REQUESTS]
    known = {call["name"] for one in requests for call in one.item.expected_calls}
    pairs = [
        pair for one in requests
        for pair in confusion_pairs(one.item, one.parsed_calls, len(one.parse_errors), known)
    ]  # fmt: skip
    if not pairs:
        return {}, {}
    expected, made = zip(*pairs, strict=True)
    tools = sorted({name for pair in pairs for name in pair} - {NO_CALL, UNDECLARED, BROKEN})
    # Averages run over the tools that the data expects; a call of any other tool lowers the recall of the expected one.
    asked = [name for name in [*tools, NO_CALL] if name in set(expected)]
    # Numbers as keys of the report: a tool may be called "macro avg".
    keys = [str(at) for at in range(len(asked))]
    report = classification_report(expected, made, labels=asked, target_names=keys, output_dict=True, zero_division=0)

    def scores(key: str) -> dict[str, float]:
        names = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
        return {name: round(float(report[key][theirs]), 6) for name, theirs in names.items()}

    averages = {
        f"{kind}_{name}": value for kind in ("macro", "weighted") for name, value in scores(f"{kind} avg").items()
    }
    labels = [*tools, NO_CALL, UNDECLARED, BROKEN]
    return averages, {
        "per_tool": {
            name: {**scores(key), "support": int(report[key]["support"])} for key, name in zip(keys, asked, strict=True)
        },
        "confusion_matrix": {
            "labels": labels,
            "rows": "expected",
            "columns": "made",
            "matrix": confusion_matrix(expected, made, labels=labels).tolist(),
        },
    }


def _quality_scores(scored: Sequence[Scored]) -> tuple[dict[str, float], dict[str, Any]]:
    """(precision, recall and F1 of the quality rule's "ok" against the rows' labels, their confusion matrix)."""
    labelled = [one for one in scored if one.item.label is not None]
    if not labelled:
        return {}, {}
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    truth, rule = [one.item.label for one in labelled], [one.verdicts["quality_ok"] for one in labelled]
    values = precision_recall_fscore_support(truth, rule, average="binary", pos_label=True, zero_division=0)[:3]
    names = ("quality_precision", "quality_recall", "quality_f1")
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}, {
        "quality_confusion": {
            "labels": ["ok", "not ok"],
            "rows": "label",
            "columns": "rule",
            "matrix": confusion_matrix(truth, rule, labels=[True, False]).tolist(),
        }
    }


def paired_differences(
    base: Sequence[Scored], tuned: Sequence[Scored], *, seed: int = 0, metrics_of: Sequence[Metric] | None = None
) -> dict[str, dict[str, Any]]:
    """For every metric that both models have: difference (tuned - base), its paired bootstrap interval, p value.

    The items must be the same in the same order. The interval resamples rows, the same ones for both models. The
    p value is McNemar's exact test over items (a binomial test on those that only one model got right); None for
    metrics that are not binary.
    """
    from scipy.stats import binomtest

    if [one.item for one in base] != [one.item for one in tuned]:
        raise ValueError("base and tuned were not scored on the same items")
    weights = _bootstrap_weights(base, seed)
    comparison: dict[str, dict[str, Any]] = {}
    for metric in METRICS if metrics_of is None else metrics_of:
        if metric.verdict is None:
            continue
        sums = [_row_sums(side, metric) for side in (base, tuned)]
        if any(one is None or one[1].sum() == 0 for one in sums):
            continue
        before, after = (one[0].sum() / one[1].sum() for one in sums)
        p_value = None
        if metric.binary:
            ratios = [(metric.ratio(b), metric.ratio(t)) for b, t in zip(base, tuned, strict=True)]
            pairs = [(b[0], t[0]) for b, t in ratios if b is not None and t is not None]
            only_base, only_tuned = sum(b > t for b, t in pairs), sum(t > b for b, t in pairs)
            p_value = float(binomtest(only_tuned, only_base + only_tuned).pvalue) if only_base + only_tuned else 1.0
        comparison[metric.name] = {
            "base": round(float(before), 6),
            "tuned": round(float(after), 6),
            "difference": round(float(after - before), 6),
            "interval_95": _interval_95(_resampled(sums[1], weights) - _resampled(sums[0], weights)),
            "p_value": p_value,
        }
    return comparison
