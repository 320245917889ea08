"""A 4-bit base that is dequantized once trains with the numbers of QLoRA."""

import pytest

from finetune.errors import UserError
from finetune.models.dequantize import dequantize
from tests.gradient_check import (
    random_rows,
    relative_distance,
    row_by_row_gradients,
    small_llama,
    with_random_lora,
)
from tests.helpers import lazy

torch = lazy("torch")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base model, adapter with non-zero B) on disk."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
             "num_attention_heads": 4, "attention_bias": True}  # fmt: skip
    model = small_llama(**sizes)
    model.save_pretrained(base)
    with_random_lora(model).save_pretrained(adapter)
    return base, adapter


def load_in_4bit(base, dtype):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=dtype)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="cpu", quantization_config=config)
    for module in model.modules():
        # On a CPU with bfloat16 hardware bitsandbytes packs the weights for inference, and they cannot be trained
        # through. Unsloth, which loads them in a run, turns this off in the same way.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_loss_and_gradients_equal_qlora(folders, dtype, tolerance):
    from peft import PeftModel

    from finetune.models.lora_linear import fuse_lora_linears
    from finetune.passes.runner import PassRunner

    base, adapter = folders
    rows = random_rows(2, 3)
    results = []
    for once in (False, True):
        model = load_in_4bit(base, getattr(torch, dtype))
        if once:
            assert dequantize(model, free_bytes=1e9) == 2 * 7
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True).to(getattr(torch, dtype))
        kinds = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "base_layer")}
        assert kinds == ({"Linear"} if once else {"Linear4bit"})
        if once and dtype == "float32":
            assert fuse_lora_linears(model) == 2 * 7  # plain layers can be fused
        runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
        results.append((runner.reference_loss(rows), row_by_row_gradients(runner, rows)))
    (loss, gradients), (dequantized_loss, dequantized_gradients) = results
    assert dequantized_loss == pytest.approx(loss, rel=tolerance)
    assert relative_distance(dequantized_gradients, gradients) < tolerance


def test_too_little_memory_is_refused(folders):
    with pytest.raises(UserError, match=r"dequantized weights take .* GB"):
        dequantize(load_in_4bit(folders[0], torch.float32), free_bytes=1000)


def test_base_that_is_not_4bit_is_refused():
    with pytest.raises(UserError, match="no 4-bit layers"):
        dequantize(small_llama(), free_bytes=1e9)
