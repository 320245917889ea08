"""The command lines of all scripts: --help, both spellings of every flag, no slow import."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import subprocess
import sys

import pytest

from finetune.flags.types import FlagParser
from finetune.settings import build_parser as train_parser
from tests.scripts import ROOT

# Importing one of these costs up to seconds before --help answers.
HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow", "numpy", "matplotlib", "sklearn", "rich", "pynvml")
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
VERBS = {
    "prepare_data.py": ("prepare", "encode", "parse", "show", "audit", "generate"),
    "gpu_memory.py": ("estimate", "check", "monitor", "plot"),
}
COMMANDS = [[script, *verb] for script in SCRIPTS for verb in [(), *((verb,) for verb in VERBS.get(script, ()))]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples_and_imports_nothing_heavy(command):
    code = (
        f"import runpy, sys\nsys.argv = {[*command, '--help']!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        f"heavy = [name for name in {HEAVY!r} if sys.modules.get(name)]\nassert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    assert command[0] in result.stdout
    if command[0] != "gpu_memory.py" or len(command) == 1:  # whose verbs have their examples in the help of the script
        assert "example" in result.stdout


def parser_of(script: str) -> FlagParser:
    return train_parser() if script == "train_lora.py" else importlib.import_module(script[:-3]).build_parser()


def parser_of_verb(parser: FlagParser, verb: str) -> FlagParser:
    (verbs,) = (action for action in parser._actions if action.nargs == argparse.PARSER)
    return verbs.choices[verb]


def accepted(action: argparse.Action) -> list[str]:
    """Values that a flag or a positional argument accepts."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(iter(action.choices))]
    for word in ("1", "0.5", "2", "q8_0", "yarn:2", "1,2"):
        with contextlib.suppress(argparse.ArgumentTypeError):
            (action.type or str)(word)
            return [word]
    raise AssertionError(f"no value for {action.option_strings}")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in [[name] for name in VERBS]],
                         ids=" ".join)  # fmt: skip
def test_every_flag_has_both_spellings(command):
    """The help shows underscores; the same name with hyphens sets the same value, behind = too."""
    script, *verb = command
    parser = parser_of(script)
    checked = parser_of_verb(parser, *verb) if verb else parser
    for entry in (*checked._actions, *checked._mutually_exclusive_groups):
        entry.required = False  # so that each flag can be tried alone
    for action in checked._actions:
        for name in action.option_strings:
            if not name.startswith("--") or name == "--help":
                continue
            values, hyphens = accepted(action), name.replace("_", "-")
            assert "-" not in name.removeprefix("--").removeprefix("no-")
            expected = parser.parse_args([*verb, name, *values])
            assert parser.parse_args([*verb, hyphens, *values]) == expected
            assert parser.parse_args([*verb, name.replace("--no-", "--no_"), *values]) == expected
            if values:
                assert parser.parse_args([*verb, f"{hyphens}={values[0]}"]) == expected


def test_only_flag_names_are_respelled():
    """A value, or an argument after --, keeps its hyphens."""
    parser = FlagParser()
    parser.add_argument("--to_print")
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args(["--to-print=--a-b", "c-d", "--", "--e-f"])
    assert (args.to_print, args.rest) == ("--a-b", ["c-d", "--e-f"])
    assert parser.parse_args(["--to_print", "--my-flag does nothing"]).to_print == "--my-flag does nothing"
