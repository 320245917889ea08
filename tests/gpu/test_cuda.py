"""What needs a GPU: the CUDA attentions, 4-bit bases, Unsloth's checkpointing, and train_lora.py with them.

Run `python -m pytest tests/gpu -m gpu` on a machine with an NVIDIA GPU; no model has to be downloaded.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gradient_check import (
    random_rows,
    randomize_lora_b,
    relative_distance,
    row_by_row_gradients,
    shared_gradients,
    small_llama,
    with_random_lora,
)
from tests.helpers import lazy

torch = lazy("torch")
pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
# The GPU kit names a model of the same shape with random weights where the bundled one cannot be installed.
MODEL = os.environ.get("SANDWICH_GPU_MODEL", "smollm2-135m")
SAMPLES = ROOT / "data" / "samples"


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def make_runner(model):
    from finetune.passes.runner import PassRunner

    return PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)


def use_padding(runner):
    from finetune.passes.attention import PackedAttention

    runner.mode, runner.attention = "padded", PackedAttention()


def test_flex_attention_gradients_equal_row_by_row():
    """Transformers' own model: float32 without TF32; bfloat16 within the noise of plain batches."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact_model = with_random_lora(small_llama().cuda())
    rows = random_rows(3, 4, nested=True)
    runner = make_runner(exact_model)
    assert runner.mode == "tree" and "FlexAttention" in runner.reason
    exact = row_by_row_gradients(runner, rows)
    assert relative_distance(shared_gradients(runner, rows), exact) < 1e-4

    model = with_random_lora(small_llama(torch.bfloat16).cuda())
    model.load_state_dict(exact_model.state_dict())
    runner = make_runner(model)
    shared, alone = shared_gradients(runner, rows), row_by_row_gradients(runner, rows)
    use_padding(runner)
    padded = shared_gradients(runner, rows)
    noise = max(relative_distance(alone, exact), relative_distance(padded, exact))
    assert relative_distance(shared, exact) < 1.5 * noise


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unsloth_model_shares_exactly(load_in_4bit, checkpointing):
    """The bundled model through FastLanguageModel: shared and single rows, within the noise of bfloat16."""
    from finetune.models.adapter import add_lora
    from finetune.models.bundled import resolve_model
    from finetune.models.loading import load_base

    loaded = load_base(resolve_model(MODEL), dtype="bfloat16", load_in_4bit=load_in_4bit, max_seq_length=2048)
    model = add_lora(
        loaded.model, rank=8, alpha=16, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=False, gradient_checkpointing=checkpointing, seed=0,
    )  # fmt: skip
    rows = random_rows(2, 4, nested=True)
    runner = make_runner(randomize_lora_b(model).train())
    runner.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    assert runner.mode == "tree", runner.reason
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(runner.reference_loss(rows), rel=2e-2)
    alone, shared = row_by_row_gradients(runner, rows), shared_gradients(runner, rows)
    use_padding(runner)
    assert relative_distance(shared, alone) < 2 * relative_distance(shared_gradients(runner, rows), alone)


def train(folder, name, *more, wait=True, launcher=()):
    arguments = [sys.executable, *launcher, str(ROOT / "train_lora.py"), "--model", MODEL, "--dataset",
             str(SAMPLES / "gennx_train.jsonl"), "--format", "chatml", "--limit", "64", "--batch_size", "8",
             "--grad_accum", "1", "--experiments_dir", str(folder), "--name", name, *map(str, more)]  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out + errors


def losses(folder):
    with (folder / "training_log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--no-load_in_4bit"])
def test_sharing_does_not_change_the_losses(tmp_path, bits):
    output = train(tmp_path, "shared", "--max_steps", 12, "--lr", "2e-3", bits)
    train(tmp_path, "alone", "--max_steps", 12, "--lr", "2e-3", bits, "--no-share_prefix")
    shared, alone = losses(tmp_path / "shared"), losses(tmp_path / "alone")
    assert "equal prefixes of a step computed once" in output
    assert shared == pytest.approx(alone, rel=0.05)
    assert shared[-1] < 0.9 * shared[0]
    config = json.loads((tmp_path / "shared" / "experiment_config.json").read_text())
    assert config["device"] != "cpu"


def test_two_gpus_over_nccl_equal_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    flags = ("--max_steps", 8, "--lr", "2e-3", "--no-load_in_4bit")
    train(tmp_path, "one", *flags)
    output = train(
        tmp_path, "two", *flags, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    )
    assert "2 processes" in output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_run_resumes(tmp_path):
    process = train(tmp_path, "run", "--max_steps", 30, "--save_steps", 2, wait=False)
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "run" / "checkpoint-4").is_dir():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = subprocess.run(
        [sys.executable, str(ROOT / "train_lora.py"), "--resume", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    with (tmp_path / "run" / "training_log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 31))
    assert (tmp_path / "run" / "final_model" / "adapter_model.safetensors").is_file()
