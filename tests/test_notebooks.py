"""Every cell of the notebooks, with smaller sizes. A cell is run as Jupyter runs it, without a kernel.

`python -m tests.test_notebooks notebooks/*.ipynb` runs them in full and stores what they print.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_OUTPUT_BYTES = 20_000  # of all outputs that are stored in a notebook


def cells(notebook: Path) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_command(command: str) -> None:
    """A line that begins with `!`: the command without a shell, its output into the cell."""
    program, *arguments = shlex.split(command)
    program = sys.executable if program == "python" else program
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, encoding="utf-8", env=environment,
                          check=False)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    print(done.stdout, end="")


def run_notebook(notebook: Path) -> list[str]:
    """Runs the cells in the current folder; what each prints, with the value of its last expression."""
    variables, outputs = {"__name__": "__main__", "_run": run_command}, []
    for source in cells(notebook):
        # Jupyter fills {NAME} in such lines; %cd is in the part for Colab only.
        lines = re.sub(r"^(\s*)[!%](.*)$", r"\1_run(f'''\2''')", source, flags=re.MULTILINE)
        *body, last = ast.parse(lines).body
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(ast.Module(body, []), notebook.name, "exec"), variables)  # noqa: S102 - our own notebooks
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), notebook.name, "eval"), variables)  # noqa: S307 - same
                if value is not None:
                    print(repr(value))
            else:
                exec(compile(ast.Module([last], []), notebook.name, "exec"), variables)  # noqa: S102 - same
        outputs.append(output.getvalue())
    return outputs


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the scripts and samples, in which the notebooks may write; its model has two small layers."""
    from transformers import AutoTokenizer

    from finetune.models.bundled import smollm2_dir
    from tests.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("checkout")
    for path in (*ROOT.glob("*.py"), ROOT / "finetune", ROOT / "formats"):
        (folder / path.name).symlink_to(path)
    (folder / "data").mkdir()
    (folder / "data" / "samples").symlink_to(ROOT / "data" / "samples")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tokenizer.save_pretrained(folder / "tiny")
    tiny_llama(tokenizer).save_pretrained(folder / "tiny")
    return folder


@pytest.fixture
def inside(checkout, monkeypatch) -> Path:
    monkeypatch.chdir(checkout)
    for name, value in {"MODEL": str(checkout / "tiny"), "STEPS": "2", "LIMIT": "2"}.items():
        monkeypatch.setenv(f"NOTEBOOK_{name}", value)
    return checkout


@pytest.mark.parametrize("notebook", NOTEBOOKS[:2], ids=lambda path: path.stem)
def test_notebook_without_training(notebook, inside):
    text = "".join(run_notebook(notebook))
    if notebook.stem.startswith("01"):
        assert "'set_lamp', 'set_timer', 'lock_door'" in text
        assert "calls: [{'name': 'set_lamp', 'arguments': {'room': 'kitchen', 'level': 7}}]" in text
    else:
        assert "assistant  trained  '<|im_end|>'" in text
        assert "3 ends of turn in 2 messages" in text


def test_notebooks_that_train_and_evaluate(inside):
    train, evaluate = NOTEBOOKS[2:]
    assert "passed: all assertions hold" in "".join(run_notebook(train))
    text = "".join(run_notebook(evaluate))
    assert text.count("request ") in (2, 3)  # answers to two rows, of which one may have two turns
    assert '"difference": ' in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_ran_in_order(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "google.colab" in "".join(code[0]["source"])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert len(json.dumps(outputs)) < MAX_OUTPUT_BYTES


def test_there_are_four_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        content = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        for number, (cell, printed) in enumerate(zip(code, run_notebook(path), strict=True), start=1):
            stream = {"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}
            cell |= {"execution_count": number, "outputs": [stream] if printed else []}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
