"""--help of every command and verb: examples, and no import that costs seconds before the first word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The budget is a second; what costs seconds is importing these, so that is what is checked.
HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow", "numpy", "matplotlib", "sklearn", "rich", "pynvml")
VERBS = {
    "prepare_data.py": ("prepare", "encode", "parse", "show", "audit", "generate"),
    "gpu_memory.py": ("estimate", "monitor"),
}
COMMANDS = [[script.name, *verb] for script in sorted(ROOT.glob("*.py"))
            for verb in [(), *((verb,) for verb in VERBS.get(script.name, ()))]]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_examples_and_imports_nothing_heavy(words):
    code = (
        f"import runpy, sys\nsys.argv = {[*words, '--help']!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        f"heavy = [name for name in {HEAVY!r} if sys.modules.get(name)]\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert words[0] in done.stdout
    assert "example" in done.stdout or (words[0] == "gpu_memory.py" and len(words) == 2)  # its examples stand above
