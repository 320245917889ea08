"""Which runs a sweep has: values on the command line, or a YAML file with a grid, a list of runs and random draws.

Every name and value is checked by the flags that train_lora.py declares (finetune/settings.py), so that a sweep is
refused before its first run and not in its ninetieth.
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
from finetune.errors import UserError
from finetune.files import read_data
from finetune.runs.config_schema import schema_fault
from finetune.settings import BY_NAME, FLAGS, Settings

# Flags of train_lora.py that the sweep sets itself.
RESERVED = {name: f"--{name} before the --" for name in ("experiments_dir", "name", "force")}
MAX_RUNS = 10_000
MAX_LABEL_BYTES = 80  # a folder name has at most 255, and names of other files are made of this one
SWITCH_VALUES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
# What a sweep's folder holds beside its runs.
OWN_FILES = ("logs", "sweep.json", "sweep.log", "summary.csv", "comparison.png", "decisions.jsonl")

_VALUES = {"type": "array", "minItems": 1}
_RANGE = {
    "type": "object", "properties": {"min": {}, "max": {}, "scale": {"enum": ["linear", "log"]}},
    "required": ["min", "max"], "additionalProperties": False,
}  # fmt: skip
_RANDOM = {
    "type": ["object", "null"], "required": ["count", "flags"], "additionalProperties": False,
    "properties": {
        "count": {"type": "integer", "minimum": 1, "maximum": MAX_RUNS}, "seed": {"type": "integer"},
        "flags": {"type": "object", "minProperties": 1,
                  "additionalProperties": {"if": {"type": "array"}, "then": _VALUES, "else": _RANGE}},
    },
}  # fmt: skip
SCHEMA = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "train": {"type": ["object", "null"]},
        "grid": {"type": ["object", "null"], "additionalProperties": _VALUES},
        "runs": {"type": ["array", "null"], "items": {"type": "object"}},
        "random": _RANDOM,
        "seeds": {"type": ["integer", "null"], "minimum": 1},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run of the sweep: `flags` are all flags that it is given, `varied` those of them that the sweep varies."""

    name: str
    flags: dict[str, Any]
    varied: dict[str, Any]

    def settings(self) -> Settings:
        """All flags of the run with their defaults filled in; raises UserError where they contradict each other."""
        return Settings(**self.flags, given=set(self.flags))

    def arguments(self) -> list[str]:
        """The run's flags as command-line arguments of train_lora.py."""
        arguments: list[str] = []
        for name, value in self.flags.items():
            if value is None:
                continue
            if BY_NAME[name].is_switch:
                arguments.append(f"--{name}" if value else f"--no-{name}")
            else:
                arguments += [f"--{name}", *map(str, value if BY_NAME[name].many else [value])]
        return arguments


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of the sweep, arguments of every run), split at the first `--`."""
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def fixed_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of every run, from the arguments after `--`: (those of the recipe, --config; those given)."""
    given = vars(settings.build_parser().parse_args(arguments))
    config = given.pop("config", None)
    _refuse_unvariable("flags after the --", given)
    recipe = settings.read_config(config, given) if config else {}
    # An experiment_config.json also has its run's own folder, and every flag at its default.
    recipe = {name: value for name, value in recipe.items() if name not in RESERVED and not BY_NAME[name].action}
    return _without_defaults(recipe), given


def grid_values(name: str, arguments: Sequence[str]) -> list[Any]:
    """The values of one flag from its arguments: `on`/`off` for a switch, `a,b` for one value that is a list.

    `default` is the flag's default. Raises UserError for an unknown flag or an invalid value.
    """
    flag, values = BY_NAME[name], []
    for argument in arguments or ["on"]:
        value: Any = argument
        if argument == "default":
            value = flag.default
        elif flag.is_switch:
            value = SWITCH_VALUES.get(argument.lower(), argument)
        elif flag.many:
            value = argument.split(",")
            if "" in value:
                raise UserError(f"--{name} {argument}: empty item beside a comma; write one list as a,b")
        values.append(settings.checked(f"--{name}", name, value))
    return values


def read_file(path: str | Path) -> dict[str, Any]:
    """The sections train, grid, runs, random and seeds of a sweep's YAML, each value checked; see docs/sweeps.md.

    Raises UserError, naming the file and the section.
    """
    where, data = f"sweep {path}", read_data("sweep", path)
    if fault := schema_fault(SCHEMA, data):
        raise UserError(f"{where}{fault}; see docs/sweeps.md")
    train = dict(data.get("train") or {})
    recipe = fixed_flags(["--config", str(train.pop("config"))])[0] if "config" in train else {}
    draws = data.get("random")
    return {
        "train": recipe | _checked(f"{where}, train", train),
        "grid": _checked_lists(f"{where}, grid", data.get("grid") or {}),
        "runs": [_checked(f"{where}, runs, entry {n}", run) for n, run in enumerate(data.get("runs") or [], start=1)],
        "random": draws
        and {
            "count": int(draws["count"]),
            "seed": int(draws.get("seed", 0)),
            "flags": _checked_ranges(f"{where}, random", draws["flags"]),
        },
        "seeds": data.get("seeds") and int(data["seeds"]),
    }


def make_points(
    fixed: dict[str, Any],
    grid: dict[str, list[Any]],
    *,
    runs: Sequence[dict[str, Any]] = (),
    draws: Sequence[dict[str, Any]] = (),
    seeds: int | None = None,
) -> list[Point]:
    """All runs: each of `runs` with each of `draws` with every combination of `grid`, `seeds` times.

    Seeds count up from the run's own. The first flag of the grid varies slowest. Duplicate runs are dropped. Raises
    UserError when the flags of a run contradict each other or there are too many runs.
    """
    # In the order of declaration, so that run names do not depend on how the sweep was written.
    names = [flag.name for flag in FLAGS if flag.name in grid]
    sections = [set(grid), set().union(*runs), set().union(*draws)]
    varying = set().union(*sections)
    if seeds and "seed" in varying:
        raise UserError("--seeds and several values of --seed exclude each other; keep one of them")
    for name in sorted(varying):
        if sum(name in section for section in sections) > 1:
            raise UserError(f"--{name} varies in two sections of the sweep (grid, runs, random); keep one of them")
    size = math.prod(map(len, grid.values())) * max(len(runs), 1) * max(len(draws), 1) * (seeds or 1)
    if size > MAX_RUNS:
        raise UserError(f"this sweep has {size:,} runs, more than {MAX_RUNS:,}; give fewer values, or draw at random")
    first_seed = fixed.get("seed", BY_NAME["seed"].default)
    repeats = [{"seed": settings.checked("--seeds", "seed", first_seed + n)} for n in range(seeds or 0)] or [{}]
    unique: dict[str, dict[str, Any]] = {}
    for run, draw, values, repeat in itertools.product(
        runs or [{}], draws or [{}], itertools.product(*(grid[name] for name in names)), repeats
    ):
        flags = fixed | run | draw | dict(zip(names, values, strict=True)) | repeat
        unique[json.dumps(flags, sort_keys=True)] = flags
    varying |= set(repeats[0])
    differing = [
        flag.name for flag in FLAGS
        if flag.name in varying and len({json.dumps(flags.get(flag.name)) for flags in unique.values()}) > 1
    ]  # fmt: skip
    taken, points_by_key = set(OWN_FILES), {}
    for key in sorted(unique):  # of two runs with one label, the same one must get the number next time
        varied = {name: unique[key][name] for name in differing if name in unique[key]}
        points_by_key[key] = Point(free_name(run_label(varied), taken), unique[key], varied)
    points = [points_by_key[key] for key in unique]
    for point in points:
        try:
            point.settings()
        except UserError as error:
            raise UserError(f"run {point.name}: {error}") from error
    repositories = [point.flags["push_to_hub"] for point in points if point.flags.get("push_to_hub")]
    if len(set(repositories)) < len(repositories):
        raise UserError("--push_to_hub: the runs would overwrite each other's upload; upload the best one after the "
                        "sweep (export_lora.py RUN --to hub)")  # fmt: skip
    return points


def run_label(varied: dict[str, Any]) -> str:
    """A folder name from the varied flags: `rank16_lr1e-04`; models and data sets by their own names alone."""
    parts = []
    for name, value in varied.items():
        if isinstance(value, bool):
            parts.append(name if value else f"no_{name}")
        else:
            parts.append(value_text(value) if name in ("model", "dataset") else f"{name}{value_text(value)}")
    label = re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-._")
    if len(label.encode()) > MAX_LABEL_BYTES:
        start = label.encode()[:70].decode("utf-8", "ignore")
        label = f"{start}_{sha256(label.encode()).hexdigest()[:8]}"
    return label or "run"


def fingerprint(points: Sequence[Point], extra: dict[str, Any]) -> str:
    """Eight characters that are the same for the same runs in any order, and differ otherwise."""
    runs = sorted(json.dumps(point.flags, sort_keys=True) for point in points)
    return sha256(json.dumps([runs, extra], sort_keys=True).encode()).hexdigest()[:8]


def draw(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The random runs of a `random` section of `read_file`; the same for the same seed."""
    if not spec:
        return []
    generator = random.Random(spec["seed"])
    return [
        {
            name: settings.checked("random", name, _draw_value(generator, values))
            for name, values in spec["flags"].items()
        }
        for _ in range(spec["count"])
    ]


def _draw_value(generator: random.Random, values: dict[str, Any] | list[Any]) -> Any:
    """One of a list of values, or a number of a range, three significant digits of it unless the flag is an integer."""
    if isinstance(values, list):
        return generator.choice(values)
    low, high = values["min"], values["max"]
    margin = 0.5 if isinstance(low, int) else 0.0  # so that both ends are as likely as the numbers between them
    if values.get("scale") == "log":
        value = math.exp(generator.uniform(math.log(low - margin), math.log(high + margin)))
    else:
        value = generator.uniform(low - margin, high + margin)
    value = round(value) if margin else float(f"{value:.3g}")
    return min(max(value, low), high)


def _checked(where: str, flags: dict[str, Any]) -> dict[str, Any]:
    _refuse_unvariable(where, flags)
    _refuse_command_line_only(where, flags)
    return {name: settings.checked(where, name, value) for name, value in flags.items()}


def _checked_lists(where: str, flags: dict[str, list[Any]]) -> dict[str, list[Any]]:
    _refuse_unvariable(where, flags)
    _refuse_command_line_only(where, flags)
    return {name: [settings.checked(where, name, value) for value in values] for name, values in flags.items()}


def _checked_ranges(where: str, flags: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = _checked_lists(where, {name: one for name, one in flags.items() if isinstance(one, list)})
    for name, given in flags.items():
        if name in read:
            continue
        ends = _checked_lists(where, {name: [given["min"], given["max"]]})[name]
        if None in (given["min"], given["max"]) or any(isinstance(end, bool | str | list) for end in ends):
            raise UserError(f"{where}, {name}: a range needs a flag with numbers; give a list of values")
        if ends[0] > ends[1] or (given.get("scale") == "log" and ends[0] <= 0):
            raise UserError(f"{where}, {name}: min must be <= max, and > 0 on a log scale")
        read[name] = given | {"min": ends[0], "max": ends[1]}
    return {name: read[name] for name in flags}


def _refuse_unvariable(where: str, flags: dict[str, Any]) -> None:
    for name in flags:
        if name in RESERVED:
            raise UserError(f"{where}: the sweep sets --{name} of every run; use {RESERVED[name]}")
        if name in BY_NAME and BY_NAME[name].action:
            raise UserError(f"{where}: --{name} is not for a run of a sweep; remove it")


def _refuse_command_line_only(where: str, flags: dict[str, Any]) -> None:
    for name in settings.COMMAND_LINE_ONLY:
        if name in flags:
            raise UserError(f"{where}: {name} counts only on the command line; remove it, and add -- --{name}")


def _without_defaults(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that differ from their defaults."""
    kept = {name: value for name, value in flags.items() if value != BY_NAME[name].default}
    if "alpha" in kept and kept["alpha"] == 2 * flags.get("rank", BY_NAME["rank"].default):
        del kept["alpha"]  # the default follows the rank, and has to follow it when the sweep varies the rank
    return kept


def free_name(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; adds it, in lower case, to `taken`."""
    free, number = name, 1
    while free.lower() in taken:  # names that differ in case alone are one folder on Windows
        number += 1
        free = f"{name}_{number}"
    taken.add(free.lower())
    return free
