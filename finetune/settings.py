"""Every flag of train_lora.py, declared once: parser, recipes, experiment_config.json and docs come from this list."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.flag_types import folder_name, not_negative, positive, text

EPILOG = """examples:
  python train_lora.py --model smollm2-135m --dataset data/samples/gennx_train.jsonl --format chatml
  python train_lora.py --model Qwen/Qwen2.5-3B-Instruct --rank 32 --dataset train.jsonl --eval_fraction 0.05
  python train_lora.py --dataset NotoriousH2/instructkr-apigen --dataset NotoriousH2/instructkr-when2call@train*0.5
  python train_lora.py --config configs/demo.yaml --rank 8          a recipe; flags on the line win
  python train_lora.py --config experiments/RUN/experiment_config.json   the same run again
  python train_lora.py --resume experiments/RUN                     go on where a run was stopped
  python train_lora.py --dataset train.jsonl --dry_run --show_mask 3     look before you train
"""


@dataclass(frozen=True)
class Flag:
    """One flag. `type` converts one word; `many` flags hold lists; `action` flags say what to do, not what a run is."""

    name: str
    default: Any
    help: str
    group: str
    type: Callable[[str], Any] = text
    choices: tuple[str, ...] | None = None
    many: bool = False
    optional_value: bool = False
    action: bool = False
    metavar: str | None = None

    @property
    def is_switch(self) -> bool:
        return self.type is bool


def _fraction(word: str) -> float:
    value = float(word)
    if not 0 <= value < 1:
        raise ValueError
    return value


_fraction.__name__ = "number from 0 up to, not including, 1"


def _seed(word: str) -> int:
    value = int(word)
    if not 0 <= value < 2**32:  # what NumPy's generator takes
        raise ValueError
    return value


def _ratio(word: str) -> float:
    value = float(word)
    if not 1 <= value < math.inf:
        raise ValueError
    return value


_ratio.__name__ = "number from 1 up"
_seed.__name__ = "whole number from 0 to 4294967295"
_count, _size = positive(int), positive(float)
_amount, _whole = not_negative(float), not_negative(int)

# The described system's own three datasets.
KOREAN_TOOL_CALLING = tuple(f"NotoriousH2/instructkr-{name}" for name in ("toolflow", "when2call", "apigen"))

FLAGS: tuple[Flag, ...] = (
    # model
    Flag("model", "kakaocorp/kanana-1.5-2.1b-instruct-2505",
         "Hub id, folder, or smollm2-135m (bundled, no download)", "model"),
    Flag("revision", None, "branch, tag or commit of the model on the Hub", "model"),
    Flag("load_in_4bit", None, "4-bit NF4 base (QLoRA); default: on a GPU yes, on a CPU no", "model", bool),
    Flag("dtype", "auto", "compute type; auto: bfloat16 where the hardware has it, else float16 (GPU) or float32 (CPU)",
         "model", choices=("auto", "bfloat16", "float16", "float32")),
    Flag("trust_remote_code", False, "run code that comes with the model (off: it is a stranger's code)", "model",
         bool),
    # data
    Flag("dataset", list(KOREAN_TOOL_CALLING), "JSONL, JSON or Parquet file, "
         "or Hub id[:config][@split]; may be given several times; "
         "a trailing *0.5 takes half of its rows", "data", many=True, metavar="DATA"),
    Flag("eval_dataset", None, "rows for eval_loss, same forms as --dataset", "data", many=True, metavar="DATA"),
    Flag("eval_fraction", 0.0, "share of the training rows to hold out for eval_loss", "data", _fraction),
    Flag("limit", None, "use only the first N rows of each --dataset; an --eval_dataset is used whole", "data", _count),
    Flag("format", "auto", "chat format (see docs/formats.md), path to a format's YAML, native, or auto", "data"),
    Flag("train_on", "all", "train every assistant turn or only the last", "data", choices=("all", "last")),
    Flag("control_tokens", "escape", "control tokens inside contents: neutralise, refuse or leave them", "data",
         choices=("escape", "error", "allow")),
    Flag("overlong", "drop", "rows longer than --max_seq_length: drop them, remove their oldest turns, or stop",
         "data", choices=("drop", "trim_turns", "error")),
    Flag("max_seq_length", 9000, "longest row in tokens", "data", _count),
    # lora
    Flag("rank", 16, "LoRA rank r", "lora", _count),
    Flag("alpha", None, "LoRA alpha; default: 2 x rank", "lora", _size),
    Flag("dropout", 0.0, "LoRA dropout", "lora", _fraction),
    Flag("target_modules", ["all-linear"], "module names, or all-linear", "lora", many=True, metavar="NAME"),
    Flag("last_layers", None, "adapt only the last N decoder layers: the backward pass ends there", "lora", _count),
    Flag("use_rslora", False, "scale by alpha / sqrt(r)", "lora", bool),
    Flag("loraplus_lr_ratio", None, "LoRA+: B learns at this many times --lr, A at --lr itself; take a lower --lr",
         "lora", _ratio),
    # training
    Flag("lr", 2e-4, "peak learning rate", "training", _size),
    Flag("epochs", 3.0, "passes over the data", "training", _size),
    Flag("max_steps", None, "stop after N optimizer steps, whatever the epochs", "training", _count),
    Flag("batch_size", 4, "rows per device and accumulation step", "training", _count),
    Flag("grad_accum", 4, "accumulation steps; one optimizer step takes batch_size x grad_accum rows", "training",
         _count),
    Flag("scheduler", "cosine", "learning rate schedule; warmup_stable_decay falls in the last fifth of the steps",
         "training",
         choices=("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "warmup_stable_decay")),
    Flag("warmup_ratio", 0.03, "share of the steps that warm up", "training", _fraction),
    Flag("warmup_steps", None, "steps that warm up; wins over --warmup_ratio", "training", _whole),
    Flag("weight_decay", 0.01, "AdamW weight decay", "training", _amount),
    Flag("max_grad_norm", 1.0, "clip the gradient to this norm; 0 turns clipping off", "training", _amount),
    Flag("optim", "auto", "Transformers' optimizer name; auto: adamw_8bit on a GPU, adamw_torch on a CPU", "training"),
    Flag("seed", 3407, "seed of the adapter's start, the row order and dropout", "training", _seed),
    # speed and memory
    Flag("order", "shuffle", "rows of an epoch: one shuffle, or rows with the same tools in one step (faster where "
         "tool sets differ; another order, so another curve)", "speed and memory", choices=("shuffle", "group_tools")),
    Flag("share_prefix", True, "compute token prefixes that rows of a step share only once", "speed and memory", bool),
    Flag("tokens_per_pass", None, "most tokens in one forward pass; default: by free memory", "speed and memory",
         _count),
    Flag("dequantize_once", False, "unpack a 4-bit base once instead of in every pass: the same numbers as QLoRA, for "
         "the memory of a 16-bit base", "speed and memory", bool),
    Flag("gradient_checkpointing", None, "recompute activations in the backward pass; default: on a GPU yes, "
         "on a CPU no",
         "speed and memory", bool),
    # logging and checkpoints
    Flag("logging_steps", 1, "steps between rows of training_log.csv", "logging and checkpoints", _count),
    Flag("save_steps", 200, "steps between checkpoints; 0: none", "logging and checkpoints", _whole),
    Flag("save_total_limit", 3, "checkpoints to keep", "logging and checkpoints", _count),
    Flag("eval_steps", None, "steps between evaluations; default: every epoch", "logging and checkpoints", _count),
    Flag("early_stopping_patience", None, "stop after N evaluations without improvement", "logging and checkpoints",
         _count),
    Flag("early_stopping_threshold", 0.0, "smallest improvement of eval_loss that counts", "logging and checkpoints",
         _amount),
    Flag("load_best", False, "end with the checkpoint of lowest eval_loss", "logging and checkpoints", bool),
    Flag("report_to", "none", "also log to a tracker", "logging and checkpoints",
         choices=("none", "tensorboard", "wandb", "mlflow", "trackio")),
    # output
    Flag("experiments_dir", "experiments", "where run folders are made", "output", metavar="DIR"),
    Flag("name", None, "name of the run folder; default: from model, rank, alpha, lr, epochs and time", "output",
         folder_name),
    Flag("push_to_hub", None, "upload the finished adapter to this Hub repository (private; token from HF_TOKEN)",
         "output",
         metavar="REPO"),
    # actions
    Flag("config", None, "YAML or JSON of these flags, or a run's experiment_config.json", "actions", action=True,
         metavar="FILE"),
    Flag("resume", None, "continue a run from its newest checkpoint; without a folder: the newest unfinished run",
         "actions", str, optional_value=True, action=True, metavar="FOLDER"),
    Flag("dry_run", False, "everything up to the first step: rows, masks, lengths, memory; trains nothing", "actions",
         bool, action=True),
    Flag("show_mask", 0, "print N rows with the trained tokens in colour", "actions", _whole, action=True, metavar="N"),
    Flag("doctor", False, "print versions, devices and what is missing, then stop", "actions", bool, action=True),
)  # fmt: skip
BY_NAME = {flag.name: flag for flag in FLAGS}
# What may differ when a run is resumed: nothing that changes the numbers. The rows may lie elsewhere by now; that they
# are the same ones is asked of their fingerprint.
RESUMABLE = {
    "experiments_dir", "report_to", "push_to_hub", "tokens_per_pass", "save_total_limit", "trust_remote_code",
    "dataset", "eval_dataset",
}  # fmt: skip


class Settings(argparse.Namespace):
    """All flags with their values. `given` names those that were set on the command line or in the config."""

    given: set[str]

    def run_flags(self) -> dict[str, Any]:
        """The flags that belong to a run, as they go into experiment_config.json."""
        return {flag.name: getattr(self, flag.name) for flag in FLAGS if not flag.action}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_lora.py",
        usage="%(prog)s [--config FILE] [--dataset DATA ...] [flags]     (all of them: %(prog)s --help)",
        description="Fine-tune a language model with LoRA on the assistant's tokens of tool-calling conversations.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        group = groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        options: dict[str, Any] = {"help": _help(flag), "dest": flag.name}
        if flag.is_switch:
            options["action"] = "store_true" if flag.action else argparse.BooleanOptionalAction
        else:
            options.update(type=flag.type, metavar=flag.metavar)
            if flag.choices:
                options["choices"] = flag.choices
            if flag.many:
                options.update(nargs="+", action="extend")
            if flag.optional_value:
                options.update(nargs="?", const="")
        group.add_argument(f"--{flag.name}", **options)
    return parser


def _help(flag: Flag) -> str:
    text = flag.help.replace("%", "%%")
    if flag.default in (None, False, 0) or "default:" in text:
        return text
    default = " ".join(flag.default) if flag.many else flag.default
    if flag.is_switch:
        default = "on"
    return f"{text} (default: {default})"


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Defaults, then --config, then the command line; argparse itself ends with exit code 2 on an unknown flag."""
    words = sys.argv[1:] if argv is None else argv
    given = vars(build_parser().parse_args([underscored(word) for word in words]))
    values = {flag.name: flag.default for flag in FLAGS}
    from_config = read_config(given["config"]) if given.get("config") else {}
    values.update(from_config)
    values.update(given)
    return complete(values, set(given) | set(from_config))


def underscored(word: str) -> str:
    """--batch-size is --batch_size; both spellings are common, and one name is enough for the help."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    stem = name[2:]
    prefix = "--no-" if stem.startswith(("no-", "no_")) else "--"
    return prefix + stem.removeprefix("no-").removeprefix("no_").replace("-", "_") + equals + value


def complete(values: dict[str, Any], given: set[str]) -> Settings:
    """Fill in what follows from other flags and check flags against each other."""
    if values["alpha"] is None:
        values["alpha"] = 2 * values["rank"]
    if isinstance(values["alpha"], float) and values["alpha"].is_integer():
        values["alpha"] = int(values["alpha"])
    if isinstance(values["epochs"], float) and values["epochs"].is_integer():
        values["epochs"] = int(values["epochs"])
    has_eval = bool(values["eval_dataset"] or values["eval_fraction"])
    if values["eval_dataset"] and values["eval_fraction"]:
        raise UserError("--eval_dataset and --eval_fraction exclude each other; keep one of them")
    for name in ("early_stopping_patience", "load_best", "eval_steps"):
        if values[name] and not has_eval:
            raise UserError(f"--{name} needs rows to evaluate on; add --eval_dataset or --eval_fraction")
    if values["load_best"] and not values["save_steps"]:
        raise UserError("--load_best needs checkpoints; --save_steps 0 turns them off")
    if "all-linear" in values["target_modules"] and len(values["target_modules"]) > 1:
        raise UserError("--target_modules: all-linear stands alone; name the modules instead, or leave the others out")
    settings = Settings(**values)
    settings.given = given
    return settings


def read_config(path: str | Path) -> dict[str, Any]:
    """Flags from a YAML or JSON file; an experiment_config.json is read by its "flags" entry.

    Raises UserError naming the file and the key for an unknown flag or a value of the wrong kind.
    """
    data = read_data("config", path)
    if not isinstance(data, dict):
        raise UserError(f"config {path} must hold a mapping of flags, such as 'rank: 16'")
    if isinstance(data.get("flags"), dict):
        # A run's own name is taken, by that run; the same run again gets a folder of its own.
        data = {name: value for name, value in data["flags"].items() if name != "name"}
    return {name: checked(f"config {path}", name, value) for name, value in data.items()}


def read_data(kind: str, path: str | Path) -> Any:
    """What a YAML or JSON file of the user's holds; UserError, naming `kind` and the file, where it cannot be read."""
    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    try:
        words = path.read_text(encoding="utf-8-sig")
        return json.loads(words, object_pairs_hook=_each_once) if is_json else _yaml(words)
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except Exception as error:
        raise UserError(f"{kind} {path} is not valid {'JSON' if is_json else 'YAML'}: {error}") from error


def _yaml(words: str) -> Any:
    """What a YAML text holds, by the safe loader; ValueError for a key that a mapping holds twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            _each_once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return yaml.load(words, Loader)


def _each_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice; keep one of them")
    return mapping


def checked(where: str, name: str, value: Any) -> Any:
    """The value in the flag's own type; raises UserError, beginning with `where`, for an unknown name or value."""
    flag = BY_NAME.get(name)
    if flag is None or (flag.action and name != "show_mask"):
        close = difflib.get_close_matches(str(name), [f.name for f in FLAGS if not f.action], n=1)
        hint = f"; did you mean {close[0]}?" if close else "; see train_lora.py --help"
        raise UserError(f"{where}: unknown flag {name!r}{hint}")
    if value is None:
        return flag.default
    if flag.is_switch:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} must be true or false, not {value!r}")
        return value
    items = value if isinstance(value, list) and flag.many else [value]
    if not items:
        raise UserError(f"{where}: {name} is an empty list; leave it out to have its default")
    converted = []
    for item in items:
        if item is None or isinstance(item, (dict, list, bool)):
            raise UserError(f"{where}: {name} cannot be {item!r}")
        try:
            # YAML reads 2e-4 as text and 3 as an integer; going through the flag's own converter treats them alike.
            converted.append(flag.type(str(item)))
        except ValueError:
            raise UserError(f"{where}: {name} must be a {flag.type.__name__}, not {item!r}") from None
        if flag.choices and converted[-1] not in flag.choices:
            raise UserError(f"{where}: {name} must be one of {', '.join(flag.choices)}, not {item!r}")
    return converted if flag.many else converted[0]


def resumed(settings: Settings, stored: dict[str, Any], folder: str) -> Settings:
    """The stored flags of a run that goes on; only flags that cannot change its numbers may be given anew.

    Raises UserError naming a flag that differs from the stored one, or a stored one that is not known or no value.
    """
    # Another version of this program, or a hand, may have written them.
    kept = {name: checked(f"--resume {folder}: its config", name, value) for name, value in stored.items()}
    values = {flag.name: flag.default for flag in FLAGS} | kept
    for name in settings.given:
        flag, value = BY_NAME[name], getattr(settings, name)
        if flag.action or name in RESUMABLE:
            values[name] = value
        elif value != values[name]:
            raise UserError(
                f"--resume {folder}: --{name} {value} differs from the run's {values[name]}; a resumed run keeps its "
                "flags, start a new run to change them"
            )
    for flag in FLAGS:
        if flag.action:
            values[flag.name] = getattr(settings, flag.name)
    return complete(values, settings.given)


def markdown() -> str:
    """docs/flags.md: the flags in their groups with defaults; a test compares it with the file."""
    lines = [
        "# Flags of train_lora.py",
        "",
        "Made from `finetune/settings.py` by `python -m finetune.settings > docs/flags.md`. A recipe (`--config`) is",
        "YAML of the same names; flags on the command line win over it.",
    ]
    group = None
    for flag in FLAGS:
        if flag.group != group:
            group = flag.group
            lines += ["", f"## {group.capitalize()}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        default = " ".join(flag.default) if flag.many and flag.default else flag.default
        words = {"None": "", "False": "off", "True": "on"}
        shown = words.get(str(default), f"`{default}`")
        meaning = flag.help + (f" ({', '.join(flag.choices)})" if flag.choices else "")
        lines.append(f"| `--{flag.name}` | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
