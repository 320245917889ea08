"""The fused LoRA layer computes what PEFT computes."""

import copy

import pytest

from tests.gradient_check import randomize_lora_b, relative_distance, small_llama
from tests.helpers import lazy

torch = lazy("torch")
lora_linear = lazy("finetune.models.lora_linear")
LAYERS, WIDTH = 2, 96


def lora_model(dropout=0.0, hidden_act="silu", target_modules="all-linear", **lora):
    from peft import LoraConfig, get_peft_model

    model = small_llama(
        seed=0, vocab_size=100, hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, attention_bias=True, hidden_act=hidden_act,
    )  # fmt: skip
    config = LoraConfig(r=8, lora_alpha=24, lora_dropout=dropout, target_modules=target_modules, **lora)
    return randomize_lora_b(get_peft_model(model, config), std=0.1)


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.arange(40).reshape(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("target_modules", ["all-linear", ["up_proj", "down_proj"]])
def test_loss_and_gradients_equal_peft(target_modules):
    """Also where no gradient reaches the gate of the first layer."""
    model = lora_model(target_modules=target_modules, use_rslora=True)
    loss, gradients = loss_and_gradients(model)
    assert lora_linear.fuse_lora_linears(model) == LAYERS * (7 if target_modules == "all-linear" else 2)
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_float32_adapters_on_bfloat16_under_autocast():
    """Fused under autocast only, and not less exact than PEFT."""
    exact = lora_model()
    # The numbers that the 16-bit models hold, so that only the arithmetic differs.
    for name, parameter in exact.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    _, expected = loss_and_gradients(exact)
    half = copy.deepcopy(exact)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, peft = loss_and_gradients(half)
    plain, _ = loss_and_gradients(half)

    assert lora_linear.fuse_lora_linears(half) == 7 * LAYERS
    assert loss_and_gradients(half)[0] == plain  # outside autocast the layers are PEFT's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, fused = loss_and_gradients(half)
    assert all(gradient.dtype == torch.float32 for gradient in fused.values())
    assert relative_distance(fused, peft) > 0  # they are really fused
    assert relative_distance(fused, expected) < 1.1 * relative_distance(peft, expected) < 0.05


def test_disabled_adapter_gives_the_base_model():
    model = lora_model()
    ids = torch.arange(10)[None]
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    lora_linear.fuse_lora_linears(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, base)


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_are_left_to_peft(lora):
    assert lora_linear.fuse_lora_linears(lora_model(**lora)) == 0


def saved_bytes(model):
    """Bytes of all tensors that autograd keeps of one forward pass of 80 tokens, except parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=torch.arange(80)[None])
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_gated_mlp_keeps_two_of_its_four_wide_tensors(monkeypatch):
    ungated = lora_model()
    monkeypatch.setattr("finetune.models.lora_linear._is_gated_mlp", lambda module: False)
    lora_linear.fuse_lora_linears(ungated)
    monkeypatch.undo()
    gated = lora_model()
    lora_linear.fuse_lora_linears(gated)
    assert saved_bytes(ungated) - saved_bytes(gated) == 2 * 80 * WIDTH * 4 * LAYERS  # float32


def test_mlp_with_another_activation_is_not_changed():
    model = lora_model(hidden_act="gelu")
    loss, _ = loss_and_gradients(model)
    lora_linear.fuse_lora_linears(model)
    assert all(m.forward.__func__ is type(m).forward for n, m in model.named_modules() if n.endswith(".mlp"))
    assert loss_and_gradients(model)[0] == pytest.approx(loss, rel=1e-6)
