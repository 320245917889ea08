"""Files, make targets and requirements that the README names exist. Links and commands: test_docs.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
