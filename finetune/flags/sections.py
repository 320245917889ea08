"""Configs with sections for the model, LoRA, training and inference, in the names of Transformers and PEFT."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.flags.types import ALIASES

SECTIONS = ("model", "data", "dataset", "quantization", "lora", "training", "optimization", "logging", "inference",
            "generation")  # fmt: skip
# Entries of `inference` and of `generation` inside it -> what chat_lora.py calls them.
INFERENCE = {
    "adapter_path": "model", "mode": "mode", "merged_model_path": "merged_model_path", "questions": "questions",
    "max_new_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed",
    "batch_size": "batch_size", "system": "system", "tools": "tools", "format": "format",
}  # fmt: skip
# Entries that have one value here, which is the one that is meant.
FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "task_type": ("CAUSAL_LM",), "save_strategy": ("steps",), "eval_strategy": ("steps",),
    "evaluation_strategy": ("steps",), "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_use_double_quant": (True,),
}  # fmt: skip
# Entries without an effect: a GPU is used where there is one, a run's folder has its logs, an adapter names its base.
UNUSED = ("device", "logging_dir", "overwrite_output_dir", "per_device_eval_batch_size", "base_model_name", "do_sample")

Entries = dict[str, tuple[str, Any]]  # name here -> (entry in the file, value)


def has_sections(data: Mapping[str, Any]) -> bool:
    """Whether a config is one with sections; `train_lora.py`'s own is flat."""
    return any(isinstance(data.get(name), dict) for name in SECTIONS)


def read_sections(where: str, data: Mapping[str, Any], known: Collection[str]) -> tuple[Entries, Entries]:
    """(flags of train_lora.py, settings of chat_lora.py), each with its entry in the file; values are not checked.

    known  the flags of train_lora.py
    Raises UserError, starting with `where`, for an unknown name, for one that is set twice and for a value that cannot
    be had.
    """
    flags: Entries = {}
    answers: Entries = {}
    for path, value in _entries(data):
        section, _, _ = path.partition(".")
        name = path.rpartition(".")[2]
        if name in UNUSED or value is None:
            continue
        if section in ("inference", "generation"):
            if name not in INFERENCE:
                raise UserError(f"{where}: unknown entry {path}; known: {', '.join(INFERENCE)}")
            answers[INFERENCE[name]] = (path, value)
        elif name in FIXED:
            if value not in FIXED[name]:
                raise UserError(f"{where}: {path} can only be {FIXED[name][0]}, not {value!r}")
        else:
            for flag, converted in _flags(where, path, name, value, known).items():
                if flag in flags:
                    raise UserError(f"{where}: {path} and {flags[flag][0]} both set {flag}; keep one of them")
                flags[flag] = (path, converted)
    return flags, answers


def _entries(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and key in SECTIONS:
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flags(where: str, path: str, name: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    """One entry as flags of train_lora.py."""
    if name == "output_dir":  # the folder of this run, not of all runs
        folder = Path(str(value))
        return {"experiments_dir": str(folder.parent), "name": folder.name}
    if name in ("fp16", "bf16") and isinstance(value, bool):
        return {"dtype": {"fp16": "float16", "bf16": "bfloat16"}[name]} if value else {}
    flag = name if name in known else ALIASES.get(name)
    if flag not in known:
        close = difflib.get_close_matches(name, [*known, *ALIASES, *FIXED, *UNUSED], n=1)
        raise UserError(f"{where}: unknown entry {path}; {f'did you mean {close[0]}?' if close else 'remove it'}")
    if flag == "metric_for_best_model" and value == "loss":
        value = "eval_loss"
    return {flag: value}
