"""What only a card can tell: the CUDA attentions, 4-bit bases, Unsloth's checkpointing, and the real script on them.

`python -m pytest tests/gpu -m gpu` on a machine with an NVIDIA GPU; the bundled model is all that is needed.
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
import torch

from tests.test_shared_prefix import adapted, difference, gradients, llama, some_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "samples"


def row_by_row(runner, rows, scale):
    """Each row alone through the model's own forward with all its logits."""

    def compute():
        for row in rows:
            with runner.autocast():
                logits = runner.causal_lm(input_ids=torch.from_numpy(row.input_ids).long().cuda()[None]).logits[0]
            picked = logits[torch.from_numpy(row.positions).long().cuda()].float()
            targets = torch.from_numpy(row.targets).long().cuda()
            (torch.nn.functional.cross_entropy(picked, targets, reduction="sum") * scale).backward()

    return compute


def test_flex_attention_gives_the_gradients_of_row_by_row():
    """Transformers' own model, float32 without TF32; bfloat16 within the noise of plain batches."""
    from finetune.passes.runner import PassRunner

    torch.backends.cuda.matmul.allow_tf32 = False
    exact_model = adapted(llama().cuda())
    rows = some_rows(3, 4, nested=True)
    scale = 1 / sum(len(row.positions) for row in rows)
    runner = PassRunner(exact_model, 10**9, share_prefix=True, pad_token_id=0)
    assert runner.mode == "tree" and "FlexAttention" in runner.reason
    exact = gradients(exact_model, row_by_row(runner, rows, scale))
    shared = gradients(exact_model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    assert difference(shared, exact) < 1e-4

    model = adapted(llama(torch.bfloat16).cuda())
    model.load_state_dict(exact_model.state_dict())
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    shared = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    alone = gradients(model, row_by_row(runner, rows, scale))
    runner.mode = "padded"
    padded = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    noise = max(difference(alone, exact), difference(padded, exact))
    assert difference(shared, exact) < 1.5 * noise


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unsloths_model_shares_exactly(load_in_4bit, checkpointing):
    """The bundled model through FastLanguageModel: shared against row by row, in bfloat16's own noise."""
    from finetune.models.adapter import add_lora
    from finetune.models.bundled import resolve_model
    from finetune.models.loading import load_base
    from finetune.passes.runner import PassRunner

    loaded = load_base(resolve_model("smollm2-135m"), dtype="bfloat16", load_in_4bit=load_in_4bit, max_seq_length=2048)
    model = add_lora(
        loaded.model, rank=8, alpha=16, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=False, gradient_checkpointing=checkpointing, seed=0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    rows = some_rows(2, 4, nested=True)
    scale = 1 / sum(len(row.positions) for row in rows)
    runner = PassRunner(model.train(), 10**9, share_prefix=True, pad_token_id=0)
    runner.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    assert runner.mode == "tree", runner.reason
    assert runner.run(rows, scale).loss_sum == pytest.approx(runner.reference_loss(rows), rel=2e-2)
    alone = gradients(model, row_by_row(runner, rows, scale))
    shared = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    runner.mode = "padded"
    padded = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    assert difference(shared, alone) < 2 * difference(padded, alone)


def train(folder, name, *more, wait=True, launcher=()):
    words = [sys.executable, *launcher, str(ROOT / "train_lora.py"), "--model", "smollm2-135m", "--dataset",
             str(SAMPLES / "gennx_train.jsonl"), "--format", "chatml", "--limit", "64", "--batch_size", "8",
             "--grad_accum", "1", "--experiments_dir", str(folder), "--name", name, *map(str, more)]  # fmt: skip
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out + errors


def losses(folder):
    with (folder / "training_log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--no-load_in_4bit"])
def test_the_script_learns_alike_with_and_without_sharing(tmp_path, bits):
    said = train(tmp_path, "shared", "--max_steps", 12, "--lr", "2e-3", bits)
    train(tmp_path, "alone", "--max_steps", 12, "--lr", "2e-3", bits, "--no-share_prefix")
    shared, alone = losses(tmp_path / "shared"), losses(tmp_path / "alone")
    assert "equal prefixes of a step computed once" in said
    assert shared == pytest.approx(alone, rel=0.05)
    assert shared[-1] < 0.7 * shared[0]
    config = json.loads((tmp_path / "shared" / "experiment_config.json").read_text())
    assert config["device"] != "cpu"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_cards_learn_over_nccl_what_one_learns(tmp_path):
    flags = ("--max_steps", 8, "--lr", "2e-3", "--no-load_in_4bit")
    train(tmp_path, "one", *flags)
    said = train(
        tmp_path, "two", *flags, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    )
    assert "2 processes" in said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_killed_run_goes_on(tmp_path):
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
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_lora.py"), "--resume", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "training_log.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 31))
    assert (tmp_path / "run" / "final_model" / "adapter_model.safetensors").is_file()
