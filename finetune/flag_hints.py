"""What a person probably meant by a flag that a script does not have."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Flags of other trainers (Transformers, PEFT, TRL, LLaMA-Factory, axolotl, Unsloth), by the name they have here.
ELSEWHERE = {
    "lr": "learning_rate",
    "rank": "lora_r r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target lora_target_modules modules",
    "epochs": "num_epochs num_train_epochs n_epochs epoch",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size bs",
    "grad_accum": "gradient_accumulation_steps accumulation_steps gradient_accumulation",
    "scheduler": "lr_scheduler lr_scheduler_type",
    "warmup_steps": "num_warmup_steps",
    "optim": "optimizer",
    "max_seq_length": "max_length cutoff_len sequence_len max_seq_len seq_length context_length seq_len",
    "model": "model_name model_name_or_path base_model pretrained_model_name_or_path model_id",
    "dataset": "data train_file train_data data_path dataset_name datasets train_dataset input data_file rows",
    "eval_dataset": "validation_file eval_file eval_data test_file validation",
    "eval_fraction": "val_size val_set_size validation_split eval_split test_size val_split",
    "experiments_dir": "output_dir output output_folder out_dir",
    "name": "run_name experiment_name",
    "load_in_4bit": "quantization quantization_bit qlora bits load_in_4_bit",
    "use_rslora": "rslora",
    "format": "template chat_template prompt_template",
    "resume": "resume_from_checkpoint resume_from",
    "limit": "max_samples num_samples max_rows",
    "early_stopping_patience": "patience",
    "report_to": "wandb tensorboard logger",
    "trust_remote_code": "trust",
    "tools": "tool_schemas tools_file functions schemas",
    "questions": "prompts_file question_file",
    "to": "export_to target",
    "web": "ui gradio webui",
    "serve": "server api",
    "max_new_tokens": "max_tokens",
    "log_y": "log logy",
    "smooth": "smoothing",
    "seeds": "num_seeds repeats",
}
_ALIASES = {alias: name for name, aliases in ELSEWHERE.items() for alias in aliases.split()}
_DATA_FILE = re.compile(r".*\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.gz)?", re.IGNORECASE)
_RECIPE = re.compile(r".*\.ya?ml", re.IGNORECASE)


def flags_of(parser: argparse.ArgumentParser, arguments: Sequence[str] = ()) -> list[str]:
    """The names of a parser's flags, without "--", with those of the subcommand that the arguments name."""
    names = []
    for action in parser._actions:
        names += [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            verb = next((word for word in arguments if word in action.choices), None)
            if verb is not None:
                names += flags_of(action.choices[verb])
    return [name for name in names if not name.startswith("no-")]


def meant(name: str, known: Iterable[str]) -> str | None:
    """The flag of `known` that `name` is a slip of, or is called in another trainer; None where none is close."""
    name, known = name.lower().replace("-", "_"), list(known)
    if (alias := _ALIASES.get(name)) in known:
        return alias
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close and len(name) > 2:
        close = [flag for flag in known if flag.startswith(name) or name.startswith(f"{flag}_")]
    return close[0] if close else None


def hint(word: str, known: Iterable[str], program: str) -> str:
    """What to do about an argument that no flag takes: `did you mean --lr?`, or where all flags are listed."""
    known = list(known)
    listed = f"see {program} --help"
    if word.startswith("--"):
        flag = meant(word[2:].partition("=")[0], known)
        return f"did you mean --{flag}?" if flag else listed
    if _RECIPE.fullmatch(word) and "config" in known:
        return f"did you mean --config {word}?"
    if "dataset" in known and (_DATA_FILE.fullmatch(word) or Path(word).is_dir()):
        return f"did you mean --dataset {word}?"
    if flag := meant(word, [name for name in known if len(name) > 2]):
        return f"did you mean --{flag}?"
    return listed
