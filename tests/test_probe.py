"""The default of --tokens_per_pass: memory measured on two passes against that of a real pass."""

import sys

import pytest

from finetune import settings
from finetune.memory.sizes import sizes_of_model
from formats import IGNORE_INDEX
from tests.gradient_check import with_random_lora
from tests.helpers import lazy

torch = lazy("torch")
memory_plan = lazy("finetune.training.memory_plan")
probe = lazy("finetune.training.probe")

ROWS = [([1] * 3000, [1] * 3000)]
FREE_MEMORY = "finetune.training.memory_plan.free_memory"
MEASURE_PASS = "finetune.training.probe.measure_pass"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark in Linux's /proc")


@pytest.fixture(scope="module")
def runner():
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.passes.runner import PassRunner

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    model = with_random_lora(LlamaForCausalLM(config))
    return PassRunner(model, 4096, share_prefix=True, pad_token_id=0)


def planned_tokens(runner, *flags, rows=ROWS):
    """Tokens per pass of a CPU run in float32."""
    flags = settings.parse(["--model", "m", "--dataset", "d", "--rank", "8", *flags])
    placement = memory_plan.Placement("float32", load_in_4bit=False, gradient_checkpointing=False, device="cpu")
    plan = memory_plan.plan_for(flags, sizes_of_model(runner.model), placement, rows, runner=runner)
    assert runner.tokens_per_pass == plan.tokens_per_pass
    return plan.tokens_per_pass


@linux
def test_measured_pass_predicts_a_larger_one(runner):
    measured = probe.measure_pass(runner, (512, 1024))
    (taken,) = probe.resident_peaks([probe.random_pass(runner, 3072)])
    predicted = measured.fixed + 3072 * measured.per_token
    assert measured.per_token > 8 * 4 * 4 * 128  # at least a few hidden states of each layer
    # Heap fragmentation differs from run to run; the budget is three fifths of the free memory.
    assert memory_plan.BUDGET_SHARE["cpu"] * taken < predicted < 1.6 * taken


@linux
def test_measuring_leaves_the_run_as_it_was(runner):
    runner.model.eval()
    state, budget = torch.get_rng_state(), runner.tokens_per_pass
    assert probe.measure_pass(runner, (64, 512)) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in runner.model.parameters())
    assert not runner.model.training and runner.tokens_per_pass == budget


def test_little_memory_gives_passes_as_measured(runner, monkeypatch):
    measured = []
    monkeypatch.setattr(MEASURE_PASS, lambda *args: measured.append(args) or probe.PassMemory(1e8, 1e5))
    monkeypatch.setattr(FREE_MEMORY, lambda: 1e9)
    # 0.6 of the free memory less the fixed part and 8 bytes of optimizer state per trained parameter
    parameters = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    assert planned_tokens(runner) == int((0.6e9 - 1e8 - 8 * parameters) / 1e5)
    assert len(measured) == 1
    assert planned_tokens(runner, "--tokens_per_pass", "777") == 777
    monkeypatch.setattr(FREE_MEMORY, lambda: 64e9)
    assert planned_tokens(runner) == 12_000  # four of the longest rows
    assert len(measured) == 1


def test_pass_that_does_not_fit_leaves_the_estimate(runner, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(runner, "run_once", out_of_memory)
    monkeypatch.setattr(FREE_MEMORY, lambda: 1e9)
    assert probe.measure_pass(runner, (512, 1024)) is None
    assert memory_plan.MIN_DEFAULT_TOKENS_PER_PASS <= planned_tokens(runner) < 12_000


def test_other_errors_of_a_measured_pass_are_raised(runner, monkeypatch):
    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(runner, "run_once", broken)
    with pytest.raises(RuntimeError, match="something else"):
        probe.measure_pass(runner, (512, 1024))


def test_cpu_measures_only_when_memory_is_scarce(runner, monkeypatch):
    """16 of the longest rows would be 32,800 tokens; with their prefix shared the run needs 2,800."""
    rows = [([*range(2000), *[number] * 50], [IGNORE_INDEX] * 2000 + [number] * 50) for number in range(32)]
    measured = []
    monkeypatch.setattr(MEASURE_PASS, lambda *args: measured.append(args))
    for allowed, times in ((5_700, 0), (5_300, 1)):
        monkeypatch.setattr(
            "finetune.training.memory_plan.estimated_tokens_per_pass", lambda *args, allowed=allowed, **more: allowed
        )
        assert planned_tokens(runner, "--batch_size", "16", "--grad_accum", "1", rows=rows) == allowed
        assert len(measured) == times
