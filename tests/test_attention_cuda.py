"""The GPU's attention as far as a CPU can tell: FlexAttention's mask, and its uncompiled numbers against the tree's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from finetune.passes.attention import Layout, packed_inputs, tree_attention
from finetune.passes.attention_cuda import (
    BLOCK,
    FlexTree,
    UnslothTree,
    block_counts,
    block_mask,
    fill_up,
    flex,
    reach_of,
)
from finetune.passes.plan import plan_passes
from finetune.passes.runner import PassRunner, why_not
from tests.test_shared_prefix import adapted, llama, some_rows


def passes():
    for groups, rows, prefix, nested in ((1, 3, 150, False), (3, 4, 400, True), (2, 3, 2 * BLOCK, True)):
        yield plan_passes(some_rows(groups, rows, prefix=prefix, nested=nested), 10**9)[0]


def dense(one, padded):
    reach = reach_of(one.segments, padded)
    at = np.arange(padded)
    return (at[None, :] <= at[:, None]) & (at[:, None] < reach[None, :])


@pytest.mark.parametrize("one", list(passes()))
def test_reach_is_the_tree(one):
    """The mask by `reach` against the mask by the tree's definition."""
    tokens = len(one.input_ids)
    allowed = np.zeros((tokens, tokens), dtype=bool)
    for s in one.segments:
        allowed[s.start : s.end, s.start : s.end] = np.tri(s.end - s.start, dtype=bool)
        allowed[s.end : s.subtree_end, s.start : s.end] = True
    assert np.array_equal(dense(one, tokens), allowed)


@pytest.mark.parametrize("one", list(passes()))
def test_blocks_are_counted_without_the_mask(one):
    padded = fill_up(len(one.input_ids))
    blocks = dense(one, padded).reshape(padded // BLOCK, BLOCK, -1, BLOCK).swapaxes(1, 2)
    partial, full = block_counts(reach_of(one.segments, padded))
    assert np.array_equal(full, blocks.all((2, 3)))
    assert np.array_equal(partial, blocks.any((2, 3)) & ~blocks.all((2, 3)))
    # And what PyTorch makes of the same rule, entry by entry.
    ours = block_mask(one.segments, len(one.input_ids), "cpu")
    theirs = create_block_mask(ours.mask_mod, None, None, padded, padded, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_flex_attention_equals_the_tree(kv_heads):
    for one in passes():
        tokens = len(one.input_ids)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, 16) for heads in (6, kv_heads, kv_heads))
        filled = (F.pad(x, (0, 0, 0, fill_up(tokens) - tokens), value=1.0) for x in (q, k, v))
        got = flex(*filled, block_mask(one.segments, tokens, "cpu"), 0.25)
        assert torch.allclose(got[:, :, :tokens], tree_attention(q, k, v, Layout.of(one.segments)), atol=2e-6)
        assert got.isfinite().all()


def test_passes_of_many_lengths_are_compiled_once():
    """Each new length or shape of a tree would otherwise cost its step the seconds of a compilation."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    for prefix in (150, 230, 400, 513, 1100):
        for nested in (False, True):
            one = plan_passes(some_rows(2, 3, prefix=prefix, nested=nested, seed=prefix), 10**9)[0]
            mask = block_mask(one.segments, len(one.input_ids), "cpu")
            q, k, v = (torch.randn(1, heads, mask.seq_lengths[0], 16) for heads in (4, 2, 2))
            compiled(q, k, v, block_mask=mask, enable_gqa=True, scale=0.25)
    assert counter.frame_count == 1


def test_a_model_runs_through_flex_attention():
    model = adapted(llama())
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    rows = some_rows(2, 3, nested=True)
    assert why_not(runner.causal_lm, FlexTree()) == ""
    runner.attention = FlexTree()
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(runner.reference_loss(rows), rel=1e-5)
    assert model.base_model.model.config._attn_implementation != "sandwich_flex"


class Deaf(FlexTree):
    """Packs rows, but the model attends as it always does: what a forward that ignores our arguments would do."""

    def inputs(self, one, device):
        return packed_inputs(one, device)

    def inside(self, model):
        return UnslothTree.inside(self, model)


def test_an_attention_that_the_model_ignores_is_found_out():
    assert "computes something else" in why_not(llama(), Deaf())


def test_what_unsloths_kernel_does_not_know_is_refused():
    model = llama()
    model.config.sliding_window = 64
    assert "sliding_window" in why_not(model, UnslothTree())
