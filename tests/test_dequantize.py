"""A 4-bit base unpacked once trains with the very numbers of QLoRA."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from finetune.errors import UserError
from finetune.models.dequantize import dequantize
from finetune.models.lora_linear import fuse_lora_linears
from finetune.passes.runner import PassRunner
from tests.test_shared_prefix import SMALL, adapted, difference, gradients, row_by_row, some_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a small base, an adapter that does something) on disk."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    sizes = SMALL | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
                     "num_attention_heads": 4}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    model.save_pretrained(base)
    adapted(model).save_pretrained(adapter)
    return base, adapter


def four_bit(base, dtype):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=dtype)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="cpu", quantization_config=config)
    for module in model.modules():
        # On a CPU with bfloat16 products bitsandbytes packs weights for inference, and nothing can be trained through
        # them then. Unsloth, which loads them in a run, turns that off in the same way.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_losses_and_gradients_are_those_of_qlora(folders, dtype, tolerance):
    base, adapter = folders
    rows = some_rows(2, 3)
    scale = 1 / sum(len(row.positions) for row in rows)
    results = []
    for unpack in (False, True):
        model = four_bit(base, dtype)
        if unpack:
            assert dequantize(model, free=1e9) == 2 * 7
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True).to(dtype)
        kinds = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "base_layer")}
        assert kinds == ({"Linear"} if unpack else {"Linear4bit"})
        if unpack and dtype == torch.float32:
            assert fuse_lora_linears(model) == 2 * 7  # plain layers take the fused path
        runner = PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
        results.append((runner.reference_loss(rows), gradients(model, row_by_row(runner, rows, scale))))
    (loss, grads), (unpacked_loss, unpacked_grads) = results
    assert unpacked_loss == pytest.approx(loss, rel=tolerance)
    assert difference(unpacked_grads, grads) < tolerance


def test_too_little_memory_is_said_beforehand(folders):
    with pytest.raises(UserError, match=r"unpacked weights take .* GB"):
        dequantize(four_bit(folders[0], torch.float32), free=1000)


def test_a_base_that_is_not_4_bit_is_refused():
    with pytest.raises(UserError, match="no 4-bit layers"):
        dequantize(LlamaForCausalLM(LlamaConfig(**SMALL)), free=1e9)
