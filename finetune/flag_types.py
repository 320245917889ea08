"""The argument parser of all scripts, the converters of their flags, and how Settings declares a flag."""

from __future__ import annotations

import argparse
import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from finetune import flag_hints

Number = TypeVar("Number", int, float)
Converter = Callable[[str], Number]


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
            advice = flag_hints.hint(unknown[0], flag_hints.flags_of(self, arguments), self.prog)
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
        return parsed

    def error(self, message: str):
        """One line, as for all other errors, and exit status 2; argparse would print the usage before it."""
        if "are required" in message:  # a misspelled flag is often the reason
            known = flag_hints.flags_of(self, self._given)
            message += "".join(
                f"; {word}: {flag_hints.hint(word, known, self.prog)}"
                for word in self._given
                if word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") not in known
            )
        advice = "" if "did you mean" in message or "--help" in message else f"; see {self.prog} --help"
        print(f"error: {' '.join(message.split())}{advice}", file=sys.stderr)
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
    optional_value  the flag may stand without a value, which then is ""
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
