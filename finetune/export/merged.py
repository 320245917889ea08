"""Base and adapter merged into one model in safetensors, and a check that it answers as the adapter does."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.export.targets import Job, target
from finetune.models.adapter import attach_adapter
from finetune.models.remote_code import has_own_code, strip_code
from finetune.progress import say
from finetune.runs.find import Run
from formats import Format

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPARED_POSITIONS = 64  # at the end of each prompt
MAX_PROMPT_TOKENS = 1024
# Allowed KL between merged model and adapter: a constant, plus a share of the KL between base and adapter.
MAX_KL_NATS, MAX_KL_SHARE_OF_BASE = 5e-3, 0.05
# Compared after the conversations of the run's data, or alone where these cannot be read.
BUILTIN_CONVERSATIONS = (
    {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]},
    {
        "messages": [
            {"role": "user", "content": "What is 17 times 3? Answer in one sentence."},
            {"role": "assistant", "content": "Seventeen times three is fifty-one."},
        ]
    },
)


@dataclass
class MergedModel:
    """What `write_merged` wrote: the saved model, its tokenizer and its format, whose template needs no variables."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    format: Format


@dataclass
class Agreement:
    """How far a saved model is from base + adapter, over the last positions of some prompts.

    kl           mean Kullback-Leibler divergence in nats: sum p log(p / q), p of the adapter, q of the saved model
    kl_of_base   the same with the base model as q
    max_logprob  largest difference of log-probabilities in nats among the adapter's ten likeliest tokens
    same_top     share of the positions with the same likeliest token
    """

    prompts: int
    positions: int
    kl: float
    kl_of_base: float
    max_logprob: float
    same_top: float

    @property
    def is_close(self) -> bool:
        return math.isfinite(self.kl) and self.kl <= MAX_KL_NATS + MAX_KL_SHARE_OF_BASE * self.kl_of_base

    def __str__(self) -> str:
        return (
            f"merged against adapter over {self.positions} positions of {self.prompts} prompts: KL {self.kl:.2g} nats "
            f"(base: {self.kl_of_base:.2g}), log-probabilities differ by <= {self.max_logprob:.2g}, "
            f"same likeliest token at {self.same_top:.1%}"
        )


@target("merged", marker="generation_config.json", help="safetensors in 16 bits for any server")
def export_merged(job: Job) -> None:
    write_merged(job.run, job.folder, job.dtype)


def write_merged(run: Run, folder: Path, dtype: str = "auto") -> MergedModel:
    """Write the merged model, its tokenizer, template and generation config into `folder`, and check them.

    dtype   "bfloat16", "float16", "float32", or "auto": the run's own when it has 16 bits, else bfloat16
    A base that was trained in 4 bits is loaded in 4 bits and dequantised, so that the adapter is merged into the
    weights it was trained on. Raises UserError when the saved model does not answer as base and adapter do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.runs.saving import generation_config, with_format
    from formats import check_tokenizer

    loaded, fmt = run.load_base()
    if has_own_code(loaded.model):
        raise UserError(
            f"model {loaded.name} runs code of its own repository, which exports omit; use --to vllm with the adapter"
        )
    if dtype == "auto":
        dtype = loaded.dtype if loaded.dtype in ("bfloat16", "float16") else "bfloat16"
    torch_dtype = getattr(torch, dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    if loaded.load_in_4bit:
        say("the base was trained in 4 bits: the adapter is merged into the same weights, dequantised")
        model = dequantize(model)
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
        except ValueError as error:  # weights that are not finite
            raise UserError(f"{run.adapter} cannot be merged: {error}") from error
    ends = check_tokenizer(tokenizer, fmt)
    model.generation_config = generation_config(model, ends)
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.to(torch_dtype)
    model.config.dtype = torch_dtype
    model.save_pretrained(str(folder), safe_serialization=True)
    saved_tokenizer = with_format(tokenizer, fmt)
    saved_tokenizer.chat_template = tokenizer.chat_template = fmt.template
    saved_tokenizer.save_pretrained(str(folder))
    strip_code(folder)
    del model, loaded
    gc.collect()

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, trust_remote_code=False).eval()
    agreement = measure_agreement(adapted, base, log_probabilities(saved, prompts))
    say(str(agreement))
    if not agreement.is_close:
        raise UserError(
            f"the merged model in {dtype} does not answer as the adapter does ({agreement}); try --dtype float32, "
            "and report it if that does not help"
        )
    check_files(folder, fmt.template, ends)
    return MergedModel(saved, tokenizer, fmt)


def trained_template(run: Run, fmt: Format) -> str:
    """The chat template saved beside the adapter, else the format's own with its variables pinned."""
    if run.adapter is not None and not run.adapter.name.startswith("checkpoint-"):
        saved = run.adapter / "chat_template.jinja"
        if saved.is_file():
            return saved.read_text(encoding="utf-8")
    return fmt.pinned_template()


def served_format(run: Run, fmt: Format) -> Format:
    """The format with the template used in training, whose variables are pinned."""
    return replace(fmt, template=trained_template(run, fmt), template_kwargs={})


def check_prompts(run: Run, tokenizer: PreTrainedTokenizerBase, fmt: Format, count: int = 4) -> list[list[int]]:
    """Ids of complete conversations, answers included."""
    from formats import encode

    prompts = []
    for conversation in conversations_of(run, count):
        sequences = encode(conversation, tokenizer, fmt).sequences
        prompts += [sequence.input_ids[-MAX_PROMPT_TOKENS:] for sequence in sequences[-1:]]
    return prompts[:count]


def conversations_of(run: Run, count: int) -> list[dict[str, Any]]:
    """The first `count` conversations of the run's data, where it can be read, and `BUILTIN_CONVERSATIONS`."""
    from finetune.reading.conversations import load_conversations

    conversations: list[dict[str, Any]] = []
    if run.experiment is not None:
        # The data may have moved, or the Hub may be out of reach.
        with contextlib.suppress(UserError, OSError):
            dataset = run.experiment.config["flags"]["dataset"]
            conversations += load_conversations(dataset, limit=count, strict=False).conversations[:count]
    return [*conversations, *BUILTIN_CONVERSATIONS]


def log_probabilities(model: PreTrainedModel, prompts: list[list[int]]) -> list[Tensor]:
    """float32 log-softmax of the last COMPARED_POSITIONS of each prompt, each (positions, vocabulary), on the CPU."""
    import torch

    device = model.get_input_embeddings().weight.device
    rows = []
    with torch.inference_mode():
        for ids in prompts:
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
            rows.append(logits[0, -COMPARED_POSITIONS:].float().log_softmax(-1).cpu())
    return rows


def measure_agreement(adapter: list[Tensor], base: list[Tensor], saved: list[Tensor]) -> Agreement:
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


def check_files(folder: Path, template: str, ends: list[int]) -> None:
    """UserError unless the folder holds the trained template and stops at every end of turn of the format."""
    written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    known = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    if written != template:
        raise UserError(f"{folder}/chat_template.jinja is not the template used in training; report this")
    if missing := set(ends) - set(known if isinstance(known, list) else [known]):
        raise UserError(f"{folder}/generation_config.json does not stop at the ids {sorted(missing)}; report this")


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """A 4-bit (bitsandbytes) model with ordinary linear layers that hold the same numbers, in the compute dtype."""
    model = model.dequantize()
    model.is_loaded_in_4bit = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model
