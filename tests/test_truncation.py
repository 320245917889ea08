"""An adapter at smaller ranks: best approximation, equality at its own rank, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import UserError
from tests.helpers import lazy

torch = lazy("torch")
peft = lazy("peft")
truncation = lazy("finetune.models.truncation")


def adapted(**options):
    """A PeftModel with random LoRA weights on two linear layers and an embedding."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(20, 12),
            "wide": torch.nn.Linear(12, 30, bias=False),
            "tall": torch.nn.Linear(30, 5, bias=False),
        }
    )
    model.forward = lambda ids: model["tall"](model["wide"](model["embed"](ids)).tanh())
    settings = {"r": 8, "lora_alpha": 24, "target_modules": ["embed", "wide", "tall"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options)).eval()


def updates_of(model) -> dict:
    """Each layer's whole update as PEFT itself computes it."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer)}
    return {name: layer.get_delta_weight("default").detach().clone() for name, layer in layers.items()}


PATTERNS = {"rank_pattern": {"wide": 3}, "alpha_pattern": {"wide": 50, "tall": 1}}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_matrix_of_that_rank_is_closer(rank, options):
    """Eckart and Young: the squared error is the sum of the squares of the singular values that are cut off."""
    model = adapted(**options)
    whole = updates_of(model)
    with truncation.TruncatableAdapter(model).at_rank(rank):
        cut = updates_of(model)
    for name, update in whole.items():
        values = torch.linalg.svdvals(update.double())
        assert torch.linalg.matrix_rank(cut[name].double(), rtol=1e-5) <= rank
        torch.testing.assert_close(
            (update - cut[name]).double().pow(2).sum(), values[rank:].pow(2).sum(), rtol=1e-4, atol=1e-6
        )
    for name, update in updates_of(model).items():
        assert torch.equal(update, whole[name]), "the adapter's own weights are back"


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_tensors_have_the_scale_inside(rank, options):
    """b @ a of the new tensors is the update at that rank; at the adapter's own rank the update itself."""
    model = adapted(**options)
    adapter = truncation.TruncatableAdapter(model)
    tensors = adapter.tensors(rank)
    with adapter.at_rank(rank):
        expected = updates_of(model)
    for update in adapter.updates:
        a, b = (tensors[key] for key in update.keys)
        name = update.keys[0].partition(".lora_")[0]
        assert len(a) == b.shape[1] == rank
        product = (b @ a).T if "embedding" in update.keys[0] else b @ a
        torch.testing.assert_close(product, expected[name], rtol=1e-4, atol=1e-4)


def test_same_as_pefts_own_conversion():
    """PEFT decomposes the full matrix of each linear layer."""
    model = adapted(target_modules=["wide", "tall"])
    adapter = truncation.TruncatableAdapter(model)
    with pytest.warns(UserWarning, match="already a LoRA"):
        _, theirs = peft.convert_to_lora(model, rank=3)
    ours = adapter.tensors(3)
    assert ours.keys() == theirs.keys()
    for update in adapter.updates:
        a, b = update.keys
        torch.testing.assert_close(ours[b] @ ours[a], theirs[b] @ theirs[a], rtol=1e-3, atol=1e-4)


def test_spectra_and_energy():
    model = adapted()
    whole = updates_of(model)
    spectra = truncation.adapter_spectra(model)
    for values, update in zip(spectra, whole.values(), strict=True):
        np.testing.assert_allclose(values, torch.linalg.svdvals(update)[: len(values)], rtol=1e-3, atol=1e-3)
    assert [len(values) for values in spectra] == [8, 8, 5]  # the last layer has five outputs
    total = sum(float(update.pow(2).sum()) for update in whole.values())
    kept = sum(float((values[:2] ** 2).sum()) for values in spectra)
    assert truncation.energy_share(spectra, 2) == pytest.approx(kept / total, rel=1e-5)
    assert truncation.energy_share(spectra, 8) == pytest.approx(1)


def test_rank_use_of_an_adapter_of_rank_two():
    """An adapter of rank 8 whose updates have rank 2 says so; an untrained one uses nothing."""
    model = adapted(target_modules=["wide", "tall"])
    for update in truncation.lora_updates(model):
        update.a.data[2:] = 0
    assert truncation.rank_use(model) == {"rank": 8, "energy": {"2": 1.0, "4": 1.0}, "rank_of_99_percent": 2}
    for update in truncation.lora_updates(model):
        update.b.data.zero_()
    assert truncation.rank_use(model) == {"rank": 8, "energy": {"2": 1.0, "4": 1.0}, "rank_of_99_percent": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True, "target_modules": ["wide"]}, "layer base_model.model.wide uses DoRA"),
        ({"lora_bias": True, "target_modules": ["wide"]}, "lora_bias"),
        ({"init_lora_weights": "pissa", "target_modules": ["wide"]}, "initialized with pissa"),
    ],
    ids=["dora", "bias", "pissa"],
)
def test_refused_by_name(options, reason):
    with pytest.raises(UserError, match=reason):
        truncation.TruncatableAdapter(adapted(**options))


def test_weights_that_are_not_finite():
    model = adapted()
    truncation.lora_updates(model)[1].b.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"not finite \(base_model.model.wide.lora_A.weight\)"):
        truncation.adapter_spectra(model)


def test_fully_trained_modules_are_kept():
    """modules_to_save are no part of the rank: their tensors stay, the LoRA matrices become smaller."""
    model = adapted(target_modules=["wide"], modules_to_save=["tall"])
    adapter = truncation.TruncatableAdapter(model)
    assert [update.keys[0] for update in adapter.updates] == ["base_model.model.wide.lora_A.weight"]
    state = peft.get_peft_model_state_dict(model) | adapter.tensors(2)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {
        "base_model.model.wide.lora_A.weight": (2, 12),
        "base_model.model.wide.lora_B.weight": (30, 2),
        "base_model.model.tall.weight": (5, 30),
    }
