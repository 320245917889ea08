"""Which runs a sweep has: values on the line, or a YAML file with a grid, a list of runs and random draws.

Every name and value is checked by the flags that train_lora.py declares (finetune/settings.py), so that a sweep of a
hundred runs is refused before its first run rather than in its ninetieth.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune import settings
from finetune.charts.run_labels import value_text
from finetune.config_files import read_data
from finetune.errors import UserError
from finetune.settings import BY_NAME, FLAGS, Flag, Settings

# Where a run lies and what it is called is the sweep's business.
RESERVED = {"experiments_dir": "--experiments_dir before the --", "name": "--name before the --"}
MOST_RUNS = 10_000
SWITCH_WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
SECTIONS = ("train", "grid", "runs", "random", "seeds")
# What a sweep's folder holds beside its runs.
OWN_FILES = ("logs", "sweep.json", "sweep.log", "summary.csv", "comparison.png", "decisions.jsonl")


@dataclass(frozen=True)
class Point:
    """One run to be made: `flags` are all that it is given, `varied` those of them that the sweep varies."""

    name: str
    flags: dict[str, Any]
    varied: dict[str, Any]

    def settings(self) -> Settings:
        """All flags of the run with their defaults filled in; raises UserError where they contradict each other."""
        return Settings(**self.flags, given=set(self.flags))

    def words(self) -> list[str]:
        """The run's flags as train_lora.py reads them on its command line."""
        words: list[str] = []
        for name, value in self.flags.items():
            flag = BY_NAME[name]
            if flag.is_switch:
                if value is not None:
                    words.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                words += [f"--{name}", *([str(item) for item in value] if flag.many else [_word(value)])]
        return words


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of the sweep, words of every run), parted at the first `--`."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def fixed_flags(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that all runs share, from the words after `--`: (those of the recipe, --config; those given)."""
    given = vars(settings.build_parser().parse_args(words))
    config = given.pop("config", None)
    for name in given:
        if name in RESERVED:
            raise UserError(f"--{name} after the --: every run's folder lies in the sweep's; use {RESERVED[name]}")
        if BY_NAME[name].action:
            raise UserError(f"--{name} after the --: it is not for a run of a sweep; leave it out")
    recipe = settings.read_config(config) if config else {}
    # An experiment_config.json names the folder of the run that it came from, and every default beside what was given.
    recipe = {name: value for name, value in recipe.items() if name not in RESERVED and not BY_NAME[name].action}
    return _without_defaults(recipe), given


def grid_values(name: str, words: Sequence[str]) -> list[Any]:
    """The values of one flag from the words behind it: `on`/`off` for a switch, `a,b` for one value that is a list.

    `default` stands for the flag left away. Raises UserError for an unknown flag or a value of the wrong kind.
    """
    flag, values = BY_NAME[name], []
    for word in words or ["on"]:
        if word == "default":
            value: Any = flag.default
        elif flag.is_switch:
            value = SWITCH_WORDS.get(word.lower(), word)
        elif flag.many:
            value = word.split(",")
            if "" in value:
                raise UserError(f"--{name} {word}: nothing stands beside a comma; write one list as a,b")
        else:
            value = word
        values.append(settings.checked(f"--{name}", name, value))
    return values


def read_file(path: str | Path) -> dict[str, Any]:
    """The sections of a sweep's YAML, each value checked; see docs/sweeps.md for their meaning."""
    data = read_data("sweep", path)
    if not isinstance(data, dict) or not set(data) <= set(SECTIONS):
        unknown = sorted(map(str, set(data) - set(SECTIONS))) if isinstance(data, dict) else []
        raise UserError(f"sweep {path}: {'unknown section ' + unknown[0] if unknown else 'no mapping'}; "
                        f"it may hold {', '.join(SECTIONS)}")  # fmt: skip
    where = f"sweep {path}"
    read: dict[str, Any] = {"train": _flags(f"{where}, train", _given(data, "train", {}), allow_config=True)}
    grid = _mapping(f"{where}, grid", _given(data, "grid", {}))
    read["grid"] = {name: _values(f"{where}, grid", name, values) for name, values in grid.items()}
    runs = _given(data, "runs", [])
    if not isinstance(runs, list):
        raise UserError(f"{where}, runs: must be a list of mappings, such as '- {{rank: 8, lr: 1e-4}}'")
    read["runs"] = [_flags(f"{where}, runs, entry {number}", run) for number, run in enumerate(runs, start=1)]
    read["random"] = _random(f"{where}, random", data.get("random"))
    seeds = data.get("seeds")
    if seeds is not None and (not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1):
        raise UserError(f"{where}: seeds must be a whole number above 0, not {seeds!r}")
    read["seeds"] = seeds
    return read


def make_points(
    fixed: dict[str, Any],
    grid: dict[str, list[Any]],
    *,
    runs: Sequence[dict[str, Any]] = (),
    draws: Sequence[dict[str, Any]] = (),
    seeds: int | None = None,
) -> list[Point]:
    """All runs: each of `runs` with each of `draws` with every combination of `grid`, `seeds` times.

    Seeds count up from the run's own. The first flag of the grid varies slowest. Equal runs are made once. Raises
    UserError when a combination contradicts itself or there are too many.
    """
    # In the order of their declaration, so that a sweep has the same names however it was written down.
    names = [flag.name for flag in FLAGS if flag.name in grid]
    if seeds and ("seed" in grid or any("seed" in one for one in [*runs, *draws])):
        raise UserError("--seeds and several values of --seed exclude each other; keep one of them")
    places = [set(grid), *({name for one in some for name in one} for some in (runs, draws))]
    for name in sorted(set().union(*places)):
        if sum(name in place for place in places) > 1:
            raise UserError(f"--{name} varies in two places of the sweep (grid, runs, random); keep one of them")
    size = math.prod(map(len, grid.values())) * max(len(runs), 1) * max(len(draws), 1) * (seeds or 1)
    if size > MOST_RUNS:
        raise UserError(f"this sweep has {size:,} runs, more than {MOST_RUNS:,}; give fewer values, or draw at random")
    varying: set[str] = set()
    flags_by_run: dict[str, dict[str, Any]] = {}
    for run, draw, values in itertools.product(
        runs or [{}], draws or [{}], itertools.product(*(grid[n] for n in names))
    ):
        varied = run | draw | dict(zip(names, values, strict=True))
        for repeat in range(seeds or 1):
            if seeds:
                first = fixed.get("seed", BY_NAME["seed"].default)
                varied = varied | {"seed": settings.checked("--seeds", "seed", first + repeat)}
            varying |= set(varied)
            flags = fixed | varied
            flags_by_run[json.dumps(flags, sort_keys=True)] = flags
    differing = [
        flag.name for flag in FLAGS
        if flag.name in varying and len({json.dumps(flags.get(flag.name)) for flags in flags_by_run.values()}) > 1
    ]  # fmt: skip
    taken, named = set(OWN_FILES), {}
    for key in sorted(flags_by_run):  # so that of two runs with one label the same one has the number next time
        flags = flags_by_run[key]
        varied = {name: flags[name] for name in differing if name in flags}
        named[key] = Point(_free_name(run_label(varied), taken), flags, varied)
    points = [named[key] for key in flags_by_run]
    for point in points:
        try:
            point.settings()
        except UserError as error:
            raise UserError(f"run {point.name}: {error}") from error
    places = [point.flags["push_to_hub"] for point in points if point.flags.get("push_to_hub")]
    if len(set(places)) < len(places):
        raise UserError("--push_to_hub: the runs would upload over each other; upload the best one when the sweep is "
                        "done (export_lora.py RUN --to hub)")  # fmt: skip
    return points


def run_label(varied: dict[str, Any]) -> str:
    """A folder's name out of what is varied: `rank16_lr1e-04`; the data set's and model's own names without a key."""
    parts = []
    for name, value in varied.items():
        if isinstance(value, bool):
            parts.append(name if value else f"no_{name}")
        else:
            parts.append(value_text(value) if name in ("model", "dataset") else f"{name}{value_text(value)}")
    label = re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-._")
    if len(label.encode()) > 80:  # a folder's name may have 255 bytes, and others are made of this one
        start = label.encode()[:70].decode("utf-8", "ignore")
        label = f"{start}_{sha256(label.encode()).hexdigest()[:8]}"
    return label or "run"


def fingerprint(points: Sequence[Point], extra: dict[str, Any]) -> str:
    """Eight characters that are the same for the same runs in any order, and differ otherwise."""
    runs = sorted(json.dumps(point.flags, sort_keys=True) for point in points)
    return sha256(json.dumps([runs, extra], sort_keys=True).encode()).hexdigest()[:8]


def draw(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The random runs of a checked `random` section; the same for the same seed."""
    if not spec:
        return []
    generator = random.Random(spec["seed"])
    drawn = []
    for _ in range(spec["count"]):
        one = {}
        for name, ranges in spec["flags"].items():
            one[name] = settings.checked("random", name, _draw_one(generator, BY_NAME[name], ranges))
        drawn.append(one)
    return drawn


def _draw_one(generator: random.Random, flag: Flag, ranges: dict[str, Any] | list[Any]) -> Any:
    if isinstance(ranges, list):
        return generator.choice(ranges)
    low, high = ranges["min"], ranges["max"]
    margin = 0.5 if flag.kind is int else 0.0  # so that the two ends come up as often as the numbers between them
    if ranges.get("scale") == "log":
        value = math.exp(generator.uniform(math.log(low - margin), math.log(high + margin)))
    else:
        value = generator.uniform(low - margin, high + margin)
    # A learning rate of 17 digits makes no better run and a worse name.
    value = round(value) if margin else float(f"{value:.3g}")
    return min(max(value, low), high)


def _random(where: str, spec: Any) -> dict[str, Any] | None:
    if spec is None:
        return None
    spec = _mapping(where, spec)
    if not {"count", "flags"} <= set(spec) <= {"count", "seed", "flags"}:
        raise UserError(f"{where}: must hold count (runs to draw), flags, and may hold seed")
    count, seed = spec["count"], spec.get("seed", 0)
    if type(count) is not int or not 1 <= count <= MOST_RUNS:
        raise UserError(f"{where}: count must be a whole number from 1 to {MOST_RUNS:,}, not {count!r}")
    if type(seed) is not int:
        raise UserError(f"{where}: seed must be a whole number, not {seed!r}")
    flags = _mapping(f"{where}, flags", spec["flags"])
    if not flags:
        raise UserError(f"{where}, flags: names no flag to draw")
    read: dict[str, Any] = {}
    for name, ranges in flags.items():
        if isinstance(ranges, list):
            read[name] = _values(f"{where}, flags", name, ranges)
            continue
        ranges = dict(_mapping(f"{where}, flags, {name}", ranges))
        scale = ranges.get("scale", "linear")
        if not {"min", "max"} <= set(ranges) <= {"min", "max", "scale"} or scale not in ("linear", "log"):
            raise UserError(f"{where}, flags, {name}: give a list of values, or min, max and scale (linear or log)")
        for end in ("min", "max"):
            given, ranges[end] = ranges[end], settings.checked(f"{where}, flags", name, ranges[end])
            if given is None or isinstance(ranges[end], bool | str | list):
                raise UserError(f"{where}, flags, {name}: a range needs a flag with numbers; give a list of values")
        if ranges["min"] > ranges["max"] or (scale == "log" and not ranges["min"] > 0):
            raise UserError(f"{where}, flags, {name}: min must not be above max, and above 0 on a log scale")
        read[name] = ranges
    return {"count": count, "seed": seed, "flags": read}


def _given(data: dict[str, Any], section: str, empty: Any) -> Any:
    """What the file holds under the section's name; `empty` where that is nothing."""
    return empty if data.get(section) is None else data[section]


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping of flags, such as 'rank: [4, 8]'")
    for name in value:
        if name in RESERVED:
            raise UserError(f"{where}: {name} is the sweep's own; use {RESERVED[name]}")
        if name in BY_NAME and BY_NAME[name].action and name != "config":
            raise UserError(f"{where}: {name} is not for a run of a sweep; leave it out")
    return value


def _flags(where: str, flags: Any, allow_config: bool = False) -> dict[str, Any]:
    flags = dict(_mapping(where, flags))
    recipe = {}
    if allow_config and "config" in flags:
        recipe, _ = fixed_flags(["--config", str(flags.pop("config"))])
    return recipe | {name: settings.checked(where, name, value) for name, value in flags.items()}


def _values(where: str, name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}, {name}: must be a list of values")
    return [settings.checked(where, name, value) for value in values]


def _without_defaults(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that are not at their default: what an experiment_config.json says beyond what would happen anyway."""
    kept = {name: value for name, value in flags.items() if value != BY_NAME[name].default}
    if "alpha" in kept and kept["alpha"] == 2 * flags.get("rank", BY_NAME["rank"].default):
        del kept["alpha"]  # the default follows the rank, and has to follow it when the sweep varies the rank
    return kept


def _free_name(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free.lower() in taken:  # two names that differ in case are one folder on Windows
        number += 1
        free = f"{name}_{number}"
    taken.add(free.lower())
    return free


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
