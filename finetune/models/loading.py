"""Loading a base model and its tokenizer. Imports unsloth before Transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune import distributed
from finetune.errors import UserError
from finetune.models.bundled import cache_dir, resolve_model
from finetune.models.faults import LoadReport, hub_errors
from finetune.models.hub import hub_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sandwich")


def import_unsloth() -> Any:
    """Import unsloth ahead of transformers, trl and peft, quietly; its one line of news goes to the log.

    Three conditions of its import are arranged here, the only place that patches anything:
    * its compiled cache goes to the user's cache instead of the working directory;
    * on a torch without CUDA, triton and torchvision are hidden: their wheels are built for CUDA, torchvision's import
      then fails and TRL's fused loss asks for triton kernels that cannot run (unsloth 2026.10.9, trl 1.15.0);
    * several visible GPUs would make Trainer wrap the model in DataParallel, which TRL refuses: one GPU per process.
    """
    if "unsloth" in sys.modules:
        return sys.modules["unsloth"]
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
    except ImportError as error:
        raise UserError("torch is not installed; run: pip install -r requirements_lora.txt") from error
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        for name in ("triton", "torchvision"):
            if name not in sys.modules and importlib.util.find_spec(name) is not None:
                sys.modules[name] = None
                log.warning("%s is installed beside a CPU build of torch and was hidden from this run", name)
    elif "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    news = io.StringIO()
    try:
        with contextlib.redirect_stdout(news):
            import unsloth
    except ImportError as error:
        raise UserError(
            f"unsloth cannot be imported ({error}); run: pip install --no-deps -r requirements_unsloth.txt, "
            "then: python train_lora.py --doctor"
        ) from error
    for line in news.getvalue().splitlines():
        log.info("%s", line)
    return unsloth


def default_dtype() -> str:
    """What --dtype auto means here: bfloat16 in hardware, else float16 on a GPU, else float32.

    A CPU without AMX or AVX512-BF16 emulates bfloat16: measured 50 against 170 GFLOP/s in float32 on a Cascade Lake.
    """
    unsloth = import_unsloth()
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if unsloth.is_bfloat16_supported() else "float32"


@dataclass
class Loaded:
    """A base model with its tokenizer and how it was loaded."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    dtype: str
    load_in_4bit: bool
    device: str


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token that is not an end of turn where one can be had."""
    from transformers import AutoTokenizer

    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Only the model's config.json, for the memory estimate of a dry run."""
    from transformers import AutoConfig

    with hub_errors(name):
        return AutoConfig.from_pretrained(resolve_model(name), revision=revision, trust_remote_code=trust_remote_code)


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool | None = None,
    max_seq_length: int = 2048,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a base model through Unsloth's FastLanguageModel: 4-bit on a GPU, whole on a CPU, unless told otherwise.

    Raises UserError for an unknown, gated or unreachable model.
    """
    unsloth = import_unsloth()
    import torch

    if dtype == "auto":
        dtype = default_dtype()
    if load_in_4bit is None:
        load_in_4bit = torch.cuda.is_available()
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    # Unsloth gives process N of a data-parallel run the device N, and there is no cpu:1.
    place = {"device_map": {"": "cpu"}} if distributed.size() > 1 and not torch.cuda.is_available() else {}
    news, report = io.StringIO(), LoadReport()
    with hub_errors(name), contextlib.redirect_stdout(news), report.kept():
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=resolve_model(name),
            max_seq_length=max_seq_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=load_in_4bit,
            revision=revision,
            trust_remote_code=trust_remote_code,
            token=hub_token(),
            use_safetensors=True,  # the other kind is a pickle, which runs what is in it
            **place,
        )
    for line in news.getvalue().splitlines():
        log.info("%s", line)
    if report.missing:
        log.warning(
            "model %s: its files lack %s, which are random numbers now; a model that is whole has them all",
            name, ", ".join(report.missing[:3]) + " …" * (len(report.missing) > 3),
        )  # fmt: skip
    in_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
    if load_in_4bit and not in_4bit:
        log.warning(
            "model %s: 4-bit weights were asked for, but Unsloth has loaded %s; see: python train_lora.py --doctor",
            name, dtype,
        )  # fmt: skip
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=getattr(model.config, "_commit_hash", None) or revision,
        dtype=dtype,
        load_in_4bit=in_4bit,
        device=str(model.get_input_embeddings().weight.device),
    )
