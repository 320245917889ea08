"""Loading a base model and its tokenizer. Imports unsloth before Transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import distributed
from finetune.errors import UserError, require
from finetune.models.bundled import cache_dir, resolve_model
from finetune.models.faults import hub_errors, missing_weights
from finetune.models.hub import check_available, hub_token
from finetune.models.limits import MAX_DEFAULT_CONTEXT, check_vocabulary, model_positions
from finetune.models.remote_code import forget_code
from finetune.models.rope import check_applied, set_config, stretched, stretched_entries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("sandwich")


@contextlib.contextmanager
def stdout_to_log() -> Iterator[None]:
    """Log what Unsloth prints: stdout is for a script's results."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        log.info("%s", line)


def import_unsloth() -> Any:
    """Import unsloth before transformers, trl and peft, after three changes to its surroundings:

    * its compiled cache is in the user's cache instead of the working directory;
    * with a torch without CUDA, triton and torchvision are hidden: their wheels are built for CUDA, torchvision's
      import then fails and TRL's fused loss needs triton kernels that cannot run (unsloth 2026.10.9, trl 1.15.0);
    * of several GPUs one is visible: Trainer would wrap the model in DataParallel, which TRL refuses.
    """
    if "unsloth" in sys.modules:
        return sys.modules["unsloth"]
    if sys.flags.optimize > 1:
        raise UserError("Transformers reads its docstrings: start Python without -OO and PYTHONOPTIMIZE=2")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would contact a server at every import
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        for name in ("triton", "torchvision"):
            if name not in sys.modules and importlib.util.find_spec(name) is not None:
                sys.modules[name] = None  # type: ignore[assignment]
                log.warning("%s is installed but torch is a CPU build; %s is hidden from this run", name, name)
    elif "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        with stdout_to_log():
            import unsloth
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("unsloth", "unsloth_zoo"):
            raise
        raise UserError(
            f"unsloth cannot be imported ({error}); run: pip install --no-deps -r requirements_unsloth.txt, "
            "then: python train_lora.py --doctor deep"
        ) from error
    return unsloth


def default_dtype() -> str:
    """--dtype auto on this machine: bfloat16 where the hardware has it, else float16 on a GPU, else float32.

    A CPU without AMX or AVX512-BF16 emulates bfloat16: measured 50 against 170 GFLOP/s in float32 on a Cascade Lake.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if "unsloth" in sys.modules:
        return "bfloat16" if sys.modules["unsloth"].is_bfloat16_supported() else "float32"
    return "bfloat16" if _cpu_runtime().cpu_bf16_supported() else "float32"


def compute_dtype(requested: str) -> str:
    """--dtype as it is computed in: Unsloth replaces float16 on a CPU, and bfloat16 on a GPU without it."""
    import torch

    replaced = "bfloat16" if torch.cuda.is_available() else "float16"
    best = default_dtype()
    return best if requested == "auto" or (requested == replaced and best != replaced) else requested


def _cpu_runtime() -> Any:
    """Unsloth's module that looks at the processor, without importing Unsloth, which takes many seconds."""
    require("training", "unsloth_zoo")
    (folder,) = importlib.util.find_spec("unsloth_zoo").submodule_search_locations
    spec = importlib.util.spec_from_file_location("_unsloth_cpu_runtime", Path(folder) / "cpu" / "runtime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Loaded:
    """A base model, its tokenizer and how it was loaded."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    dtype: str
    load_in_4bit: bool
    device: str


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; its end-of-sequence token becomes the padding token where it has none."""
    check_available(name, revision)
    from transformers import AutoTokenizer

    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=trust_remote_code
        )
    forget_code(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False, rope_scaling: str | None = None
) -> PreTrainedConfig:
    """The model's config.json without its weights, with its rotary positions stretched as `rope_scaling` says."""
    check_available(name, revision)
    from transformers import AutoConfig

    with hub_errors(name):
        config = AutoConfig.from_pretrained(resolve_model(name), revision=revision, trust_remote_code=trust_remote_code)
    if rope_scaling:
        set_config(config, stretched(config, rope_scaling, name))
    return config


def known_positions(name: str, trust_remote_code: bool = False) -> int | None:
    """`model_positions` by the name of a tokenizer; None where no usable config.json is beside it."""
    try:
        return model_positions(load_config(name, trust_remote_code=trust_remote_code))
    except UserError:
        return None


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool | None = None,
    max_seq_length: int | None = None,
    trust_remote_code: bool = False,
    rope_scaling: str | None = None,
) -> Loaded:
    """Load a base model through Unsloth's FastLanguageModel; `load_in_4bit` None: 4-bit on a GPU only.

    max_seq_length  lowered to the positions that the model was made for; None: these, up to MAX_DEFAULT_CONTEXT
    rope_scaling    stretches these positions, as --rope_scaling does; None: the base is not changed
    Raises UserError for an unknown, gated or unreachable model, and for a tokenizer with more tokens than the model.
    """
    unsloth = import_unsloth()
    import torch

    requested, dtype = dtype, compute_dtype(dtype)
    if requested not in ("auto", dtype):
        log.warning("--dtype %s is slow or missing on this device; it computes in %s", requested, dtype)
    if load_in_4bit is None:
        load_in_4bit = torch.cuda.is_available()
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    config = load_config(name, revision, trust_remote_code, rope_scaling)
    positions = model_positions(config)
    limit = max_seq_length or MAX_DEFAULT_CONTEXT
    limit = min(limit, positions or limit)
    # For more than max_position_embeddings Unsloth would replace the model's rotary positions by stretched ones.
    unscaled = getattr(config.get_text_config(), "max_position_embeddings", None) or limit
    stretch = stretched_entries(config) if rope_scaling else {}
    # Unsloth assigns device N to process N of a data-parallel run, and there is no cpu:1.
    placement = {"device_map": {"": "cpu"}} if distributed.size() > 1 and not torch.cuda.is_available() else {}
    with hub_errors(name), stdout_to_log(), missing_weights() as missing:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=resolve_model(name),
            max_seq_length=min(limit, unscaled),
            dtype=getattr(torch, dtype),
            load_in_4bit=load_in_4bit,
            revision=revision,
            trust_remote_code=trust_remote_code,
            token=hub_token(),
            use_safetensors=True,  # a pickle could run code
            # Unsloth would load its own copy of many models, without the revision that was asked for and is recorded,
            # and one that a machine without network may not have.
            use_exact_model_name=True,
            **placement,
            # Unsloth sets the number of positions itself.
            **{key: value for key, value in stretch.items() if key == "rope_parameters"},
        )
    if rope_scaling:
        set_config(model.config, stretch)
        check_applied(model, config, rope_scaling, name)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    set_length_limit(model, limit)
    forget_code(model, model.config)
    if missing:
        names = ", ".join(missing[:3]) + " …" * (len(missing) > 3)
        log.warning("model %s: its files lack %s, now random numbers; a complete model has all weights", name, names)
    is_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
    if load_in_4bit and not is_4bit:
        log.warning(
            "model %s: 4-bit weights were requested, but Unsloth loaded %s; see: python train_lora.py --doctor deep",
            name, dtype,
        )  # fmt: skip
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=getattr(model.config, "_commit_hash", None) or revision,
        dtype=dtype,
        load_in_4bit=is_4bit,
        device=str(model.get_input_embeddings().weight.device),
    )


def set_length_limit(model: Any, limit: int) -> None:
    """Set the length beyond which Unsloth cuts inputs, in every module that has one as Unsloth sets it."""
    for module in model.modules():
        if hasattr(module, "max_seq_length"):
            module.max_seq_length = limit
    model.max_seq_length = limit
