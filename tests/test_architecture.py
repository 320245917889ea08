"""The directions that imports may take (the contracts in pyproject.toml), and what may lie loose in finetune/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LOOSE_MODULES = 10


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_keep_their_direction():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_upward_import_is_found(tmp_path):
    """The contracts can fail: a copy of the tree in which formats/ imports finetune/ breaks them."""
    for name in ("formats", "finetune"):
        for path in (ROOT / name).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with (tmp_path / "formats" / "base.py").open("a", encoding="utf-8") as file:
        file.write("\nimport finetune.errors\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and "formats.base -> finetune.errors" in result.stdout


def test_few_modules_lie_loose_in_finetune():
    loose = [path.stem for path in (ROOT / "finetune").glob("*.py") if path.stem != "__init__"]
    assert len(loose) <= MAX_LOOSE_MODULES, loose
