"""The estimator against what it stands for: real modules, bitsandbytes, PEFT, autograd, recorded and published runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import plan_of, sizes_of
from finetune.errors import UserError
from finetune.memory import advice
from finetune.memory.estimate import (
    OPTIMIZERS,
    Plan,
    estimate,
    layer_bytes,
    measured_part,
    nf4_bytes,
    optimizer_bytes,
    total,
)
from finetune.memory.sizes import (
    Matrix,
    dense_sizes,
    sizes_of_billions,
    sizes_of_config,
    sizes_of_model,
    sizes_of_name,
)
from finetune.models.bundled import smollm2_dir
from finetune.models.lora_linear import fuse_lora_linears
from finetune.training import memory_plan

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
LLAMA3_8B = dense_sizes(4096, 14_336, 32, 32, 8, 128, 128_256, False)
LLAMA3_70B = dense_sizes(8192, 28_672, 80, 64, 8, 128, 128_256, False)
SMALL = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": {}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {}, "mistral": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "phi3": {}, "mixtral": MOE, "qwen3_moe": MOE, "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
}  # fmt: skip


def small_config(kind, **more):
    return AutoConfig.for_model(kind, **SMALL, **KINDS[kind], **more)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_count_every_parameter_of_every_architecture(kind):
    config = small_config(kind)
    model = AutoModelForCausalLM.from_config(config)
    sizes = sizes_of_config(config)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes == sizes_of_model(model)
    assert sizes.hidden == 64 and sizes.layers == 3 and sizes.query == 64
    assert sum(m.size for m in sizes.matrices) > 0.4 * sizes.parameters


def test_the_bundled_model_is_measured_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_bytes((smollm2_dir() / "config.json").read_bytes())
    sizes = sizes_of_name(str(tmp_path))
    assert sizes.parameters == 134_515_008 and sizes.head == 0 and sizes.key_value == 192
    assert sizes.norms == 2 and not sizes.qk_norm


def test_a_config_that_transformers_does_not_know_is_a_mistake_of_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper", "d_model": 64}', encoding="utf-8")
    with pytest.raises(UserError, match="model"):
        sizes_of_name(str(tmp_path))


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "t5", "bart"])
def test_a_model_that_reads_both_ways_is_no_model_to_measure(kind):
    with pytest.raises(UserError, match=f"model type '{kind}' is an encoder"):
        sizes_of_config(AutoConfig.for_model(kind))


def test_an_encoder_that_was_made_a_decoder_is_measured():
    assert sizes_of_config(AutoConfig.for_model("bert", is_decoder=True, num_hidden_layers=2)).layers == 2


def test_a_number_of_layers_that_is_a_slip_is_not_built(monkeypatch):
    """Building 100,000 layers takes minutes."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_: pytest.fail("was built"))
    config = small_config("llama")
    config.num_hidden_layers = 100_000
    with pytest.raises(UserError, match="num_hidden_layers 100000, more than any model has"):
        sizes_of_config(config)


@pytest.mark.parametrize(
    "billions", [0.05, 0.135, 0.5, 1.1, 1.5, 2.1, 3, 4, 7.0, 7.25, 8, 9, 13, 14.8, 27, 34, 70, 405]
)
def test_a_size_in_billions_becomes_a_model_of_that_size(billions):
    sizes = sizes_of_billions(billions)
    assert sizes.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert sizes.intermediate > sizes.hidden / 2 and sizes.layers >= 1


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_adapter_is_as_large_as_pefts(kind, targets):
    model = AutoModelForCausalLM.from_config(small_config(kind))
    sizes = sizes_of_model(model)
    names = sorted({m.name for m in sizes.adapted(targets)})
    options = {}
    if "gate_up_proj" in names:  # experts are parameters, not modules: what Unsloth hands to PEFT
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        names = [n for n in names if n not in ("gate_up_proj", "down_proj")]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, **options))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plan = Plan(tokens=8, rank=4, target_modules=targets)
    assert estimate(sizes, plan)["adapter"] == 4 * trained
    assert sizes_of_model(adapted) == sizes  # the adapter changes nothing about its base
    last = estimate(sizes, plan.but(last_layers=1))
    assert last["adapter"] == pytest.approx(4 * trained / 3) and last["gradients"] == last["adapter"]


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (576, 1536), (100, 70), (4096, 16), (1, 65)])
def test_nf4_takes_the_bytes_that_bitsandbytes_takes(inputs, outputs):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(outputs, inputs), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    weights, constants = nf4_bytes(Matrix("x", inputs, outputs, 1))
    assert weights == packed.numel() * packed.element_size()
    assert constants == sum(t.numel() * t.element_size() for t in tensors)


def test_nf4_costs_what_the_paper_says():
    """QLoRA, section 3: double quantisation brings the constants down to 0.127 bits a weight."""
    _, constants = nf4_bytes(Matrix("x", 4096, 4096, 1))
    assert 8 * constants / 4096**2 == pytest.approx(0.127, abs=0.001)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "adafactor", "rmsprop"])
def test_optimizer_states_are_those_of_the_optimizer(name):
    from transformers.optimization import Adafactor

    rank, matrix = 8, Matrix("x", 640, 320, 2)
    shapes = [(rank, 640), (320, rank)] * 2
    parameters = [torch.nn.Parameter(torch.randn(*s)) for s in shapes]
    make = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
            "rmsprop": torch.optim.RMSprop, "adafactor": Adafactor}[name]  # fmt: skip
    optimizer = make(parameters) if name == "adafactor" else make(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    assert optimizer_bytes(name, [matrix], rank) == sum(t.numel() * t.element_size() for t in held)


def test_eight_bit_states_as_bitsandbytes_makes_them():
    """A and B of 4,096 numbers or more in 8 bits with a float32 scale per 256, smaller ones in 32 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    rank, matrix = 8, Matrix("x", 640, 320, 1)
    parameters = [torch.nn.Parameter(torch.randn(rank, 640)), torch.nn.Parameter(torch.randn(320, rank))]
    optimizer = bnb.optim.AdamW8bit(parameters)
    optimizer.fill_qmap()
    for number, p in enumerate(parameters):
        p.grad = torch.zeros_like(p)
        optimizer.init_state(optimizer.param_groups[0], p, 0, number)
    held = [v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and "qmap" not in k]
    assert optimizer_bytes("adamw_8bit", [matrix], rank) == sum(t.numel() * t.element_size() for t in held)
    assert optimizer_bytes("paged_adamw_8bit", [matrix], rank) == 0
    large = [Matrix("x", 4096, 4096, 1)]  # both halves are quantised
    assert optimizer_bytes("adamw_8bit", large, rank) < 0.3 * optimizer_bytes("adamw_torch", large, rank)


@pytest.mark.parametrize("optim", [*OPTIMIZERS, "adafactor", "paged_adamw_32bit", "paged_lion_8bit"])
def test_every_known_optimizer_can_be_asked_for_in_transformers(optim):
    from transformers.training_args import OptimizerNames

    assert OptimizerNames(optim)
    assert optimizer_bytes(optim, [Matrix("x", 64, 64, 1)], 8) >= 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize(
    ("dtype", "fused", "dropout"),
    [
        ("float32", True, 0),
        ("bfloat16", True, 0),
        ("bfloat16", False, 0),
        ("float32", True, 0.1),
        ("bfloat16", True, 0.1),
    ],
)
def test_a_layer_keeps_the_bytes_that_autograd_saves(kind, dtype, fused, dropout):
    """What one more layer makes autograd save for the backward pass, on the path of a CPU run."""
    tokens, saved = 96, {}
    for layers in (2, 3):
        config = small_config(kind)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        # 4-bit layers, which are not fused, keep no input of theirs, and neither does a frozen linear layer.
        plan = Plan(tokens=tokens, rank=4, dtype=dtype, load_in_4bit=not fused, device="cpu", dropout=dropout)
        names = sorted({m.name for m in sizes_of_model(model).adapted()})
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, lora_dropout=dropout))
        model.train()
        if fused:
            fuse_lora_linears(model)
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept, alive = {}, []

        def pack(tensor, kept=kept, known=known, alive=alive):
            alive.append(tensor)
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            inner = model.get_base_model().model
            with runs_attention(model), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                inner(input_ids=torch.arange(tokens)[None] % 300, use_cache=False)
        saved[layers] = sum(kept.values())
        sizes = sizes_of_model(model)
    per_token = (saved[3] - saved[2]) / tokens
    assert layer_bytes(sizes, plan) == pytest.approx(per_token, rel=0.03)


def runs_attention(model):
    """The attention that saves least: PyTorch's own flash kernel, as the tree attention calls it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model.get_base_model().config._attn_implementation = "sdpa"
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


# --- against measurements ---------------------------------------------------------------------------------------------

RECORDS = [r for path in sorted(RESULTS.glob("*memory_*.json")) for r in json.loads(path.read_text(encoding="utf-8"))]
# On a CPU three constants were fitted to some of these records (docs/memory.md), so those guard against drift and the
# others test the fit; a GPU has not been measured, its 10% is the target.
TOLERANCE = {"cpu": 0.10, "cuda": 0.10}


def test_there_are_records():
    assert len([r for r in RECORDS if "failed" not in r]) >= 4


# Known to be foreseen too low: the heap's holes add up over fifty steps whose passes all differ in length.
TOO_LOW = pytest.mark.xfail(strict=True, reason="holes of the heap over many steps are not in the estimate")


@pytest.mark.parametrize(
    "record",
    [pytest.param(r, id=r["case"], marks=[TOO_LOW] if r["case"] == "demo_bf16" else []) for r in RECORDS
     if "failed" not in r],
)  # fmt: skip
def test_the_estimate_is_near_the_recorded_peak(record):
    plan = plan_of(record)
    predicted = measured_part(estimate(sizes_of(record), plan), plan.device) / 1e9
    assert predicted == pytest.approx(record["measured_gb"], rel=TOLERANCE[plan.device])


# Unsloth's own documentation (unsloth.ai/docs/basics/unsloth-benchmarks): the longest row that 4-bit LoRA of rank 32
# on all linear layers fits, one row in a pass. No measurement of ours, and the only check against a GPU there is yet.
UNSLOTH_LONGEST = [
    (LLAMA3_8B, 8, 2972), (LLAMA3_8B, 12, 21_848), (LLAMA3_8B, 16, 40_724), (LLAMA3_8B, 24, 78_475),
    (LLAMA3_8B, 40, 153_977), (LLAMA3_8B, 48, 191_728), (LLAMA3_8B, 80, 342_733), (LLAMA3_70B, 48, 12_106),
    (LLAMA3_70B, 80, 89_389),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "card", "tokens"), UNSLOTH_LONGEST)
def test_published_longest_rows_nearly_fill_their_cards(sizes, card, tokens):
    plan = Plan(tokens=tokens, longest=tokens, check_tokens=1, rank=32)  # their loop has no check before the first step
    assert 0.93 * card <= total(estimate(sizes, plan)) / 2**30 <= 1.0 * card


# --- advice -----------------------------------------------------------------------------------------------------------


def test_parts_move_as_they_should():
    base = Plan(tokens=4096, longest=2048)
    parts = estimate(LLAMA3_8B, base)
    assert all(size >= 0 and math.isfinite(size) for size in parts.values())
    assert estimate(LLAMA3_8B, base.but(load_in_4bit=False))["weights"] / parts["weights"] == pytest.approx(4, rel=0.01)
    assert estimate(LLAMA3_8B, base.but(load_in_4bit=False))["embeddings"] == parts["embeddings"]
    assert estimate(LLAMA3_8B, base.but(rank=32))["adapter"] == 2 * parts["adapter"]
    for change in (base.but(tokens=8192), base.but(gradient_checkpointing=False), base.but(optim="adamw_torch"),
                   base.but(load_in_4bit=False), base.but(rank=64)):  # fmt: skip
        assert total(estimate(LLAMA3_8B, change)) > total(parts)
    fewer = estimate(LLAMA3_8B, base.but(trained=64, check_tokens=1))
    assert fewer["loss"] < parts["loss"]  # only trained positions reach the lm_head


# What the described 12 GB system tells its users for 10, 12 and 16 GB: rank, rows, tokens.
@pytest.mark.parametrize(("card", "rank", "rows", "length"), [(10, 4, 1, 1024), (12, 8, 1, 2048), (16, 16, 2, 4096)])
def test_the_described_settings_fit_and_are_among_the_steps(card, rank, rows, length):
    mistral = dense_sizes(4096, 14_336, 32, 32, 8, 128, 32_000, False)
    plan = Plan(tokens=rows * length, longest=length, rank=rank, optim="paged_adamw_8bit")
    assert advice.needs(mistral, plan) <= advice.usable(card)
    assert (rank, length, rows) in advice.STEPS_UP
    suggested = advice.suggest(mistral, card, like=plan).plan
    assert suggested.tokens >= plan.tokens and suggested.rank >= rank  # never less than described


@pytest.mark.parametrize("billions", [0.5, 1.5, 3, 7, 14, 32, 70])
def test_suggestions_fit_their_card_and_grow_with_it(billions):
    sizes, before = sizes_of_billions(billions), {}
    for card in advice.CARDS_GB:
        one = advice.suggest(sizes, card)
        if one.plan is None:
            assert not before and one.peak > advice.usable(card)
            continue
        assert one.peak <= advice.usable(card)
        assert one.flags["batch_size"] * one.flags["grad_accum"] == 16  # the step stays what it is
        in_4bit = one.plan.load_in_4bit
        assert not (in_4bit and False in before)  # 16-bit weights once, 16-bit weights on every larger card
        assert (one.plan.tokens, one.plan.rank) >= before.get(in_4bit, (0, 0))
        before[in_4bit] = (one.plan.tokens, one.plan.rank)
    assert before


@pytest.mark.parametrize("card", [6, 8, 12, 24])
def test_the_largest_length_and_batch_fit_and_one_more_does_not(card):
    plan, capacity = Plan(tokens=2048, longest=2048), advice.usable(card)
    length = advice.largest_length(LLAMA3_8B, plan, capacity)
    rows = advice.largest_batch(LLAMA3_8B, plan, capacity)
    if card == 6:
        assert length == rows == 0
        return
    at = advice.needs(LLAMA3_8B, plan.but(tokens=length, longest=length))
    assert at <= capacity < advice.needs(LLAMA3_8B, plan.but(tokens=length + 1, longest=length + 1))
    assert advice.needs(LLAMA3_8B, plan.but(tokens=rows * 2048)) <= capacity
    assert advice.needs(LLAMA3_8B, plan.but(tokens=(rows + 1) * 2048)) > capacity


@pytest.mark.parametrize("rows", [1, 3])
def test_the_largest_length_and_batch_train_the_share_that_the_plan_does(rows):
    """Else a plan that fits would be told that the largest batch is smaller than its own."""
    plan = Plan(tokens=2048 * rows, longest=2048, trained=204 * rows)
    capacity = advice.needs(LLAMA3_8B, plan)
    assert advice.largest_length(LLAMA3_8B, plan, capacity, rows) in (2048, 2049)  # of one token more none is trained
    assert advice.largest_batch(LLAMA3_8B, plan, capacity) == rows


@pytest.mark.parametrize("billions", [0.002, 0.1, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_saving_saves_and_every_luxury_costs(billions, device):
    sizes = sizes_of_billions(billions)
    for last_layers in (None, 1):
        for in_4bit in (False, True):
            plan = Plan(tokens=4096, longest=1024, trained=100, device=device, last_layers=last_layers,
                        load_in_4bit=in_4bit, gradient_checkpointing=in_4bit)  # fmt: skip
            peak = advice.needs(sizes, plan)
            assert all(advice.needs(sizes, change.plan) < peak for change in advice.savings(sizes, plan))
            assert all(advice.needs(sizes, change.plan) > peak for change in advice.luxuries(sizes, plan))


@pytest.mark.parametrize("step_rows", [1, 3, 6, 17])
def test_a_suggestion_keeps_the_rows_of_a_step(step_rows):
    for card in advice.CARDS_GB:
        one = advice.suggest(LLAMA3_8B, card, step_rows=step_rows)
        assert one.plan is None or one.flags["batch_size"] * one.flags["grad_accum"] == step_rows


def test_what_is_too_large_is_made_to_fit_with_the_harmless_changes_first():
    plan = Plan(tokens=16 * 8192, longest=8192, rank=64, load_in_4bit=False, gradient_checkpointing=False)
    fitting = advice.make_fit(LLAMA3_8B, plan, advice.usable(24))
    assert fitting.fits and fitting.peak <= advice.usable(24)
    assert fitting.changes[0].what == "smaller passes"
    assert fitting.plan.rank == 64 and fitting.plan.longest == 8192  # nothing that changes the result was needed
    hopeless = advice.make_fit(LLAMA3_70B, plan, advice.usable(8))
    assert not hopeless.fits and hopeless.peak > advice.usable(8)


def test_every_suggested_flag_is_a_flag_of_train_lora():
    from finetune import settings

    plan = Plan(tokens=4096, longest=2048, load_in_4bit=False, gradient_checkpointing=False)
    changes = [*advice.savings(LLAMA3_8B, plan), *advice.luxuries(LLAMA3_8B, plan.but(load_in_4bit=True)),
               *advice.luxuries(LLAMA3_8B, plan.but(gradient_checkpointing=True))]  # fmt: skip
    flags = [change.flags for change in changes] + [advice.suggest(LLAMA3_8B, 24).flags]
    assert len(flags) > 10
    for one in flags:
        parsed = settings.parse(advice.flag_words(one).split())
        assert {name: getattr(parsed, name) for name in one} == one


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_run_counts_shared_prefixes_once():
    from finetune import settings
    from finetune.passes.plan import CPU_TARGET_TOKENS

    prefix, rows = list(range(400)), []
    for number in range(8):
        ids = prefix + [1000 + number] * 50
        rows.append((ids, [-100] * 440 + ids[440:]))
    flags = settings.parse(["--batch_size", "8", "--grad_accum", "1"])
    plan = memory_plan.plan_of_run(
        flags, dtype="float32", load_in_4bit=False, gradient_checkpointing=False, device="cpu"
    )
    shared = memory_plan.with_rows(plan, flags, rows, 10_000)
    assert 400 + 8 * 49 <= shared.tokens <= 400 + 8 * 50 and shared.trained == 80
    flags.share_prefix = False
    assert memory_plan.with_rows(plan.but(device="cuda"), flags, rows, 10_000).tokens > 3500
    # On a CPU a full pass takes no row that shares nothing with it.
    assert CPU_TARGET_TOKENS <= memory_plan.with_rows(plan, flags, rows, 10_000).tokens < CPU_TARGET_TOKENS + 450
    assert memory_plan.with_rows(plan, flags, rows, 600).tokens <= 600  # one row in a pass


def test_a_budget_per_pass_stays_within_the_free_memory(monkeypatch):
    sizes, plan = sizes_of_billions(1.5), Plan(tokens=1)
    budgets = []
    for free in (4e9, 8e9, 16e9, 200e9):
        monkeypatch.setattr(memory_plan, "free_memory", lambda free=free: free)
        budgets.append(memory_plan.default_tokens_per_pass(sizes, plan, loaded=False))
    assert budgets == sorted(budgets) and budgets[0] < budgets[-1] == memory_plan.MOST_TOKENS
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 8e9)
    assert memory_plan.default_tokens_per_pass(sizes, plan, loaded=True) > budgets[1]  # the weights are there already
    assert memory_plan.default_tokens_per_pass(sizes, plan.but(optim="wonder"), loaded=True) > 0


def test_a_prediction_never_stops_a_run():
    entry = memory_plan.prediction(LLAMA3_8B, Plan(tokens=64, optim="wonder"))
    assert entry["predicted_gb"] is None and "wonder" in entry["reason"]
    entry = memory_plan.prediction(LLAMA3_8B, Plan(tokens=64))
    assert entry["predicted_gb"] == pytest.approx(sum(entry["parts"].values()) - entry["parts"]["context"], abs=0.01)
    assert plan_of(entry) == Plan(tokens=64)


def test_on_a_cpu_a_pass_is_no_larger_than_an_ordinary_micro_batch(monkeypatch):
    from finetune import settings

    monkeypatch.setattr(memory_plan, "free_memory", lambda: 200e9)
    sizes, rows = sizes_of_billions(0.5), [([1] * length, [1] * length) for length in (30, 900)]

    def budget(device, *words):
        plan = Plan(tokens=1, device=device, load_in_4bit=False)
        return memory_plan.tokens_of_a_pass(settings.parse(list(words)), sizes, plan, rows, loaded=False)

    assert budget("cpu", "--batch_size", "8") == 8 * 900
    assert budget("cpu", "--batch_size", "1") == 4 * 900
    assert budget("cpu", "--batch_size", "8", "--tokens_per_pass", "100000") == 100_000
    assert budget("cuda", "--batch_size", "8") == memory_plan.MOST_TOKENS
