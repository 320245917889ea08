"""Exactness of shared-prefix steps: attention, loss and gradients compared with each row computed alone."""

import numpy as np
import pytest

from finetune.passes.plan import plan_passes
from tests.gradient_check import (
    SMALL_LLAMA,
    random_rows,
    relative_distance,
    row_by_row_gradients,
    shared_gradients,
    small_llama,
    with_random_lora,
)
from tests.helpers import lazy

torch = lazy("torch")
transformers = lazy("transformers")
attention = lazy("finetune.passes.attention")
attention_gemm = lazy("finetune.passes.attention_gemm")
loss = lazy("finetune.passes.loss")
runner_module = lazy("finetune.passes.runner")


def make_runner(model, tokens_per_pass=10**9, share_prefix=True):
    return runner_module.PassRunner(model, tokens_per_pass, share_prefix, pad_token_id=0)


def use_padding(runner):
    runner.mode, runner.attention = "padded", attention.PackedAttention()


def dense_reference(q, k, v, pass_):
    tokens = len(pass_.input_ids)
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in pass_.segments:
        allowed[s.start : s.end, s.start : s.end] = torch.ones(s.end - s.start, s.end - s.start).tril().bool()
        allowed[s.end : s.subtree_end, s.start : s.end] = True
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("nested", "size"), [(False, 1), (True, 1), (True, 6)])
def test_tree_attention_equals_dense_attention(kv_heads, nested, size):
    """Output and gradients, against float64 under the mask of the tree; scores of hundreds would overflow alone."""
    (pass_,) = plan_passes(random_rows(groups=3, rows_per_group=4, prefix=400, nested=nested), 10**9)
    tokens = len(pass_.input_ids)
    torch.manual_seed(0)
    q = (size * torch.randn(1, 6, tokens, 16)).requires_grad_()
    k, v = ((size * torch.randn(1, kv_heads, tokens, 16)).requires_grad_() for _ in range(2))
    out = attention.tree_attention(q, k, v, attention.Layout.of(pass_.segments))
    upstream = torch.randn_like(out)
    actual = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = dense_reference(*exact, pass_)
    expected = (reference, *torch.autograd.grad(reference, exact, upstream.double()))
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 2e-6 * size**2


@pytest.mark.parametrize(
    ("groups", "rows_per_group", "nested", "rank", "checkpointing"),
    [(1, 8, False, 8, False), (2, 4, True, 64, False), (6, 2, True, 8, False), (2, 4, True, 8, True),
     (1, 1, False, 64, True)],
)  # fmt: skip
def test_gradients_equal_row_by_row_in_float32(groups, rows_per_group, nested, rank, checkpointing):
    """In one pass, and split into several passes."""
    model = with_random_lora(small_llama(), rank)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    rows = random_rows(groups, rows_per_group, nested=nested)
    runner = make_runner(model)
    assert runner.mode == "tree"
    alone = row_by_row_gradients(runner, rows)
    assert relative_distance(shared_gradients(runner, rows), alone) < 1e-5
    runner.tokens_per_pass = 100
    assert runner.run(rows, 1.0).passes > 1
    assert relative_distance(shared_gradients(runner, rows), alone) < 1e-5


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_unshared_modes_are_exact(mode):
    rows = random_rows(2, 4)
    runner = make_runner(with_random_lora(small_llama()), 700, share_prefix=False)
    assert runner.mode == "packed"
    if mode == "padded":
        use_padding(runner)
    assert relative_distance(shared_gradients(runner, rows), row_by_row_gradients(runner, rows)) < 1e-5


@pytest.mark.parametrize("mode", ["tree", "padded"])
def test_predictions_are_those_of_each_row_alone(mode):
    """In several passes, with equal rows and equal targets at shared positions."""
    model = with_random_lora(small_llama()).eval()
    rows = random_rows(2, 3)
    rows.append(rows[0])
    runner = make_runner(model, 200)
    if mode == "padded":
        use_padding(runner)
    assert runner.mode == mode
    for row, found in zip(rows, runner.predict(rows), strict=True):
        with torch.no_grad():
            logits = runner.causal_lm(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0]
        log_p = logits[torch.from_numpy(row.positions).long()].log_softmax(-1)
        own = log_p[torch.arange(len(row.targets)), torch.from_numpy(row.targets).long()]
        best, best_ids = log_p.max(-1)
        assert np.allclose(found.log_p, own, atol=1e-5) and np.allclose(found.best_log_p, best, atol=1e-5)
        assert found.best_ids.tolist() == best_ids.tolist()
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(
        -sum(one.log_p.sum() for one in runner.predict(rows)), rel=1e-5
    )


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (4, 4, 80), (3, 1, 128)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(700, 700, True), (1, 1, True), (600, 300, False)])
def test_bfloat16_gemm_matches_the_flash_kernel(heads, kv_heads, width, queries, keys, causal):
    """Gradients of both against float64. Scores reach 20, where bfloat16 has steps of 0.125."""

    def random(heads, tokens, spread=1.0):
        return (spread * torch.randn(2, heads, tokens, width)).bfloat16()

    torch.manual_seed(0)
    query, key = random(heads, queries, 2.0), random(kv_heads, keys, 2.0)
    value, upstream = random(kv_heads, keys), random(heads, queries)
    groups, scale = heads // kv_heads, width**-0.5
    repeated = [x.repeat_interleave(groups, 1) for x in (key, value)]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, *repeated, 0.0, causal, scale=scale)
    flash = attention.flash_grads(upstream, query, *repeated, output, lse, causal=causal, scale=scale)
    flash = [flash[0], *(x.double().unflatten(1, (kv_heads, groups)).sum(2) for x in flash[1:])]
    gemm = attention_gemm.block_grads(upstream, query, key, value, output, lse, causal=causal, scale=scale)

    exact = [x.double().requires_grad_() for x in (query, key, value)]
    k, v = (x.repeat_interleave(groups, 1) for x in exact[1:])
    result = torch.nn.functional.scaled_dot_product_attention(exact[0], k, v, is_causal=causal, scale=scale)
    expected = torch.autograd.grad(result, exact, upstream.double())
    for ours, theirs, wanted in zip(gemm, flash, expected, strict=True):
        distances = [(x - wanted).norm().item() for x in (ours, theirs)]
        # A sum over grouped heads is rounded once, by at most 1/512; it shows where the kernel is exact.
        assert distances[0] <= 2 * distances[1] + wanted.norm() / 512 + 1e-3
        assert distances[0] < 1e-2 * wanted.norm() + 1e-3


def test_bfloat16_error_is_within_rounding_noise():
    """The error of a shared step against float32 is not larger than that of rows alone or of padded batches."""
    model = with_random_lora(small_llama(torch.bfloat16))
    rows = random_rows(2, 6)
    runner = make_runner(model)
    alone, shared = row_by_row_gradients(runner, rows), shared_gradients(runner, rows)
    use_padding(runner)
    padded = shared_gradients(runner, rows)
    exact_model = with_random_lora(small_llama(torch.float32))
    exact_model.load_state_dict(model.state_dict())
    exact = row_by_row_gradients(make_runner(exact_model), rows)
    noise = max(relative_distance(alone, exact), relative_distance(padded, exact))
    assert relative_distance(shared, exact) < 1.5 * noise


def test_frozen_head_loss_equals_autograd():
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False)
    hidden = torch.randn(1300, 32, requires_grad=True)
    targets, weights = torch.randint(0, 500, (1300,)), torch.randint(1, 4, (1300,)).float()
    reference = torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets, reduction="none") @ weights
    gradients = []
    for trained in (False, True):
        head.weight.requires_grad_(trained)
        total = loss.head_loss(head, hidden, targets, weights)
        assert torch.allclose(total, reference, rtol=1e-6)
        gradients.append(torch.autograd.grad(total, hidden)[0])
    assert torch.allclose(*gradients, atol=1e-6)


def test_head_loss_applies_softcap_and_scale():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    total = loss.head_loss(head, hidden, targets, torch.ones(5), softcap=3.0, scale=0.5)
    logits = torch.tanh(head(hidden) * 0.5 / 3.0) * 3.0
    assert torch.allclose(total, torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize(("family", "options"), [("Qwen2", {"use_sliding_window": False}),
                                                 ("Mistral", {"sliding_window": None})])  # fmt: skip
def test_other_families_share_prefixes(family, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL_LLAMA, **options)
    runner = make_runner(with_random_lora(getattr(transformers, f"{family}ForCausalLM")(config)))
    assert runner.mode == "tree"
    rows = random_rows(2, 3)
    assert runner.run(rows, 1.0).loss_sum == pytest.approx(runner.reference_loss(rows), rel=1e-5)


def test_sliding_window_falls_back_to_padding():
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL_LLAMA, sliding_window=64))
    mode, reason, _ = runner_module.choose_mode(model, share_prefix=True)
    assert mode == "padded"
    assert "sliding_window" in reason
    assert model.config._attn_implementation != "sandwich_tree"


def test_out_of_memory_halves_passes_and_keeps_the_step(monkeypatch, caplog):
    rows = random_rows(1, 8)  # all share, so one pass holds them
    runner = make_runner(with_random_lora(small_llama()))
    expected = shared_gradients(runner, rows)
    hidden_states = runner.hidden_states

    def limited(pass_):
        if pass_.input_ids.size > 400:
            torch.empty(1 << 50)
        return hidden_states(pass_)

    monkeypatch.setattr(runner, "hidden_states", limited)
    actual = shared_gradients(runner, rows)
    assert runner.tokens_per_pass <= 400
    assert f"out of memory; continuing with {runner.tokens_per_pass} tokens per pass" in caplog.text
    assert relative_distance(actual, expected) < 1e-5


def test_other_errors_are_raised(monkeypatch):
    runner = make_runner(with_random_lora(small_llama()))
    monkeypatch.setattr(runner, "hidden_states", lambda pass_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run(random_rows(1, 1), 1.0)
