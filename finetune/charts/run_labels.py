"""Labels, order and colours for several runs side by side: a label names only what differs between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from finetune.charts.curves import MAX_LOSS, LoggedRun, natural_key
from finetune.charts.palette import CATEGORIES, DASHES, ramp

# Flags that do not change what is trained; runs are never labelled with them.
IGNORED_FLAGS = {
    "name", "experiments_dir", "config", "resume", "report_to", "push_to_hub", "dry_run", "show_mask", "doctor",
    "logging_steps", "eval_steps", "eval_ranks", "save_steps", "save_total_limit", "trust_remote_code", "num_proc",
    "tokens_per_pass",
}  # fmt: skip
FLAG_ORDER = (
    "model", "dataset", "format", "rank", "alpha", "lr", "epochs", "batch_size", "grad_accum", "max_seq_length",
)  # fmt: skip
MAX_NAMED_FLAGS = 4  # runs that differ by more flags are labelled with as few as tell them apart, and "…"


@dataclass(frozen=True)
class Look:
    """How one run is drawn. Runs that differ only by their seed share `group`, colour and dash."""

    group: str
    color: str
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Runs in drawing order with their looks, the flags that differ, and those that all have in common."""

    runs: list[LoggedRun]
    looks: list[Look]
    differing: list[str]
    common: dict[str, Any]


def compare_runs(runs: list[LoggedRun]) -> Comparison:
    """Sort the runs by what differs (numbers as numbers), set each `LoggedRun.label`, and choose colours."""
    differing = differing_flags(runs)
    runs = sorted(runs, key=lambda run: ([sort_key(run.flags.get(key)) for key in differing], natural_key(run.folder)))
    keys = [key for key in differing if key != "seed"]
    named = distinguishing_flags(runs, keys) if len(keys) > MAX_NAMED_FLAGS else keys
    names = [describe(run.flags, named) + "  …" * (len(named) < len(keys)) for run in runs]
    if not all(names):
        names = [name or one_line(run.folder.name) for run, name in zip(runs, names, strict=True)]
    _set_labels(runs, names, "seed" in differing)
    # Only runs with a seed can be repeats of one another.
    names = [name if "seed" in run.flags else run.label for run, name in zip(runs, names, strict=True)]
    common = {
        key: runs[0].flags[key]
        for key in (*FLAG_ORDER, "max_steps", "seed")
        if key not in differing and all(key in run.flags and run.flags[key] == runs[0].flags[key] for run in runs)
    }
    return Comparison(runs, _choose_looks(runs, names, named), differing, common)


def differing_flags(runs: list[LoggedRun]) -> list[str]:
    """The flags with more than one value among the runs that have them, in `FLAG_ORDER`, seed last."""
    flags = [run.flags for run in runs]
    keys = {key for one in flags for key in one} - IGNORED_FLAGS
    differing = [key for key in keys if len({comparable(key, one[key]) for one in flags if key in one}) > 1]
    if "rank" in differing and "alpha" in differing:
        # alpha = 2 x rank is the default and would only repeat what rank says.
        both = [(one.get("alpha"), one.get("rank")) for one in flags]
        ratios = {alpha / rank for alpha, rank in both if is_number(alpha) and is_number(rank) and rank}
        if len(ratios) == 1:
            differing.remove("alpha")
    order = {key: index for index, key in enumerate(FLAG_ORDER)}
    return sorted(differing, key=lambda key: (key == "seed", order.get(key, len(order)), key))


def distinguishing_flags(runs: list[LoggedRun], keys: list[str]) -> list[str]:
    """The first of `keys` that together distinguish all the runs that all of `keys` distinguish."""
    chosen: list[str] = []
    groups = 1
    for key in keys:
        more = len({tuple(comparable(k, run.flags.get(k)) for k in [*chosen, key]) for run in runs})
        if more > groups:
            chosen.append(key)
            groups = more
    return chosen


def describe(flags: dict[str, Any], keys: list[str]) -> str:
    """`rank=8 lr=2e-04`; the values of model and dataset without their key."""
    texts = {key: value_text(flags[key]) for key in keys if key in flags}
    return "  ".join(text if key in ("model", "dataset") else f"{key}={text}" for key, text in texts.items())


def value_text(value: Any) -> str:
    """A flag's value in short: last part of a path or Hub id, lists joined, small numbers as 2e-04."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "default"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 0.01 else re.sub(r"\.?0*e", "e", f"{value:.3e}")
    if isinstance(value, list):
        return "+".join(value_text(item) for item in value)
    text = one_line(str(value))
    return PurePath(text.replace("\\", "/")).name or text


def one_line(text: str) -> str:
    """`text` without line breaks and unprintable characters, for tables and legends."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def is_number(value: Any) -> bool:
    """Whether a flag's value can be sorted and coloured as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_LOSS


def comparable(key: str, value: Any) -> str:
    """Equal for equal values, such as 1 and 1.0, and for a model's Hub id and a local copy."""
    if key == "model":
        return value_text(value).lower()
    return repr(float(value)) if is_number(value) else json.dumps(value, sort_keys=True, default=str)


def sort_key(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, "" if value is None else value_text(value))


def _set_labels(runs: list[LoggedRun], names: list[str], seeds_differ: bool) -> None:
    """Distinct labels: the group's name, then the seed, then the time in the folder's name, then a number."""
    labels = [
        f"{name}  seed={run.flags['seed']}" if seeds_differ and names.count(name) > 1 and "seed" in run.flags else name
        for run, name in zip(runs, names, strict=True)
    ]
    for run, label in zip(runs, labels, strict=True):
        run.label = label if labels.count(label) == 1 else f"{label}  [{one_line(run.folder.name)[-15:]}]"
    labels = [run.label for run in runs]
    for number, run in enumerate(runs, start=1):
        if labels.count(run.label) > 1:
            run.label += f" #{number}"


def _choose_looks(runs: list[LoggedRun], groups: list[str], keys: list[str]) -> list[Look]:
    """Colours by the first numeric flag on an ordered scale, dashes by the other flags; else one colour per group."""
    for numeric in (key for key in keys if all(is_number(run.flags.get(key)) for run in runs)):
        numbers = [float(run.flags[numeric]) for run in runs]
        others = [describe(run.flags, [key for key in keys if key != numeric]) for run in runs]
        values, kinds = sorted(set(numbers)), list(dict.fromkeys(others))
        if len(kinds) <= len(DASHES):
            shades = dict(zip(values, ramp(len(values)), strict=True))
            return [
                Look(group, shades[number], DASHES[kinds.index(other)])
                for group, number, other in zip(groups, numbers, others, strict=True)
            ]
    unique = list(dict.fromkeys(groups))
    styles: dict[str, tuple[str, tuple[float, ...]]]
    if len(unique) <= len(CATEGORIES):
        styles = {group: (CATEGORIES[index], ()) for index, group in enumerate(unique)}
    else:
        # Too many groups for distinct colours: an ordered scale, neighbours with different dashes.
        colors = ramp(len(unique))
        styles = {group: (colors[index], DASHES[index % 3]) for index, group in enumerate(unique)}
    return [Look(group, *styles[group]) for group in groups]
