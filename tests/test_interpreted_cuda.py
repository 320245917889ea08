"""Unsloth's CUDA code on a CPU, kernel by kernel through Triton's interpreter (tests/interpreted_cuda.py)."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import Case, make_model, make_rows, shape
from tests.interpreted_cuda import ROOT, TRITON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TRITON.is_dir(), reason="needs Triton in a folder of its own; `make test-slow` puts it there"
    ),
]


def interpreted(*words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_cuda", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def small_model(folder: Path, kind="llama", layers=2, **more):
    folder.mkdir()
    return make_model(shape(kind, 128, 320, layers, 4, 2, **more), folder)


def test_unsloths_cuda_forward_takes_shared_passes_exactly(tmp_path):
    model = small_model(tmp_path / "model")
    said = json.loads(interpreted("gradients", model))
    for activations in ("kept", "recomputed"):
        distances = said[activations]
        assert distances["mode"] == "tree"
        assert "Unsloth's shared-prefix kernel" in distances["why"]
        assert max(distances[way] for way in ("tree", "packed", "padded")) < 1e-5


def train(tmp_path, name, *flags, on_card):
    words = [
        "--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--format", "chatml", "--batch_size", 2,
        "--grad_accum", 1, "--max_steps", 3, "--experiments_dir", tmp_path / "runs", "--name", name, *flags,
    ]  # fmt: skip
    if on_card:
        interpreted("train_lora.py", *words)
    else:
        subprocess.run([sys.executable, "train_lora.py", *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    with (tmp_path / "runs" / name / "training_log.csv").open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_script_learns_on_unsloths_cuda_code_what_it_learns_on_a_cpu(tmp_path):
    small_model(tmp_path / "model")
    make_rows(Case(None, 60, trained=12, rows=2), tmp_path / "rows.jsonl")
    for name, flags, noise in (
        ("float32", ["--dtype", "float32", "--no-load_in_4bit"], 1e-5),
        ("qlora", ["--dtype", "bfloat16", "--load_in_4bit"], 1e-3),
    ):
        on_cpu = train(tmp_path, f"{name}_cpu", *flags, on_card=False)
        assert train(tmp_path, f"{name}_card", *flags, on_card=True) == pytest.approx(on_cpu, abs=noise)
        config = json.loads((tmp_path / "runs" / f"{name}_card" / "experiment_config.json").read_text(encoding="utf-8"))
        assert config["load_in_4bit"] == (name == "qlora")


@pytest.mark.parametrize("switches", [(), ("checkpointing",), ("4bit",), ("4bit", "checkpointing")], ids="-".join)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_step_on_unsloths_cuda_code_holds_what_is_estimated(tmp_path, kind, switches):
    """Bytes of live tensors at the peak; what the allocator holds beyond them (`slack`) only a card can tell."""
    more = {"head_dim": 32} if kind == "qwen3" else {}
    model = small_model(tmp_path / "model", kind, layers=3, **more)
    held = json.loads(interpreted("memory", model, 512, 40, *switches))
    assert held["mode"] == "tree"
    assert held["estimate"] == pytest.approx(held["measured"], rel=0.05)
