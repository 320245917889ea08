"""The model: loading, quantising, adapting. The only file that imports unsloth, and it does so before Transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.bundled import cache_dir, resolve_model
from finetune.errors import UserError
from finetune.hub_token import hub_token
from finetune.model_faults import LoadReport, hub_errors, one_line
from finetune.training import ranks

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
    place = {"device_map": {"": "cpu"}} if ranks.size() > 1 and not torch.cuda.is_available() else {}
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


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    last_layers: int | None = None,
    use_rslora: bool,
    gradient_checkpointing: bool,
    seed: int,
) -> Any:
    """Attach a fresh LoRA through Unsloth; UserError names target modules the model does not have."""
    unsloth = import_unsloth()
    import torch

    from finetune.training.lora_linear import fuse_lora_linears

    check_adapter(model, target_modules, last_layers)
    # Unsloth's default is all linear layers of attention and MLP.
    targets = None if target_modules == ["all-linear"] else target_modules
    layers = None
    if last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = list(range(count - last_layers, count))
    news = io.StringIO()
    try:
        with contextlib.redirect_stdout(news):
            adapted = unsloth.FastLanguageModel.get_peft_model(
                model,
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                **({"target_modules": targets} if targets else {}),
                bias="none",
                layers_to_transform=layers,
                use_rslora=use_rslora,
                use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
                random_state=seed,
            )
    except ValueError as error:  # PEFT's own word on modules that it has no LoRA for
        raise UserError(f"--target_modules {' '.join(target_modules)}: {one_line(error)}") from error
    for line in news.getvalue().splitlines():
        log.info("%s", line)
    if not torch.cuda.is_available():
        fuse_lora_linears(adapted)
    return adapted


# What Unsloth trains whole, not by an adapter, and only beside one.
_TRAINED_WHOLE = {"lm_head", "embed_tokens"}


def check_adapter(model: Any, target_modules: list[str], last_layers: int | None) -> None:
    """UserError when a model, with weights or on the meta device, cannot be adapted so."""
    if target_modules != ["all-linear"]:
        adaptable: dict[str, bool] = {}
        for path, module in model.named_modules():
            matrix = hasattr(module, "in_features") or any(p.ndim == 2 for p in module.parameters(recurse=False))
            name = path.rsplit(".", 1)[-1]
            adaptable[name] = adaptable.get(name, False) or matrix or "conv" in type(module).__name__.lower()
        has = ", ".join(sorted(name for name, can in adaptable.items() if can))
        wanted = sorted(set(target_modules))
        if missing := [name for name in wanted if name not in adaptable]:
            raise UserError(f"--target_modules: the model has no module called {', '.join(missing)}; it has {has}")
        if others := [name for name in wanted if not adaptable[name]]:
            raise UserError(f"--target_modules: {', '.join(others)} holds no matrix to adapt; the model has {has}")
        if set(wanted) <= _TRAINED_WHOLE:
            raise UserError(
                f"--target_modules {' '.join(wanted)}: trained whole, and only beside an adapter; add another of {has}"
            )
    count = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and last_layers > count:
        raise UserError(f"--last_layers {last_layers}: the model has {count} decoder layers; give at most so many")


def unsloth_segments(block_mask: Any, device: Any) -> Any:
    """Unsloth's `prefix_seg_info` for a pass of as many tokens as its FlexAttention mask, which is made already.

    Its kernel looks the mask up by `signature` (unsloth 2026.10.9, utils/prefix_grouper_kernel.py); labels of its own,
    one prefix and many suffixes, could not say what a deeper tree is, so the mask is put there beforehand.
    """
    import torch
    from unsloth.utils import prefix_grouper_kernel as kernel

    tokens = block_mask.seq_lengths[0]
    signature = ("sandwich", id(block_mask))
    nobody = torch.full((tokens,), -99, dtype=torch.long, device=device)
    kernel.clear_block_mask_cache()
    kernel._BLOCK_MASK_CACHE[(signature, str(device))] = block_mask
    return kernel.PrefixSegInfo(
        group_of_kv=nobody, is_prefix=torch.zeros(tokens, dtype=torch.bool, device=device), suffix_of_kv=nobody,
        signature=signature, T=tokens, T_pad=tokens,
    )  # fmt: skip


@dataclass
class Run:
    """What a path names: an experiment folder, an adapter folder, or (without an adapter) a whole model.

    A whole model has an `experiment` where it is a run's own export (`RUN/exports/merged`).
    """

    path: str | Path
    experiment: Any | None  # finetune.experiment.Experiment
    adapter: Path | None

    @property
    def base_name(self) -> str:
        """The base model by the name it was trained under; of a whole model its own. Raises UserError."""
        if self.adapter is None:
            return str(self.path)
        if self.experiment is not None:
            return str(self.experiment.config["base_model"])
        return str(_adapter_config(self.adapter)["base_model_name_or_path"])

    def load_base(self, **overrides: Any) -> tuple[Loaded, Any]:
        """(base model as it was loaded for training, format it was trained with); `overrides` go to `load_base`.

        For a plain model or a stranger's adapter the format is chosen by the tokenizer.
        """
        if self.adapter is None:
            loaded = load_base(self.base_name, **overrides)
        elif self.experiment is None:
            revision = _adapter_config(self.adapter).get("revision")
            loaded = load_base(self.base_name, **{"revision": revision, **overrides})
        else:
            config = self.experiment.config
            flags = config["flags"]
            settings = {
                "revision": config.get("base_model_revision"),
                "dtype": config.get("dtype", "auto"),
                "load_in_4bit": config.get("load_in_4bit"),
                "max_seq_length": flags["max_seq_length"],
                "trust_remote_code": flags["trust_remote_code"],
            }
            loaded = load_base(self.base_name, **{**settings, **overrides})
        return loaded, self.format_for(loaded.tokenizer)

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Any]:
        """(tokenizer, format it was trained with), without the weights."""
        if self.experiment is not None and self.adapter is not None:
            config, flags = self.experiment.config, self.experiment.config["flags"]
            tokenizer = load_tokenizer(
                config["base_model"], config.get("base_model_revision"), flags["trust_remote_code"]
            )
        elif self.adapter is not None and not (self.adapter / "tokenizer_config.json").is_file():
            config = _adapter_config(self.adapter)
            tokenizer = load_tokenizer(config["base_model_name_or_path"], config.get("revision"))
        else:
            tokenizer = load_tokenizer(str(self.adapter or self.path))
        return tokenizer, self.format_for(tokenizer)

    def format_for(self, tokenizer: Any) -> Any:
        """The format the run was trained with (a user's own is known by its file), else one that fits the tokenizer."""
        from formats import choose_format, get_format

        if self.experiment is None:
            return choose_format(tokenizer)[0]
        own = str(self.experiment.config["flags"]["format"])
        return get_format(
            own if own.endswith((".yaml", ".yml")) else self.experiment.config["format"]["name"], tokenizer
        )


def find_run(path: str | Path) -> Run:
    """What `path` names; a run without a finished adapter stands for its newest checkpoint.

    Raises UserError when it is a folder that is neither a run, an adapter nor a model, or a run without any of these.
    """
    from finetune.experiment import CONFIG, FINAL

    if Path(path).is_file():
        raise UserError(f"{path} is a file; name a run folder, an adapter folder or a model")
    if isinstance(path, str) and not Path(path).is_dir():
        return Run(path, None, None)
    path = Path(path)
    if (path / CONFIG).is_file():
        experiment, adapter = _trained(path), path / FINAL
        if not (adapter / "adapter_config.json").is_file():
            checkpoints = experiment.checkpoints()
            if not checkpoints:
                raise UserError(f"run {path} has neither {FINAL}/ nor a checkpoint yet; let it train first")
            adapter = checkpoints[-1]
        return Run(path, experiment, adapter)
    if (path / "adapter_config.json").is_file():
        return Run(path, _trained(path.parent) if (path.parent / CONFIG).is_file() else None, path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a run folder, an adapter nor a model; name one of them")
    run = path.resolve().parents[1] if path.resolve().parent.name == "exports" else None
    return Run(path, _trained(run) if run and (run / CONFIG).is_file() else None, None)


def _trained(folder: Path) -> Any:
    """The run of a folder; UserError when its config is not one that train_lora.py has filled."""
    from finetune.experiment import CONFIG, Experiment

    experiment = Experiment.open(folder)
    if missing := [key for key in ("flags", "base_model", "format") if key not in experiment.config]:
        raise UserError(f"{folder / CONFIG} has no {', '.join(missing)}, so train_lora.py did not write it; train anew")
    return experiment


def _adapter_config(folder: Path) -> dict[str, Any]:
    """A stranger's adapter_config.json; UserError when it does not name its base model."""
    import json

    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config["base_model_name_or_path"]:
            raise KeyError("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not name the adapter's base model ({error}); save the adapter anew") from error
    return config


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter of `folder` on it (a PeftModel); UserError when there is none that fits."""
    from peft import PeftModel
    from safetensors import SafetensorError

    # Only safetensors: PEFT would take adapter_model.bin too, which is a pickle.
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors; name a folder in which an adapter was saved so")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"its adapter_config.json has no {reason}"
        raise UserError(f"the adapter in {folder} cannot be put on its base model: {reason}") from error


def load_for_inference(path: str | Path, *, base: bool = False, merged: bool = False) -> tuple[Any, Any, Any]:
    """(model, tokenizer, format) of an experiment folder, an adapter folder, or a plain model.

    base=True leaves the adapter away; merged=True folds it into the weights (changes bfloat16 results slightly).
    The format is the one the run was trained with; for a plain model or a stranger's adapter it is chosen by the
    tokenizer. Raises UserError when `path` is none of the three.
    """
    run = find_run(path)
    loaded, fmt = run.load_base()
    model = loaded.model
    if run.adapter is not None and not base:
        model = attach_adapter(model, run.adapter)
        if merged:
            model = model.merge_and_unload()
    return _for_inference(model), loaded.tokenizer, fmt


def _for_inference(model: Any) -> Any:
    return import_unsloth().FastLanguageModel.for_inference(model) or model
