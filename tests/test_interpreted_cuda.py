"""Unsloth's CUDA code on a CPU, kernel by kernel through Triton's interpreter (tests/interpreted_cuda.py)."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import Case, make_rows, shape
from benchmarks.throughput_parts.random_model import write_model

ROOT = Path(__file__).resolve().parents[1]
TRITON = ROOT / ".venv" / "triton"  # as in interpreted_cuda.py, which imports torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRITON.is_dir(), reason="needs Triton in a separate folder; run `make test-slow`"),
]


def run_interpreted(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_cuda", *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def small_model(folder: Path, kind="llama", layers=2, **more):
    return write_model(shape(kind, 128, 320, layers, 4, 2, **more), folder)


def test_unsloth_forward_is_exact_for_shared_passes(tmp_path):
    model = small_model(tmp_path / "model")
    results = json.loads(run_interpreted("gradients", model))
    for activations in ("kept", "recomputed"):
        distances = results[activations]
        assert distances["mode"] == "tree"
        assert "Unsloth's shared-prefix kernel" in distances["reason"]
        assert max(distances[mode] for mode in ("tree", "packed", "padded")) < 1e-5


def test_no_layer_of_unsloth_waits_for_the_gpu(tmp_path):
    """Models of one and of two layers wait equally often."""
    paths = [small_model(tmp_path / f"model_{layers}", layers=layers) for layers in (1, 2)]
    waits = json.loads(run_interpreted("waits", *paths))
    for few, many in waits.values():
        assert few == many
        assert few["_local_scalar_dense"] >= 1  # the loss


def train(tmp_path, name, *flags, interpreted):
    arguments = [
        "--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--format", "chatml", "--batch_size", 2,
        "--grad_accum", 1, "--max_steps", 3, "--experiments_dir", tmp_path / "runs", "--name", name, *flags,
    ]  # fmt: skip
    if interpreted:
        run_interpreted("train_lora.py", *arguments)
    else:
        subprocess.run(
            [sys.executable, "train_lora.py", *map(str, arguments)], cwd=ROOT, check=True, capture_output=True
        )
    with (tmp_path / "runs" / name / "training_log.csv").open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_losses_of_cuda_code_equal_the_cpu(tmp_path):
    small_model(tmp_path / "model")
    make_rows(Case(None, 60, trained=12, rows=2), tmp_path / "rows.jsonl")
    for name, flags, tolerance in (
        ("float32", ["--dtype", "float32", "--no-load_in_4bit"], 1e-5),
        ("qlora", ["--dtype", "bfloat16", "--load_in_4bit"], 1e-3),
    ):
        on_cpu = train(tmp_path, f"{name}_cpu", *flags, interpreted=False)
        on_cuda = train(tmp_path, f"{name}_cuda", *flags, interpreted=True)
        assert on_cuda == pytest.approx(on_cpu, abs=tolerance)
        config = json.loads((tmp_path / "runs" / f"{name}_cuda" / "experiment_config.json").read_text(encoding="utf-8"))
        assert config["load_in_4bit"] == (name == "qlora")


@pytest.mark.parametrize("switches", [(), ("checkpointing",), ("4bit",), ("4bit", "checkpointing")], ids="-".join)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_memory_of_a_step_is_as_estimated(tmp_path, kind, switches):
    """Bytes of live tensors at the peak; what the allocator reserves in addition (`slack`) is only known on a GPU."""
    more = {"head_dim": 32} if kind == "qwen3" else {}
    model = small_model(tmp_path / "model", kind, layers=3, **more)
    memory = json.loads(run_interpreted("memory", model, 512, 40, *switches))
    assert memory["mode"] == "tree"
    assert memory["estimate"] == pytest.approx(memory["measured"], rel=0.05)
