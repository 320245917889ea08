"""All flags of train_lora.py: the fields of Settings declare its parser, recipes, experiment_config.json and docs."""

# ruff: noqa: RUF009  `setting` returns a field

import argparse
import difflib
import logging
from argparse import ArgumentTypeError
from collections.abc import Container, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from finetune.errors import UserError
from finetune.files import read_data
from finetune.flags.sections import has_sections, read_sections
from finetune.flags.types import (
    Flag,
    FlagParser,
    folder_name,
    fraction,
    nonnegative_float,
    nonnegative_int,
    number_type,
    positive_float,
    positive_int,
    setting,
    stretch,
    text,
)

log = logging.getLogger("sandwich")

EPILOG = """examples:
  python train_lora.py --model smollm2-135m --dataset data/samples/gennx_train.jsonl --format chatml
  python train_lora.py --model Qwen/Qwen2.5-3B-Instruct --rank 32 --dataset train.jsonl --eval_fraction 0.05
  python train_lora.py --dataset NotoriousH2/instructkr-apigen --dataset NotoriousH2/instructkr-when2call@train*0.5
  python train_lora.py --config configs/demo.yaml --rank 8          a recipe; flags on the command line win
  python train_lora.py --config experiments/RUN/experiment_config.json   repeat a run
  python train_lora.py --resume experiments/RUN                     continue a stopped run
  python train_lora.py --dataset train.jsonl --dry_run --show_mask 3     check the data before training
"""
# The three datasets of the published Korean tool-calling setup.
KOREAN_TOOL_CALLING = [f"NotoriousH2/instructkr-{name}" for name in ("toolflow", "when2call", "apigen")]

# Only a person's own command line counts: a recipe or a run folder may come from anyone.
COMMAND_LINE_ONLY = ("trust_remote_code",)

seed_number = number_type(int, lambda value: 0 <= value < 2**32, "an integer >= 0 and < 2**32")  # NumPy's range
lr_ratio = number_type(float, lambda value: 1 <= value < float("inf"), "a number >= 1")


# fmt: off
@dataclass
class Settings:
    """The values of all flags. Raises UserError for flags that contradict each other."""

    model: str = setting(
        "kakaocorp/kanana-1.5-2.1b-instruct-2505", "Hub id, folder, or smollm2-135m (bundled, no download)",
        group="model")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    load_in_4bit: bool | None = setting(None, "4-bit NF4 base (QLoRA); default: on a GPU yes, on a CPU no")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "compute dtype; auto: bfloat16 where the hardware has it, else float16 (GPU) or float32 (CPU)")
    rope_scaling: str | None = setting(
        None, "stretch the rotary positions of the base, as linear:FACTOR or yarn:FACTOR, for longer rows; changes the "
        "model for short rows too", stretch)
    trust_remote_code: bool = setting(
        False, "run code from the model's repository; only for models that you trust, only on the command line",
        resumable=True)

    dataset: list[str] = setting(
        KOREAN_TOOL_CALLING, "JSONL, JSON or Parquet file, or Hub id[:config][@split]; repeatable; *0.5 at the end "
        "takes half of its rows", group="data", metavar="DATA", resumable=True)
    eval_dataset: list[str] | None = setting(
        None, "rows for eval_loss, in the same forms as --dataset", metavar="DATA", resumable=True)
    eval_fraction: float = setting(0.0, "fraction of the training rows to hold out for eval_loss", fraction)
    limit: int | None = setting(None, "use only the first N rows of each --dataset; does not apply to --eval_dataset")
    tools: str | None = setting(
        None, "JSON file with tool schemas for rows without their own", metavar="FILE", resumable=True)
    where: list[str] | None = setting(
        None, "only rows of --dataset with this value in this column; repeatable; does not apply to --eval_dataset",
        metavar="COLUMN=VALUE")
    include_rejected: bool = setting(False, "train rows whose answer is marked as a bad one (label: false), too")
    format: str = setting("auto", "chat format (see docs/formats.md), path to a format's YAML, native, or auto")
    train_on: Literal["all", "last"] = setting("all", "train on every assistant turn or only on the last")
    control_tokens: Literal["escape", "error", "allow"] = setting(
        "escape", "control tokens inside message contents: escape them, stop, or keep them")
    reasoning: Literal["keep", "drop", "refuse"] = setting(
        "keep", "reasoning of answers: keep (where the template has no place for it, omit it with a warning), drop it, "
        "or refuse rows whose reasoning the template would omit")
    train_reasoning: Literal["on", "off"] = setting(
        "on", "train the reasoning of answers, or only what follows it")
    allow_unreadable_calls: bool = setting(False, "train rows with calls that the chat format cannot read back")
    overlong: Literal["drop", "trim_turns", "error"] = setting(
        "drop", "rows longer than --max_seq_length: drop them, remove their oldest turns, or stop")
    max_seq_length: int = setting(9000, "maximum length of a row in tokens")

    rank: int = setting(16, "LoRA rank r", group="LoRA")
    alpha: float = setting(None, "LoRA alpha; default: 2 x rank")
    dropout: float = setting(0.0, "LoRA dropout", fraction)
    target_modules: list[str] = setting(["all-linear"], "module names, or all-linear", metavar="NAME")
    last_layers: int | None = setting(None, "adapt only the last N decoder layers; the backward pass ends there")
    use_rslora: bool = setting(False, "scale by alpha / sqrt(r)")
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: learning rate of B as a multiple of --lr, which A uses; needs a lower --lr", lr_ratio)

    init_adapter: str | None = setting(
        None, "start from the adapter of this run, with a new optimizer and schedule; model, format, rank, alpha, "
        "modules and 4 bits are the adapter's", metavar="RUN")

    lr: float = setting(2e-4, "peak learning rate", group="training")
    epochs: float = setting(3.0, "number of epochs")
    max_steps: int | None = setting(None, "stop after N optimizer steps, regardless of --epochs")
    batch_size: int = setting(4, "rows per device and accumulation step")
    grad_accum: int = setting(4, "accumulation steps; one optimizer step takes batch_size x grad_accum rows")
    scheduler: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "warmup_stable_decay"
    ] = setting("cosine", "learning rate schedule; warmup_stable_decay decays in the last fifth of the steps")
    warmup_ratio: float = setting(0.03, "fraction of the steps used for warmup", fraction)
    warmup_steps: int | None = setting(None, "number of warmup steps; overrides --warmup_ratio", nonnegative_int)
    weight_decay: float = setting(0.01, "AdamW weight decay", nonnegative_float)
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", nonnegative_float)
    optim: str = setting("auto", "Transformers' optimizer name; auto: adamw_8bit on a GPU, adamw_torch on a CPU")
    seed: int = setting(3407, "seed of adapter initialization, row order and dropout", seed_number)

    order: Literal["shuffle", "group_tools", "spread_answers"] = setting(
        "shuffle", "order of the rows in an epoch: shuffled; rows with the same tools in one step (faster with many "
        "tool sets, but a different loss curve); or each kind of answer, such as calls of one tool, spread evenly over "
        "the steps (less chance in short runs)", group="speed and memory")
    share_prefix: bool = setting(True, "compute token prefixes that the rows of a step share only once")
    tokens_per_pass: int | None = setting(
        None, "maximum tokens in one forward pass; default: by free memory", resumable=True)
    dequantize_once: bool = setting(
        False, "dequantize a 4-bit base once instead of in every pass: same numbers as QLoRA, but the memory of a "
        "16-bit base")
    gradient_checkpointing: bool | None = setting(
        None, "recompute activations in the backward pass; default: on a GPU yes, on a CPU no")

    logging_steps: int = setting(1, "steps between rows of training_log.csv", group="logging and checkpoints")
    save_steps: int = setting(200, "steps between checkpoints; 0: none", nonnegative_int)
    save_total_limit: int = setting(3, "number of checkpoints to keep", resumable=True)
    eval_steps: int | None = setting(None, "steps between evaluations; default: every epoch")
    eval_calls: int = setting(
        0, "at each evaluation, answer N held-out requests and log how many calls are right", nonnegative_int,
        metavar="N")
    eval_calls_budget: float = setting(0.1, "fraction of the run's time that --eval_calls may take", fraction)
    metric_for_best_model: Literal["eval_loss", "eval_tool_name_accuracy", "eval_parameter_accuracy"] = setting(
        "eval_loss", "what early stopping and --load_best go by; the accuracies need --eval_calls")
    eval_ranks: list[int] | None = setting(
        None, "at the end also eval_loss of the adapter cut to these smaller ranks (docs/sweeps.md)", positive_int,
        metavar="RANK", resumable=True)
    early_stopping_patience: int | None = setting(None, "stop after N evaluations without improvement")
    early_stopping_threshold: float = setting(0.0, "minimum improvement that counts", nonnegative_float)
    load_best: bool | None = setting(
        None, "keep the weights of the best evaluation at the end; default: yes with --early_stopping_patience or "
        "an accuracy as --metric_for_best_model")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = setting(
        "none", "also log to a tracker; with USE_WANDB=true in the environment or .env the default is wandb",
        resumable=True)

    experiments_dir: str = setting(
        "experiments", "folder for run folders", group="output", metavar="DIR", resumable=True)
    name: str | None = setting(
        None, "name of the run folder; default: from model, rank, alpha, lr, epochs and time", folder_name)
    push_to_hub: str | None = setting(
        None, "upload the finished adapter to this Hub repository (private; token from HF_TOKEN)", metavar="REPO",
        resumable=True)

    config: str | None = setting(
        None, "YAML or JSON of these flags, or a run's experiment_config.json", group="actions", metavar="FILE",
        action=True)
    resume: str | None = setting(
        None, "continue a run from its newest checkpoint; without a folder: the newest unfinished run; auto: the run "
        "of --name if it exists, else start it", str,
        metavar="FOLDER", action=True, optional_value=True)
    force: bool = setting(
        False, "resume although flags, data, chat template or package versions differ from the run's", action=True)
    dry_run: bool = setting(False, "check rows, masks, lengths and memory without training", action=True)
    show_mask: int = setting(
        0, "print N rows with the trained tokens in color", nonnegative_int, metavar="N", action=True)
    doctor: Literal["quick", "deep"] | None = setting(
        None, "print versions, devices and missing requirements, then exit; deep: also import Unsloth and compute in 4 "
        "bit, as is done anyway on a GPU and with other versions than the tested ones", action=True,
        optional_value=True)

    given: set[str] = field(default_factory=set)  # names of the flags set on the command line or in a config
    # fmt: on

    def __post_init__(self):
        if self.alpha is None:
            self.alpha = 2 * self.rank
        for name in ("alpha", "epochs"):
            value = getattr(self, name)
            setattr(self, name, int(value) if int(value) == value else value)
        if self.eval_dataset and self.eval_fraction:
            raise UserError("--eval_dataset and --eval_fraction exclude each other; keep one of them")
        for name in ("early_stopping_patience", "load_best", "eval_steps", "eval_calls", "eval_ranks"):
            if getattr(self, name) and not self.has_eval:
                raise UserError(f"--{name} needs evaluation rows; add --eval_dataset or --eval_fraction")
        if self.metric_for_best_model != "eval_loss" and not self.eval_calls:
            raise UserError(f"--metric_for_best_model {self.metric_for_best_model} needs --eval_calls N")
        flag = "load_best"
        if self.load_best is None:
            self.load_best = self.early_stopping_patience is not None or self.metric_for_best_model != "eval_loss"
            flag = "early_stopping_patience" if self.early_stopping_patience else "metric_for_best_model"
        if self.load_best and not self.save_steps:
            raise UserError(
                f"--{flag} needs checkpoints, and --save_steps is 0 in the command or recipe; set --save_steps, or add "
                "--no-load_best to keep the last step's weights"
            )
        if self.eval_ranks and max(self.eval_ranks) >= self.rank:
            raise UserError(f"--eval_ranks {max(self.eval_ranks)}: must be < {self.rank}, the --rank that is trained")
        if "all-linear" in self.target_modules and len(self.target_modules) > 1:
            raise UserError("--target_modules: all-linear cannot be combined with module names; keep one of them")

    @property
    def has_eval(self) -> bool:
        """Whether the run evaluates."""
        return bool(self.eval_dataset or self.eval_fraction)

    def run_flags(self) -> dict[str, Any]:
        """The flags of a run, as experiment_config.json stores them."""
        return {one.name: getattr(self, one.name) for one in FLAGS if not one.action}


def _flags(declared: Sequence[Field]) -> list[Flag]:
    flags: list[Flag] = []
    for one in declared:
        if not (flag := one.metadata.get("flag")):
            continue
        kind: Any = get_args(one.type)[0] if type(None) in get_args(one.type) else one.type
        convert = flag.convert
        if convert is text:
            convert = {int: positive_int, float: positive_float}.get(kind, text)
        group = flag.group or flags[-1].group
        flags.append(replace(flag, name=one.name, kind=kind, convert=convert, group=group))
    return flags


FLAGS = _flags(fields(Settings))
BY_NAME = {flag.name: flag for flag in FLAGS}


def build_parser() -> FlagParser:
    """The parser of train_lora.py; flags that were not given are absent from its result."""
    parser = FlagParser(
        prog="train_lora.py",
        usage="%(prog)s [--config FILE] [--dataset DATA ...] [flags]     (all of them: %(prog)s --help)",
        description="Fine-tune a language model with LoRA on the assistant's tokens of tool-calling conversations.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        help = flag.help.replace("%", "%%")
        if flag.default and "default:" not in flag.help:
            help += f" (default: {flag.shown_default})"
        options: dict[str, Any] = {"help": help}
        if flag.is_switch:
            options["action"] = "store_true" if flag.action else argparse.BooleanOptionalAction
        else:
            options |= {"type": flag.convert, "metavar": flag.metavar, "choices": flag.choices or None}
            if flag.many:
                options |= {"nargs": "+", "action": "extend"}
            if flag.optional_value:
                options |= {"nargs": "?", "const": next(iter(flag.choices), "")}
        groups[flag.group].add_argument(f"--{flag.name}", **options)
    return parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Defaults, then --config, then the command line; argparse exits with code 2 on a wrong flag."""
    given = vars(build_parser().parse_args(argv))
    values = read_config(given["config"], given) if "config" in given else {}
    for name, other in (("eval_dataset", "eval_fraction"), ("eval_fraction", "eval_dataset")):
        if name in given and other not in given:  # the command line's evaluation rows replace those of the config
            values.pop(other, None)
    values |= given
    return Settings(**values, given=set(values))


def read_config(path: str | Path, given: Container[str] = ()) -> dict[str, Any]:
    """Flags from a YAML or JSON file; of an experiment_config.json, its "flags" without the run's name.

    A file with sections (see flags/sections.py) may have settings for chat_lora.py, too.
    given  names of the flags on the command line, which override the file
    Flags that count only on the command line are omitted. Raises UserError naming the file and the key for an unknown
    flag or a wrong value.
    """
    data = read_data("config", path)
    if not isinstance(data, dict):
        raise UserError(f"config {path} must be a mapping of flags, such as 'rank: 16'")
    if isinstance(data.get("flags"), dict):
        data = {name: value for name, value in data["flags"].items() if name != "name"}
    entries = {name: (f"config {path}", value) for name, value in data.items()}
    if has_sections(data):
        read, _ = read_sections(f"config {path}", data, settable_flags())
        entries = {name: (f"config {path}, {entry}", value) for name, (entry, value) in read.items()}
    values = {name: checked(where, name, value) for name, (where, value) in entries.items()}
    return without_command_line_only(f"config {path}", values, given)


def settable_flags() -> list[str]:
    """The names of the flags that a config can set."""
    return [flag.name for flag in FLAGS if not flag.action or flag.name == "show_mask"]


def without_command_line_only(where: str, values: dict[str, Any], given: Container[str] = ()) -> dict[str, Any]:
    """The flags of a file without those that count only on the command line; a line says which was set and ignored."""
    for name in COMMAND_LINE_ONLY:
        if values.get(name) and name not in given:
            log.warning("%s: %s is ignored; add --%s to the command line if you trust the model", where, name, name)
    return {name: value for name, value in values.items() if name not in COMMAND_LINE_ONLY}


def checked(where: str, name: str, value: Any) -> Any:
    """The value converted to the flag's type; UserError, starting with `where`, for an unknown name or wrong value."""
    flag = BY_NAME.get(name)
    if flag is None or (flag.action and name != "show_mask"):
        close = difflib.get_close_matches(str(name), [one.name for one in FLAGS if not one.action], n=1)
        hint = f"did you mean {close[0]}?" if close else "see train_lora.py --help"
        raise UserError(f"{where}: unknown flag {name!r}; {hint}")
    if value is None:
        return flag.default
    if flag.is_switch:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} must be true or false, not {value!r}")
        return value
    items = value if isinstance(value, list) and flag.many else [value]
    if not items:
        raise UserError(f"{where}: {name} is an empty list; omit it to use the default")
    converted = []
    for item in items:
        if item is None or isinstance(item, dict | list | bool):
            raise UserError(f"{where}: {name} cannot be {item!r}")
        try:
            # YAML reads 2e-4 as text and 3 as an integer; as text, both are converted like on the command line.
            converted.append(flag.convert(str(item)))
        except ArgumentTypeError as error:
            raise UserError(f"{where}: {name} {error}") from None
        if flag.choices and converted[-1] not in flag.choices:
            raise UserError(f"{where}: {name} must be one of {', '.join(flag.choices)}, not {item!r}")
    return converted if flag.many else converted[0]


def resumed(
    settings: Settings, stored: dict[str, Any], folder: str, other_differences: Sequence[str] = ()
) -> Settings:
    """The stored flags of a run, with the actions and resumable flags of the new command line.

    Raises UserError for an invalid stored flag, and, listing all differences, for another flag that differs from the
    stored one and for `other_differences`. With --force both become warnings, and the new command line's flags count.
    """
    defaults = {flag.name: flag.default for flag in FLAGS}
    # Another version of this program or an editor may have written them.
    where = f"--resume {folder}: its config"
    known = {name: checked(where, name, value) for name, value in stored.items()}
    values = defaults | without_command_line_only(where, known, settings.given)
    differences: list[str] = []
    for flag in FLAGS:
        new, old = getattr(settings, flag.name), values[flag.name]
        if flag.action or (flag.resumable and flag.name in settings.given):
            values[flag.name] = new
        elif flag.name in settings.given and new != old:
            differences.append(f"--{flag.name} {new} differs from the run's {'default' if old is None else old}")
            values[flag.name] = new
    if differences := [*differences, *other_differences]:
        if not settings.force:
            longer = {"epochs", "max_steps"} & settings.given
            advice = f" (--init_adapter {folder} trains on from its adapter with a new schedule)" if longer else ""
            raise UserError(
                f"--resume {folder}: {'; '.join(differences)}; undo this, start a new run{advice}, or continue with "
                "--force"
            )
        log.warning("--force: %s", "; ".join(differences))
    return Settings(**values, given=settings.given)


def markdown() -> str:
    """docs/flags.md: the flags by group, with their defaults."""
    lines = [
        "# Flags of train_lora.py",
        "",
        "Generated from `finetune/settings.py` by `python -m finetune.settings > docs/flags.md`. A recipe (`--config`)",
        "is YAML with the same names; flags on the command line override it. `--batch-size` is read as `--batch_size`,",
        "as in all scripts.",
    ]
    group = None
    for flag in FLAGS:
        if flag.group != group:
            group = flag.group
            title = group[0].upper() + group[1:]
            lines += ["", f"## {title}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        default = flag.shown_default if flag.is_switch or not flag.shown_default else f"`{flag.shown_default}`"
        meaning = flag.help + (f" ({', '.join(flag.choices)})" if flag.choices else "")
        lines.append(f"| `--{flag.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
