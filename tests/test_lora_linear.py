"""The fused LoRA layer computes what PEFT computes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.models import lora_linear
from finetune.models.lora_linear import fuse_lora_linears


def tiny(dropout=0.0, hidden_act="silu", **lora):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, hidden_act=hidden_act,
    )  # fmt: skip
    lora_config = LoraConfig(r=8, lora_alpha=24, lora_dropout=dropout, target_modules="all-linear", **lora)
    model = get_peft_model(LlamaForCausalLM(config), lora_config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.arange(40).reshape(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_are_those_of_peft(rslora):
    model = tiny(use_rslora=rslora)
    loss, gradients = loss_and_gradients(model)
    assert fuse_lora_linears(model) == 14
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_float32_adapters_over_bfloat16_are_fused_under_autocast_and_no_coarser_than_peft():
    exact = tiny()
    # The numbers that the 16-bit models hold, so that only the arithmetic differs.
    for name, parameter in exact.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    _, wanted = loss_and_gradients(exact)
    half = copy.deepcopy(exact)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, peft = loss_and_gradients(half)
    plain, _ = loss_and_gradients(half)

    assert fuse_lora_linears(half) == 14
    assert loss_and_gradients(half)[0] == plain  # outside autocast the layers are PEFT's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, fused = loss_and_gradients(half)

    def distance(a, b):
        return sum((a[name] - b[name]).norm() ** 2 for name in wanted) ** 0.5

    size = sum(wanted[name].norm() ** 2 for name in wanted) ** 0.5
    assert all(gradient.dtype == torch.float32 for gradient in fused.values())
    assert distance(fused, peft) > 0  # they are really fused
    assert distance(fused, wanted) < 1.1 * distance(peft, wanted) < 0.05 * size


def test_disabling_the_adapter_still_gives_the_base_model():
    model = tiny()
    ids = torch.arange(10)[None]
    with model.disable_adapter(), torch.no_grad():
        wanted = model(input_ids=ids).logits
    fuse_lora_linears(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}])
def test_layers_with_dropout_or_dora_are_left_to_peft(lora):
    assert fuse_lora_linears(tiny(**lora)) == 0


def saved_bytes(model):
    """Bytes of all tensors that autograd keeps of one forward pass of 80 tokens, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=torch.arange(80)[None])
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_a_gated_mlp_keeps_two_of_its_four_wide_tensors(monkeypatch):
    whole = tiny()
    monkeypatch.setattr(lora_linear, "_is_gated", lambda module: False)
    fuse_lora_linears(whole)
    monkeypatch.undo()
    gated = tiny()
    fuse_lora_linears(gated)
    assert saved_bytes(whole) - saved_bytes(gated) == 2 * 80 * 96 * 4 * 2  # of 2 layers, 96 wide, in float32


def test_another_activation_is_left_alone():
    model = tiny(hidden_act="gelu")
    loss, _ = loss_and_gradients(model)
    fuse_lora_linears(model)
    assert all(m.forward.__func__ is type(m).forward for n, m in model.named_modules() if n.endswith(".mlp"))
    assert loss_and_gradients(model)[0] == pytest.approx(loss, rel=1e-6)
