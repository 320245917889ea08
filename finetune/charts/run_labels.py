"""Names, order and colours for several runs side by side: a label says only what differs between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from finetune.charts.curves import LARGEST, Run, natural_key

# Flags that say where and how a run was kept, not what it trained.
UNIMPORTANT = {
    "name", "experiments_dir", "config", "resume", "report_to", "push_to_hub", "dry_run", "show_mask", "doctor",
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "trust_remote_code", "num_proc", "tokens_per_pass",
}  # fmt: skip
FIRST = ["model", "dataset", "format", "rank", "alpha", "lr", "epochs", "batch_size", "grad_accum", "max_seq_length"]
MOST_NAMED = 4  # runs that differ by more flags are named by as few as tell them apart, and "…"
# Okabe and Ito's palette without black and yellow: told apart with every common colour blindness and on white.
CATEGORIES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
# Viridis, but for its end: a darker yellow, as white paper swallows the real one. Lightness rises all the way.
SEQUENCE = [
    "#440154", "#482576", "#414487", "#35608D", "#2A788E", "#21908C", "#22A884", "#43BF71", "#7AD151", "#DACF20",
]  # fmt: skip
# Lengths of strokes and gaps in line widths. Dots are left to evaluation curves.
DASHES = [(), (6, 2), (2.5, 1.3), (7, 1.5, 1.2, 1.5), (6, 1.3, 1.2, 1.3, 1.2, 1.3)]


@dataclass(frozen=True)
class Look:
    """How one run is drawn. Runs that differ by nothing but their seed share `group`, colour and dash."""

    group: str
    color: str
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Runs in drawing order with their looks, the flags that differ, and what all have in common."""

    runs: list[Run]
    looks: list[Look]
    differing: list[str]
    common: dict[str, Any]


def compare(runs: list[Run]) -> Comparison:
    """Sort the runs by what differs (numbers as numbers), set each `Run.label`, and choose colours."""
    differing = differing_flags(runs)
    runs = sorted(runs, key=lambda run: ([sort_key(run.flags.get(key)) for key in differing], natural_key(run.folder)))
    keys = [key for key in differing if key != "seed"]
    named = telling_keys(runs, keys) if len(keys) > MOST_NAMED else keys
    names = [describe(run.flags, named) + "  …" * (len(named) < len(keys)) for run in runs]
    if not all(names):
        names = [name or visible(run.folder.name) for run, name in zip(runs, names, strict=True)]
    _label(runs, names, "seed" in differing)
    flags = [run.flags for run in runs]
    common = {
        key: flags[0][key]
        for key in [*FIRST, "seed"]
        if flags and key not in differing and all(key in one and one[key] == flags[0].get(key) for one in flags)
    }
    return Comparison(runs, _looks(runs, names, named), differing, common)


def differing_flags(runs: list[Run]) -> list[str]:
    """The flags with more than one value among the runs that have them, the telling ones first, seed last."""
    flags = [run.flags for run in runs]
    keys = {key for one in flags for key in one} - UNIMPORTANT
    differing = [key for key in keys if len({comparable(key, one[key]) for one in flags if key in one}) > 1]
    if "rank" in differing and "alpha" in differing:
        # alpha = 2 x rank is the default and would only repeat what rank says.
        both = [(one.get("alpha"), one.get("rank")) for one in flags]
        ratios = {alpha / rank for alpha, rank in both if is_number(alpha) and is_number(rank) and rank}
        if len(ratios) == 1:
            differing.remove("alpha")
    return sorted(differing, key=lambda key: (key == "seed", FIRST.index(key) if key in FIRST else len(FIRST), key))


def telling_keys(runs: list[Run], keys: list[str]) -> list[str]:
    """The first of `keys` that together tell apart whatever all of `keys` tell apart."""
    chosen: list[str] = []
    kinds = 1
    for key in keys:
        more = len({tuple(comparable(k, run.flags.get(k)) for k in [*chosen, key]) for run in runs})
        if more > kinds:
            chosen.append(key)
            kinds = more
    return chosen


def describe(flags: dict[str, Any], keys: list[str]) -> str:
    """`rank=8 lr=2e-04`; a model or a data set is named without its key, as its name says what it is."""
    parts = []
    for key in keys:
        if key in flags:
            text = value_text(flags[key])
            parts.append(text if key in ("model", "dataset") else f"{key}={text}")
    return "  ".join(parts)


def value_text(value: Any) -> str:
    """A flag's value in short: last part of a path or hub id, lists joined, small numbers as 2e-04."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "default"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 0.01 else f"{value:.3e}".replace(".000e", "e")
    if isinstance(value, list):
        return "+".join(value_text(item) for item in value)
    text = visible(str(value))
    return PurePath(text.replace("\\", "/")).name or text


def visible(text: str) -> str:
    """One line of visible characters: a label stands in a table and in a legend, and a name may be no text at all."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def is_number(value: Any) -> bool:
    """Whether a flag's value can be sorted and coloured by; what no float holds is taken as text."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def comparable(key: str, value: Any) -> str:
    """1 and 1.0 are one value; a model's hub id is the same as the name that a folder made of it."""
    if key == "model":
        return re.sub(r"\W", "_", value_text(value)).lower()
    return repr(float(value)) if is_number(value) else json.dumps(value, sort_keys=True, default=str)


def sort_key(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, "" if value is None else value_text(value))


def _label(runs: list[Run], names: list[str], seeds: bool) -> None:
    """Unlike labels for all runs: the name of the group, then the seed, then the time in the folder's name."""
    labels = [
        f"{name}  seed={run.flags['seed']}" if seeds and names.count(name) > 1 and "seed" in run.flags else name
        for run, name in zip(runs, names, strict=True)
    ]
    for run, label in zip(runs, labels, strict=True):
        run.label = label if labels.count(label) == 1 else f"{label}  [{visible(run.folder.name)[-15:]}]"
    labels = [run.label for run in runs]
    for number, run in enumerate(runs, start=1):
        if labels.count(run.label) > 1:
            run.label += f" #{number}"


def _looks(runs: list[Run], groups: list[str], keys: list[str]) -> list[Look]:
    """Colour by the first numeric flag in an ordered scale, dashes by the rest; else one colour per group."""
    unique = list(dict.fromkeys(groups))
    first = {group: run for run, group in reversed(list(zip(runs, groups, strict=True)))}
    numeric = next((key for key in keys if all(is_number(run.flags.get(key)) for run in runs)), None)
    if numeric:
        values = sorted({float(run.flags[numeric]) for run in runs})
        rest = {group: describe(first[group].flags, [key for key in keys if key != numeric]) for group in unique}
        kinds = list(dict.fromkeys(rest.values()))
        if len(kinds) <= len(DASHES):
            shades = ramp(len(values))
            return [
                Look(group, shades[values.index(float(run.flags[numeric]))], DASHES[kinds.index(rest[group])])
                for run, group in zip(runs, groups, strict=True)
            ]
    if len(unique) <= len(CATEGORIES):
        colors = {group: (CATEGORIES[index], ()) for index, group in enumerate(unique)}
    else:
        # Too many for colours of their own: an ordered scale, neighbours set apart by their dashes.
        shades = ramp(len(unique))
        colors = {group: (shades[index], DASHES[index % 3]) for index, group in enumerate(unique)}
    return [Look(group, *colors[group]) for group in groups]


def ramp(count: int) -> list[str]:
    """`count` colours spread evenly over `SEQUENCE`, dark to light; few colours keep away from its pale end."""
    first, last = {1: (2.0, 2.0), 2: (2.0, 7.0), 3: (0.5, 7.7), 4: (0.0, 8.3)}.get(count, (0.0, len(SEQUENCE) - 1.0))
    colors = []
    for index in range(count):
        place = first + index / max(count - 1, 1) * (last - first)
        low = min(int(place), len(SEQUENCE) - 2)
        pair = [[int(SEQUENCE[low + side][at : at + 2], 16) for at in (1, 3, 5)] for side in (0, 1)]
        mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*pair, strict=True)]
        colors.append("#" + "".join(f"{value:02X}" for value in mixed))
    return colors
