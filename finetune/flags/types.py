"""The parser of all scripts, what a misspelled flag probably meant, converters, and how Settings declares a flag."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from finetune.progress import printable

Number = TypeVar("Number", int, float)
Converter = Callable[[str], Number]

# Flags of other trainers (Transformers, PEFT, TRL, LLaMA-Factory, axolotl, Unsloth), by the name they have here.
ELSEWHERE = {
    "lr": "learning_rate",
    "rank": "lora_r r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target lora_target_modules modules",
    "epochs": "num_epochs num_train_epochs n_epochs epoch",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size bs",
    "grad_accum": "gradient_accumulation_steps accumulation_steps gradient_accumulation",
    "scheduler": "lr_scheduler lr_scheduler_type",
    "warmup_steps": "num_warmup_steps",
    "optim": "optimizer",
    "max_seq_length": "max_length cutoff_len sequence_len max_seq_len seq_length context_length seq_len",
    "model": "model_name model_name_or_path base_model pretrained_model_name_or_path model_id",
    "dataset": "data train_file train_data data_path dataset_name datasets train_dataset input data_file rows",
    "eval_dataset": "validation_file eval_file eval_data test_file validation",
    "eval_fraction": "val_size val_set_size validation_split eval_split test_size val_split",
    "experiments_dir": "output_dir output output_folder out_dir",
    "name": "run_name experiment_name",
    "load_in_4bit": "quantization quantization_bit qlora bits load_in_4_bit",
    "load_best": "load_best_model_at_end",
    "use_rslora": "rslora",
    "format": "template chat_template prompt_template",
    "resume": "resume_from_checkpoint resume_from",
    "limit": "max_samples num_samples max_rows",
    "early_stopping_patience": "patience",
    "report_to": "wandb tensorboard logger",
    "trust_remote_code": "trust",
    "tools": "tool_schemas tools_file functions schemas",
    "questions": "prompts_file question_file",
    "to": "export_to target",
    "web": "ui gradio webui",
    "serve": "server api",
    "max_new_tokens": "max_tokens",
    "log_y": "log logy",
    "smooth": "smoothing",
    "seeds": "num_seeds repeats",
}
ALIASES = {alias: name for name, aliases in ELSEWHERE.items() for alias in aliases.split()}
_DATA_FILE = re.compile(r".*\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.gz)?", re.IGNORECASE)
_RECIPE = re.compile(r".*\.ya?ml", re.IGNORECASE)


class FlagParser(argparse.ArgumentParser):
    """Accepts `--batch-size` for `--batch_size` in every flag and subcommand; its help keeps line breaks.

    The help of a flag ends with its default, unless that is off, nothing, or already in the text.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": _HelpFormatter} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        self._given = args[:end]
        return super().parse_known_args([*map(_with_underscores, args[:end]), *args[end:]], namespace)

    def parse_args(self, args=None, namespace=None):
        arguments = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            advice = hint(unknown[0], flags_of(self, arguments), self.prog)
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
        return parsed

    def error(self, message: str):
        """One line, as for all other errors, and exit status 2; argparse would print the usage before it."""
        if "are required" in message:  # a misspelled flag is often the reason
            known = flags_of(self, self._given)
            message += "".join(
                f"; {word}: {hint(word, known, self.prog)}"
                for word in self._given
                if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") not in known
            )
        advice = "" if "did you mean" in message or "--help" in message else f"; see {self.prog} --help"
        print(printable(f"error: {' '.join(message.split())}{advice}"), file=sys.stderr)
        sys.exit(2)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", []) or isinstance(action.default, bool) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[a-zA-Z][\w-]*", name):
        return argument
    name = name[2:].replace("-", "_")
    prefix = "--no-" if name.startswith("no_") else "--"  # as BooleanOptionalAction spells it
    return prefix + name.removeprefix("no_") + equals + value


def number_type(kind: Converter[Number], is_valid: Callable[[Number], bool], rule: str) -> Converter[Number]:
    """A converter for argparse; it raises ArgumentTypeError `must be <rule>`."""

    def convert(word: str) -> Number:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise ArgumentTypeError(f"must be {rule}, not {word!r}")
        return value

    return convert


# Integers have to fit into 64 bits; infinity and nan are not valid numbers.
positive_int = number_type(int, lambda value: 0 < value < 2**63, "an integer >= 1 and < 2**63")
nonnegative_int = number_type(int, lambda value: 0 <= value < 2**63, "an integer >= 0 and < 2**63")
positive_float = number_type(float, lambda value: 0 < value < math.inf, "a number > 0")
nonnegative_float = number_type(float, lambda value: 0 <= value < math.inf, "a number >= 0")
fraction = number_type(float, lambda value: 0 <= value < 1, "a number >= 0 and < 1")
probability = number_type(float, lambda value: 0 < value <= 1, "a number > 0 and <= 1")
MAX_STRETCH = 64


def stretch(word: str) -> str:
    """`yarn:4` or `linear:2`: kinds of scaling that Unsloth, Transformers, vLLM and llama.cpp compute alike."""
    match = re.fullmatch(r"(linear|yarn):(\d+(?:\.\d+)?)", word)
    if match is None or not 1 < float(match[2]) <= MAX_STRETCH:
        raise ArgumentTypeError(
            f"must be linear:FACTOR or yarn:FACTOR with a factor > 1 and <= {MAX_STRETCH}, not {word!r}"
        )
    return word


port = number_type(int, lambda value: 0 < value < 2**16, "an integer >= 1 and <= 65535")


def positive_ints(word: str) -> list[int]:
    """Integers >= 1, separated by commas; duplicates count once."""
    return list(dict.fromkeys(map(positive_int, word.split(","))))


def text(word: str) -> str:
    """Text that is not empty (as an unset shell variable is) and can be written to a file as UTF-8."""
    if not word.strip():
        raise ArgumentTypeError("must not be empty")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"must be UTF-8 text, not {word!r}") from None
    return word


def folder_name(word: str) -> str:
    """The name of a new folder inside another one: visible, and not a path."""
    if not text(word).isprintable() or set(word) & {"/", "\\"} or word.startswith(".") or len(word.encode()) > 200:
        raise ArgumentTypeError(
            f"must be a folder name (printable, no slash, no dot at the start, at most 200 bytes), not {word!r}"
        )
    return word


@dataclass(frozen=True)
class Flag:
    """A flag of train_lora.py. The annotation of its field in Settings decides how it is read: bool is a switch,
    Literal a choice, list takes several values.

    convert         converter of one value; default: positive_int, positive_float or text, by the annotation
    group           starts a section of the help, which also holds the flags below this one
    resumable       may differ when a run is resumed, because it does not change the numbers
    action          says what to do once and is not part of a run's config
    optional_value  the flag may stand without a value, which then is its first choice, or ""
    kind            the annotation without `| None`
    """

    default: Any
    help: str
    convert: Callable[[str], Any] = text
    group: str = ""
    metavar: str | None = None
    resumable: bool = False
    action: bool = False
    optional_value: bool = False
    name: str = ""
    kind: Any = None

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def many(self) -> bool:
        return get_origin(self.kind) is list

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def shown_default(self) -> str:
        if self.default is None:
            return ""
        if self.is_switch:
            return "on" if self.default else "off"
        return " ".join(self.default) if self.many else str(self.default)


def setting(default: Any, help: str, convert: Callable[[str], Any] = text, **options: Any) -> Any:
    """A field of Settings that is a flag; the options are the fields of Flag."""
    metadata = {"flag": Flag(default, help, convert, **options)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flags_of(parser: argparse.ArgumentParser, arguments: Sequence[str] = ()) -> list[str]:
    """The names of a parser's flags, without "--", with those of the subcommand that the arguments name."""
    names = []
    for action in parser._actions:
        names += [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            verb = next((word for word in arguments if word in action.choices), None)
            if verb is not None:
                names += flags_of(action.choices[verb])
    return [name for name in names if not name.startswith("no-")]


def meant(name: str, known: Iterable[str]) -> str | None:
    """The flag of `known` that `name` is a slip of, or is called in another trainer; None where none is close."""
    name, known = name.lower().replace("-", "_"), list(known)
    if (alias := ALIASES.get(name)) in known:
        return alias
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close and len(name) > 2:
        close = [flag for flag in known if flag.startswith(name) or name.startswith(f"{flag}_")]
    return close[0] if close else None


def hint(word: str, known: Iterable[str], program: str) -> str:
    """What to do about an argument that no flag takes: `did you mean --lr?`, or where all flags are listed."""
    known = list(known)
    listed = f"see {program} --help"
    if word.startswith("--"):
        flag = meant(word[2:].partition("=")[0], known)
        return f"did you mean --{flag}?" if flag else listed
    if _RECIPE.fullmatch(word) and "config" in known:
        return f"did you mean --config {word}?"
    if "dataset" in known and (_DATA_FILE.fullmatch(word) or Path(word).is_dir()):
        return f"did you mean --dataset {word}?"
    if flag := meant(word, [name for name in known if len(name) > 2]):
        return f"did you mean --{flag}?"
    return listed
