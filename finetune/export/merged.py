"""Base and adapter folded into one model in ordinary safetensors, and the proof that it answers as the adapter does."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.adapter import attach_adapter
from finetune.runs.find import Run

TAIL = 64  # positions compared at the end of each prompt
LONGEST = 1024  # tokens of a prompt that are read
# A merge may differ from its adapter by rounding: this much, plus this part of what the adapter changed.
ROUNDING_NATS, PART_OF_CHANGE = 5e-3, 0.05


@dataclass
class Made:
    """What `export_merged` wrote: the saved model itself, its tokenizer, the format as served, and the check."""

    model: Any
    tokenizer: Any
    format: Any
    prompts: list[list[int]]
    agreement: Agreement


@dataclass
class Agreement:
    """How far a saved model is from base + adapter, over the last positions of some prompts.

    kl           mean Kullback-Leibler divergence, nats: sum p log(p / q), p of the adapter, q of the saved model
    kl_of_base   the same with the base model as q: how much there is to lose
    max_logprob  largest difference of log-probabilities among the adapter's ten likeliest tokens, nats
    same_top     part of the positions whose likeliest token is the same
    """

    prompts: int
    positions: int
    kl: float
    kl_of_base: float
    max_logprob: float
    same_top: float

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.kl) and self.kl <= ROUNDING_NATS + PART_OF_CHANGE * self.kl_of_base

    def __str__(self) -> str:
        return (
            f"merged against adapter over {self.positions} positions of {self.prompts} prompts: KL {self.kl:.2g} nats "
            f"(base: {self.kl_of_base:.2g}), log-probabilities differ by {self.max_logprob:.2g} at most, "
            f"likeliest token the same at {self.same_top:.1%}"
        )


def trained_template(run: Run, fmt: Any) -> str:
    """The chat template as it was saved beside the adapter, else the format's own with its variables pinned."""
    saved = run.adapter / "chat_template.jinja" if run.adapter else None
    finished = saved is not None and not saved.parent.name.startswith("checkpoint-")
    return saved.read_text(encoding="utf-8") if finished and saved.is_file() else fmt.pinned_template()


def served_format(run: Run, fmt: Any) -> Any:
    """The format with the template that was trained, which needs no variables any more."""
    return replace(fmt, template=trained_template(run, fmt), template_kwargs={})


def check_prompts(run: Run, tokenizer: Any, fmt: Any, count: int = 4) -> list[list[int]]:
    """Ids of whole conversations, answers included: the run's own data where it can be read, else two of ours."""
    from formats import encode

    prompts = []
    for conversation in conversations_of(run, count):
        prompts += [sequence.input_ids[-LONGEST:] for sequence in encode(conversation, tokenizer, fmt).sequences[-1:]]
    return prompts[:count]


def conversations_of(run: Run, count: int) -> list[dict[str, Any]]:
    """The first conversations of the run's data, as far as they can be read, and two of ours behind them."""
    from finetune.reading.conversations import load_conversations

    conversations = []
    if run.experiment is not None:
        flags = run.experiment.config["flags"]
        # The data may have moved, or the Hub be out of reach: the check does without.
        with contextlib.suppress(UserError, OSError):
            conversations = load_conversations(flags["dataset"], limit=count, strict=False).conversations[:count]
    return [*conversations, *_OWN]


_OWN = (
    {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]},
    {
        "messages": [
            {"role": "user", "content": "What is 17 times 3? Answer in one sentence."},
            {"role": "assistant", "content": "Seventeen times three is fifty-one."},
        ]
    },
)


def log_probabilities(model: Any, prompts: list[list[int]]) -> list[Any]:
    """log-softmax in float32 of the last TAIL positions of each prompt, each (positions, vocabulary), on the CPU."""
    import torch

    device = model.get_input_embeddings().weight.device
    rows = []
    with torch.inference_mode():
        for ids in prompts:
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -TAIL:]
            rows.append(logits.float().log_softmax(-1).cpu())
    return rows


def compare(adapter: list[Any], base: list[Any], saved: list[Any]) -> Agreement:
    """Agreement of three lists of `log_probabilities` over the same prompts."""
    import torch

    p, r, q = (torch.cat([row[:, : adapter[0].shape[1]] for row in rows]) for rows in (adapter, base, saved))
    top = p.topk(10, dim=-1).indices
    return Agreement(
        prompts=len(adapter),
        positions=len(p),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        kl_of_base=float((p.exp() * (p - r)).sum(-1).mean()),
        max_logprob=float((p.gather(1, top) - q.gather(1, top)).abs().max()),
        same_top=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    )


def export_merged(run: Run, folder: Path, dtype: str = "auto", say: Any = print) -> Made:
    """Write the merged model, its tokenizer, template and generation config into `folder`, and check them.

    dtype   "bfloat16", "float16", "float32", or "auto": the run's own when it has 16 bits, else bfloat16
    A base that was trained in 4 bits is loaded in 4 bits and dequantised, so that the adapter meets the very weights
    it was trained on. Raises UserError when the saved model does not answer as base and adapter do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.runs.saving import generation_config
    from formats import check_tokenizer

    loaded, fmt = run.load_base()
    if dtype == "auto":
        dtype = loaded.dtype if loaded.dtype in ("bfloat16", "float16") else "bfloat16"
    model, tokenizer = loaded.model, loaded.tokenizer
    if loaded.load_in_4bit:
        say("the base was trained in 4 bits: the adapter is merged into those same weights, dequantised")
        model = dequantised(model)
    model.eval()
    fmt = served_format(run, fmt)
    prompts = check_prompts(run, tokenizer, fmt)
    base = log_probabilities(model, prompts)
    adapted = base
    if run.adapter is not None:
        model = attach_adapter(model, run.adapter)
        model.eval()
        adapted = log_probabilities(model, prompts)
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # numbers that are none
            raise UserError(f"{run.adapter} cannot be merged: {error}") from error
    ends = check_tokenizer(tokenizer, fmt)
    model.generation_config = generation_config(model, ends)
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.chat_template = fmt.template
    tokenizer.save_pretrained(str(folder))
    del model, loaded
    gc.collect()

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    agreement = compare(adapted, base, log_probabilities(saved, prompts))
    say(str(agreement))
    if not agreement.agrees:
        raise UserError(
            f"the merged model in {dtype} does not answer as the adapter does ({agreement}); try --dtype float32, "
            "and report it if that does not help"
        )
    check_files(folder, fmt.template, ends)
    return Made(saved, tokenizer, fmt, prompts, agreement)


def check_files(folder: Path, template: str, ends: list[int]) -> None:
    """UserError unless the folder holds the trained template and stops at every end of turn of the format."""
    written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    known = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    if written != template:
        raise UserError(f"{folder}/chat_template.jinja is not the template that was trained; report this")
    if missing := set(ends) - set(known if isinstance(known, list) else [known]):
        raise UserError(f"{folder}/generation_config.json does not stop at the ids {sorted(missing)}; report this")


def dequantised(model: Any) -> Any:
    """A 4-bit (bitsandbytes) model with ordinary linear layers that hold the same numbers, in the compute dtype."""
    model = model.dequantize()
    model.is_loaded_in_4bit = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model
