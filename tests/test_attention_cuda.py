"""The GPU's attention as far as a CPU can check it: FlexAttention's mask, and its uncompiled results."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.passes.plan import plan_passes
from tests.gradient_check import random_rows, small_llama, with_random_lora
from tests.helpers import lazy

torch = lazy("torch")
flex_attention = lazy("torch.nn.attention.flex_attention")
attention = lazy("finetune.passes.attention")
cuda = lazy("finetune.passes.attention_cuda")
runner_module = lazy("finetune.passes.runner")
host_waits = lazy("tests.host_waits")

PASSES = [
    plan_passes(random_rows(groups, rows, prefix=prefix, nested=nested), 10**9)[0]
    for groups, rows, prefix, nested in ((1, 3, 150, False), (3, 4, 400, True), (2, 3, 256, True))
]


def dense_mask(pass_, padded):
    until = cuda.visible_until(pass_.segments, padded)
    tokens = np.arange(padded)
    return (tokens[None, :] <= tokens[:, None]) & (tokens[:, None] < until[None, :])


@pytest.mark.parametrize("pass_", PASSES)
def test_visible_until_describes_the_tree(pass_):
    tokens = len(pass_.input_ids)
    allowed = np.zeros((tokens, tokens), dtype=bool)
    for s in pass_.segments:
        allowed[s.start : s.end, s.start : s.end] = np.tri(s.end - s.start, dtype=bool)
        allowed[s.end : s.subtree_end, s.start : s.end] = True
    assert np.array_equal(dense_mask(pass_, tokens), allowed)


@pytest.mark.parametrize("pass_", PASSES)
def test_block_mask_equals_pytorchs(pass_):
    """Blocks counted without the mask, against the mask and against what PyTorch makes of the same rule."""
    size, padded = cuda.BLOCK_SIZE, cuda.padded_length(len(pass_.input_ids))
    blocks = dense_mask(pass_, padded).reshape(padded // size, size, -1, size).swapaxes(1, 2)
    partial, full = cuda.classify_blocks(cuda.visible_until(pass_.segments, padded))
    assert np.array_equal(full, blocks.all((2, 3)))
    assert np.array_equal(partial, blocks.any((2, 3)) & ~blocks.all((2, 3)))
    ours = cuda.block_mask(pass_.segments, len(pass_.input_ids), "cpu")
    theirs = flex_attention.create_block_mask(ours.mask_mod, None, None, padded, padded, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@pytest.mark.parametrize("kv_heads", [1, 6])
@pytest.mark.parametrize("pass_", PASSES)
def test_flex_attention_equals_tree_attention(pass_, kv_heads):
    tokens = len(pass_.input_ids)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 16) for heads in (6, kv_heads, kv_heads))
    padding = (0, 0, 0, cuda.padded_length(tokens) - tokens)
    padded = (torch.nn.functional.pad(x, padding, value=1.0) for x in (q, k, v))
    actual = cuda.FlexTree().attend(*padded, cuda.block_mask(pass_.segments, tokens, "cpu"), 0.25)
    expected = attention.tree_attention(q, k, v, attention.Layout.of(pass_.segments), 0.25)
    assert torch.allclose(actual[:, :, :tokens], expected, atol=2e-6)
    assert actual.isfinite().all()


def unsloth_kernel(monkeypatch):
    """Unsloth's module alone: its package imports Triton."""
    package = Path(importlib.util.find_spec("unsloth").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("unsloth_kernel", package / "utils" / "prefix_grouper_kernel.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks itself up there
    monkeypatch.setitem(sys.modules, "unsloth.utils", SimpleNamespace(prefix_grouper_kernel=module))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kernel", ["ours", "Unsloth's"])
def test_passes_of_many_lengths_compile_once(kernel, monkeypatch):
    """Otherwise each new length or shape of a tree would cost its step the seconds of a compilation."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    prefix_grouper_kernel = unsloth_kernel(monkeypatch)
    cuda._compiled.cache_clear()
    for prefix in (150, 230, 400, 513, 1100):
        for nested in (False, True):
            pass_ = plan_passes(random_rows(2, 3, prefix=prefix, nested=nested, seed=prefix), 10**9)[0]
            mask = cuda.block_mask(pass_.segments, len(pass_.input_ids), "cpu")
            q, k, v = (torch.randn(1, heads, mask.seq_lengths[0], 16) for heads in (4, 2, 2))
            if kernel == "ours":
                cuda._compiled()(q, k, v, block_mask=mask, enable_gqa=True, scale=0.25)
            else:
                heads_last = (x.transpose(1, 2) for x in (q, k, v))
                info = cuda.unsloth_segments(mask, torch.device("cpu"))
                prefix_grouper_kernel.flex_shared_prefix_attention(*heads_last, info, scale=0.25)
    cuda._compiled.cache_clear()
    assert counter.frame_count == 1


def waits_of_a_step(monkeypatch, layers, checkpointing, attend):
    """Where the host waits in a shared step, on a device from which nothing can be read."""
    model = with_random_lora(small_llama(num_hidden_layers=layers)).to("meta")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    monkeypatch.setattr(runner_module, "choose_mode", lambda *_: ("tree", "", cuda.FlexTree()))
    monkeypatch.setattr(cuda, "_compiled", lambda: attend)
    runner = runner_module.PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    with host_waits.HostWaits() as waits:
        result = runner.run_once(random_rows(2, 3, nested=True), 1.0, lambda loss: loss.backward())
    assert result.passes == 1
    return waits.counts


def attend_without_mask(query, key, value, *, block_mask, **options):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_layer_waits_for_the_gpu(monkeypatch, checkpointing):
    """A step waits for its pass: ten copies of what the host has planned, and one read of the loss."""
    for layers in (2, 5):
        waits = waits_of_a_step(monkeypatch, layers, checkpointing, attend_without_mask)
        assert waits == {"copy": 10, "_local_scalar_dense": 1}


PLANTED = {
    "item": ("_local_scalar_dense", lambda x: x.sum().item()),
    "bool": ("_local_scalar_dense", lambda x: bool((x > 0).all())),
    "copy to the device": ("copy", lambda x: torch.arange(3).to(x.device)),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_layer_that_waits_is_counted(monkeypatch, planted, direction):
    name, read = PLANTED[planted]

    def attend(*args, **kwargs):
        output = attend_without_mask(*args, **kwargs)
        if direction == "forward":
            read(output)
        else:
            output.register_hook(lambda grad: (read(grad), None)[1])
        return output

    counts = [waits_of_a_step(monkeypatch, layers, False, attend)[name] for layers in (2, 5)]
    assert counts[1] - counts[0] == 3


READS = {
    "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(), "to": lambda x: x.to("cpu"), "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(), "index": lambda x: x[x > 0], "masked_select": lambda x: x.masked_select(x > 0),
    "_unique2": lambda x: x.unique(), "_local_scalar_dense": lambda x: float(x[0]),
    "index_put_": lambda x: x.clone().index_put_((x > 0,), x.new_ones(3)),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_reads_of_a_cpu_tensor_are_counted(name):
    """Interpreted CUDA code has all its tensors on the CPU; forward, recomputed and backward."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            READS[name](x.detach())
            return x.clone()

        @staticmethod
        def backward(_, grad):
            READS[name](grad)
            return grad

    x = torch.ones(3, requires_grad=True)
    with host_waits.HostWaits() as waits:
        torch.utils.checkpoint.checkpoint(Reads.apply, x, use_reentrant=True).sum().backward()
    assert waits.counts == {name: 3}


def test_model_runs_through_flex_attention():
    model = with_random_lora(small_llama())
    runner = runner_module.PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    rows = random_rows(2, 3, nested=True)
    assert runner_module.incompatibility(runner.causal_lm, cuda.FlexTree()) == ""
    runner.attention = cuda.FlexTree()
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(runner.reference_loss(rows), rel=1e-5)
    assert model.base_model.model.config._attn_implementation != "sandwich_flex"


def test_attention_ignored_by_the_model_is_detected():
    """The base class packs rows, but the model attends as it always does."""
    assert "hidden states differ" in runner_module.incompatibility(small_llama(), attention.PackedAttention())


def test_unsloth_kernel_refuses_sliding_windows():
    model = small_llama()
    model.config.sliding_window = 64
    assert "sliding_window" in runner_module.incompatibility(model, cuda.UnslothTree())
