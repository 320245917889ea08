"""What commands that need no model must not import: each of these packages takes from half a second to many."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scripts import ROOT

TRAINING = ("unsloth", "trl", "peft", "bitsandbytes", "sklearn", "scipy", "pandas", "datasets")
NO_MODEL = (*TRAINING, "torch", "transformers")
ROWS = str(ROOT / "data" / "samples" / "korean_apigen.jsonl")


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        (["visualize_loss.py", "training_log.csv", "-o", "loss.png"], NO_MODEL),
        (["prepare_data.py", ROWS, "--output", "out"], NO_MODEL),
        (["prepare_data.py", "generate", "--tools", str(ROOT / "data/samples/house_tools.json"), "--output", "made"],
         (*NO_MODEL, "matplotlib")),
        (["train_lora.py", "--doctor"], NO_MODEL),
        (["train_lora.py", "--model", "smollm2-135m", "--dataset", ROWS, "--dry_run"], (*TRAINING, "matplotlib")),
    ],
    ids=["charts", "prepare", "generate", "doctor", "dry_run"],
)  # fmt: skip
def test_command_imports_only_what_it_needs(command, unwanted, tmp_path):
    (tmp_path / "training_log.csv").write_text("step,loss\n1,2\n2,1\n", encoding="utf-8")
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv = {command!r}\n"
        f"try:\n    runpy.run_path({str(ROOT / command[0])!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        f"imported = [name for name in {unwanted!r} if sys.modules.get(name)]\nassert not imported, imported\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_without_docstrings_is_refused():
    code = (
        "from finetune.errors import one_line_errors\nfrom finetune.models.loading import import_unsloth\n"
        "raise SystemExit(one_line_errors(import_unsloth)())"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "-OO" in done.stderr, done.stderr
