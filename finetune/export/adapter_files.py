"""Which files of an adapter folder are published: an allow-list, without links that lead out of the folder."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from finetune.errors import UserError
from finetune.models.remote_code import strip_code
from finetune.progress import say

# Adapter, tokenizer and chat template. Everything else (optimizer, evaluations with held-out rows) stays here.
PUBLIC_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
)  # fmt: skip
# Added by an export itself.
WRITTEN_FILES = ("README.md", "loss.png", "evaluation.md")
# Known files of a checkpoint: omitted without a message.
TRAINING_FILES = (
    "README.md", ".*", "evaluation", "exports", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "trainer_state.json", "training_args.bin", "log_counters.json", "manifest.json",
)  # fmt: skip


def copy_adapter(adapter: Path, folder: Path) -> None:
    """Copy the public files of an adapter into `folder`; a line names every other file that is omitted.

    References to Python code are removed from the copies. Raises UserError for a link that leads out of the adapter's
    folder: its target may be any file of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    omitted = []
    for path in sorted(adapter.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in PUBLIC_FILES):
            shutil.copyfile(inside(path, adapter), folder / path.name)
        elif not any(fnmatchcase(path.name, pattern) for pattern in TRAINING_FILES):
            omitted.append(path.name)
    if omitted:
        say(f"omitted from {adapter}: {', '.join(omitted)} (not part of an adapter, its tokenizer or its template)")
    strip_code(folder)


def inside(path: Path, folder: Path) -> Path:
    """The regular file that `path` names; UserError when it is not one, or a link out of `folder`."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link to {real}, outside {folder}; replace it by the file if it is to be exported")
    if not real.is_file():
        raise UserError(f"{path} is not a regular file; replace it by one")
    return real
