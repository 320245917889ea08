"""What the README says exists, exists; what it tells people to type is accepted."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from finetune import settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|powershell)?\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("python ")}
)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    if script == "train_lora.py":
        settings.parse(arguments)
    else:
        parser = importlib.import_module(script.removesuffix(".py")).build_parser()
        verbs = ("prepare", "encode", "parse", "show", "audit", "generate")
        if script == "prepare_data.py" and arguments[0] not in (*verbs, "--help"):
            arguments = ["prepare", *arguments]  # the default verb
        parser.parse_args(arguments)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#h][^)#]*)\)", README))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


NAMED = sorted(set(re.findall(r"`((?:configs|data|docs|tests|formats|benchmarks)/[\w./]*)`", README)))


@pytest.mark.parametrize("path", [path for path in NAMED if path != "data/processed"])
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_named_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets


def test_pip_lines_name_files_that_exist():
    for name in re.findall(r"-r (\S+\.txt)", README):
        assert (ROOT / name).is_file()
