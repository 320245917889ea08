"""The default of --tokens_per_pass: what two tried passes took, against what a pass really takes."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import settings
from finetune.memory.estimate import Plan
from finetune.memory.sizes import sizes_of_model
from finetune.passes.runner import PassRunner
from finetune.training import memory_plan, probe
from tests.gradient_check import with_random_lora

ROWS = [([1] * 3000, [1] * 3000)]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the high-water mark")


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    model = with_random_lora(LlamaForCausalLM(config))
    return PassRunner(model, 4096, share_prefix=True, pad_token_id=0)


def chosen(runner, *words):
    flags = settings.parse(["--model", "m", "--dataset", "d", *words])
    plan = Plan(tokens=1, rank=8, load_in_4bit=False, dtype="float32", gradient_checkpointing=False,
                optim="adamw_torch", device="cpu")  # fmt: skip
    return probe.tokens_of_a_pass(runner, flags, sizes_of_model(runner.model), plan, ROWS)


@linux
def test_a_probe_foresees_a_larger_pass(runner):
    found = probe.probe(runner, (512, 1024))
    (taken,) = probe._resident_peaks([probe.work(runner, 3072)])
    foreseen = found.fixed + 3072 * found.per_token
    assert found.per_token > 8 * 4 * 4 * 128  # at the very least a few states of each layer
    # The heap leaves holes, another number of them each time; the budget takes three fifths of the free memory.
    assert memory_plan.BUDGET["cpu"] * taken < foreseen < 1.6 * taken


@linux
def test_a_probe_leaves_no_gradient_and_no_random_number_behind(runner):
    runner.model.eval()
    state, budget = torch.get_rng_state(), runner.tokens_per_pass
    assert probe.probe(runner, (64, 512)) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in runner.model.parameters())
    assert not runner.model.training and runner.tokens_per_pass == budget


@linux
def test_little_memory_makes_small_passes_by_what_was_tried(runner, monkeypatch):
    tried = []
    monkeypatch.setattr(probe, "probe", lambda *args: tried.append(args) or probe.Probe(fixed=1e8, per_token=1e5))
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 1e9)
    # 0.6 of the free memory without what a pass takes anyway and eight bytes for each of the adapter's numbers.
    numbers = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    assert chosen(runner) == int((0.6e9 - 1e8 - 8 * numbers) / 1e5)
    assert len(tried) == 1
    assert chosen(runner, "--tokens_per_pass", "777") == 777
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 64e9)
    assert chosen(runner) == 12_000  # four of the longest rows: on a CPU more would be of no use
    assert len(tried) == 1  # and nothing had to be tried for it


def test_a_pass_that_does_not_fit_leaves_the_formula(runner, monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(runner, "run_once", too_much)
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 1e9)
    assert probe.probe(runner, (512, 1024)) is None
    assert memory_plan.LEAST_TOKENS <= chosen(runner) < 12_000

    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(runner, "run_once", broken)
    with pytest.raises(RuntimeError, match="something else"):
        probe.probe(runner, (512, 1024))


def test_on_a_cpu_a_pass_is_tried_only_where_memory_is_near_what_the_run_needs(runner, monkeypatch):
    rows = [([*range(2000), *[number] * 50], [-100] * 2000 + [number] * 50) for number in range(32)]
    tried = []
    monkeypatch.setattr(probe, "probe", lambda *args: tried.append(args))
    flags = settings.parse(["--model", "m", "--dataset", "d", "--batch_size", "16", "--grad_accum", "1"])
    plan = Plan(tokens=1, rank=8, load_in_4bit=False, dtype="float32", gradient_checkpointing=False,
                optim="adamw_torch", device="cpu")  # fmt: skip
    # The longest row 16 times would be 32,800 tokens; with the beginning shared the run needs 2,800.
    for allowed, tries in ((5_700, 0), (5_300, 1)):
        monkeypatch.setattr(memory_plan, "default_tokens_per_pass", lambda *args, allowed=allowed, **more: allowed)
        assert probe.tokens_of_a_pass(runner, flags, sizes_of_model(runner.model), plan, rows) == allowed
        assert len(tried) == tries
