"""Exactness of shared-prefix steps: attention, loss and gradients against the plain way, row by row."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from finetune.passes import attention, attention_gemm
from finetune.passes.attention import Layout, tree_attention
from finetune.passes.loss import head_loss
from finetune.passes.plan import make_row, plan_passes
from finetune.passes.runner import PassRunner, choose_mode
from formats import IGNORE_INDEX

SMALL = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip


def some_rows(groups, rows_per_group, prefix=150, seed=0, nested=False):
    """Rows of `groups` different beginnings with own parts of unequal length, and one that is all prefix."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        shared = rng.integers(0, 300, prefix)
        turn = rng.integers(0, 300, 60)
        for number in range(rows_per_group):
            middle = turn if nested and number % 2 else np.empty(0, dtype=int)
            own = rng.integers(0, 300, rng.integers(3, 90))
            ids = np.concatenate([shared, middle, own])
            labels = np.where(np.arange(len(ids)) >= len(ids) - len(own) // 2 - 1, ids, IGNORE_INDEX)
            rows.append(make_row(ids, labels))
        ids = shared[: prefix - 20]
        rows.append(make_row(ids, np.where(np.arange(len(ids)) > 100, ids, IGNORE_INDEX)))
    return rows


def adapted(model, rank=8, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts B at zero, and then no gradient reaches A
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes)).to(dtype)


def gradients(model, compute):
    model.zero_grad()
    compute()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.requires_grad}


def difference(a, b):
    """Relative distance of two sets of gradients, |a - b| / |b| over all parameters together."""
    assert a.keys() == b.keys()
    distance = sum(((a[n] - b[n]) ** 2).sum() for n in a).sqrt()
    return (distance / sum((b[n] ** 2).sum() for n in b).sqrt()).item()


def row_by_row(runner, rows, scale):
    """The plain way: each row alone through the model's own forward with all its logits."""

    def compute():
        for row in rows:
            logits = runner.causal_lm(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0].float()
            picked = logits[torch.from_numpy(row.positions).long()]
            targets = torch.from_numpy(row.targets).long()
            (torch.nn.functional.cross_entropy(picked, targets, reduction="sum") * scale).backward()

    return compute


def dense_reference(q, k, v, one):
    tokens = len(one.input_ids)
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in one.segments:
        allowed[s.start : s.end, s.start : s.end] = torch.ones(s.end - s.start, s.end - s.start).tril().bool()
        allowed[s.end : s.subtree_end, s.start : s.end] = True
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("nested", [False, True])
def test_tree_attention_is_dense_attention_under_the_tree_mask(kv_heads, nested):
    rows = some_rows(groups=3, rows_per_group=4, prefix=400, nested=nested)
    (one,) = plan_passes(rows, 10**9)
    tokens = len(one.input_ids)
    torch.manual_seed(0)
    q = torch.randn(1, 6, tokens, 16, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, tokens, 16, requires_grad=True) for _ in range(2))
    out = tree_attention(q, k, v, Layout.of(one.segments))
    upstream = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = dense_reference(*exact, one)
    wanted = (reference, *torch.autograd.grad(reference, exact, upstream.double()))
    for a, b in zip(got, wanted, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 2e-6


@pytest.mark.parametrize(
    ("groups", "rows_per_group", "nested", "rank", "checkpointing"),
    [(1, 8, False, 8, False), (2, 4, False, 8, False), (2, 4, True, 64, False), (6, 2, True, 8, False),
     (2, 4, True, 8, True), (1, 1, False, 64, True)],
)  # fmt: skip
def test_gradients_equal_row_by_row_in_float32(groups, rows_per_group, nested, rank, checkpointing):
    model = adapted(llama(), rank)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    rows = some_rows(groups, rows_per_group, nested=nested)
    scale = 1 / sum(len(r.positions) for r in rows)
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    assert runner.mode == "tree"
    alone = gradients(model, row_by_row(runner, rows, scale))
    together = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    assert difference(together, alone) < 1e-5
    # The cut into passes changes nothing either.
    runner.tokens_per_pass = 100
    assert runner.run(rows, scale).passes > 1
    assert difference(gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward())), alone) < 1e-5


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_the_other_modes_are_exact_too(mode):
    model = adapted(llama())
    rows = some_rows(2, 4)
    scale = 1 / sum(len(r.positions) for r in rows)
    runner = PassRunner(model, 700, share_prefix=False, pad_token_id=0)
    assert runner.mode == "packed"
    runner.mode = mode
    alone = gradients(model, row_by_row(runner, rows, scale))
    together = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    assert difference(together, alone) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (4, 4, 80), (3, 1, 128)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(700, 700, True), (1, 1, True), (600, 300, False)])
def test_bfloat16_products_give_the_gradient_of_the_flash_kernel(heads, kv_heads, width, queries, keys, causal):
    """Both against float64. Scores reach 20, where bfloat16 knows steps of 0.125."""
    torch.manual_seed(0)
    make = lambda h, t, spread=1.0: (spread * torch.randn(2, h, t, width)).bfloat16()  # noqa: E731
    query, key = make(heads, queries, 2.0), make(kv_heads, keys, 2.0)
    value, upstream = make(kv_heads, keys), make(heads, queries)
    groups, scale = heads // kv_heads, width**-0.5
    repeated = [x.repeat_interleave(groups, 1) for x in (key, value)]
    output, lse = attention._flash(query, *repeated, 0.0, causal, scale=scale)
    flash = attention._flash_grads(upstream, query, *repeated, output, lse, causal, scale)
    flash = [flash[0], *(x.double().unflatten(1, (kv_heads, groups)).sum(2) for x in flash[1:])]
    products = attention_gemm.block_grads(upstream, query, key, value, output, lse, causal, scale)

    exact = [x.double().requires_grad_() for x in (query, key, value)]
    k, v = (x.repeat_interleave(groups, 1) for x in exact[1:])
    result = torch.nn.functional.scaled_dot_product_attention(exact[0], k, v, is_causal=causal, scale=scale)
    wanted = torch.autograd.grad(result, exact, upstream.double())
    for ours, theirs, right in zip(products, flash, wanted, strict=True):
        distances = [(x - right).norm().item() for x in (ours, theirs)]
        # A sum over grouped heads is rounded once, by a 512th at most; where the kernel is exact that shows.
        assert distances[0] <= 2 * distances[1] + right.norm() / 512 + 1e-3
        assert distances[0] < 1e-2 * right.norm() + 1e-3


def test_bfloat16_stays_within_its_own_noise():
    """The distance to row-by-row in bfloat16 is no larger than what the order of summation does to plain batches."""
    model = adapted(llama(torch.bfloat16))
    rows = some_rows(2, 6)
    scale = 1 / sum(len(r.positions) for r in rows)
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    alone = gradients(model, row_by_row(runner, rows, scale))
    shared = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    runner.mode = "padded"
    padded = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    exact_model = adapted(llama(torch.float32))
    exact_model.load_state_dict(model.state_dict())
    exact_runner = PassRunner(exact_model, 10**9, share_prefix=True, pad_token_id=0)
    exact = gradients(exact_model, row_by_row(exact_runner, rows, scale))
    noise = max(difference(alone, exact), difference(padded, exact))
    assert difference(shared, exact) < 1.5 * noise


def test_a_frozen_head_gives_the_same_as_autograd_through_it():
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False)
    hidden = torch.randn(1300, 32, requires_grad=True)
    targets, weights = torch.randint(0, 500, (1300,)), torch.randint(1, 4, (1300,)).float()

    def both():
        loss = head_loss(head, hidden, targets, weights)
        return loss, torch.autograd.grad(loss, hidden)[0]

    head.weight.requires_grad_(False)
    fast_loss, fast_grad = both()
    head.weight.requires_grad_(True)
    plain_loss, plain_grad = both()
    reference = torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets, reduction="none") @ weights
    assert torch.allclose(fast_loss, reference, rtol=1e-6)
    assert torch.allclose(plain_loss, reference, rtol=1e-6)
    assert torch.allclose(fast_grad, plain_grad, atol=1e-6)


def test_softcap_and_scale_follow_the_models_that_use_them():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    loss = head_loss(head, hidden, targets, torch.ones(5), softcap=3.0, scale=0.5)
    logits = torch.tanh(head(hidden) * 0.5 / 3.0) * 3.0
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize(
    "make",
    [lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=False)),
     lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))],
)  # fmt: skip
def test_other_families_share_through_the_same_interface(make):
    torch.manual_seed(0)
    model = adapted(make())
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    assert runner.mode == "tree"
    rows = some_rows(2, 3)
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(runner.reference_loss(rows), rel=1e-5)


def test_a_sliding_window_falls_back_to_padding_and_says_so():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64))
    mode, why, _ = choose_mode(model, share_prefix=True)
    assert mode == "padded"
    assert "sliding_window" in why
    assert model.config._attn_implementation != "sandwich_tree"


def test_out_of_memory_halves_the_passes_and_keeps_the_step(monkeypatch):
    model = adapted(llama())
    rows = some_rows(1, 8)  # all share, so one pass takes them
    scale = 1 / sum(len(r.positions) for r in rows)
    runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    wanted = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    hidden_states = runner.hidden_states

    def too_large(one):
        if one.input_ids.size > 400:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return hidden_states(one)

    monkeypatch.setattr(runner, "hidden_states", too_large)
    got = gradients(model, lambda: runner.run(rows, scale, lambda loss: loss.backward()))
    assert runner.tokens_per_pass <= 400
    assert difference(got, wanted) < 1e-5


def test_other_runtime_errors_are_not_swallowed(monkeypatch):
    runner = PassRunner(adapted(llama()), 10**9, share_prefix=True, pad_token_id=0)
    monkeypatch.setattr(runner, "hidden_states", lambda one: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run(some_rows(1, 1), 1.0)
