"""Models of any shape with random weights under the bundled model's tokenizer: enough for time and memory.

python -m benchmarks.throughput_parts.random_model CONFIG.json FOLDER DTYPE TOKENIZER
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.files import atomic_directory
from finetune.models.bundled import cache_dir, smollm2_dir

ROOT = Path(__file__).resolve().parents[2]


def cached_model(config: dict[str, Any], dtype: str) -> Path:
    """Folder of the model in the cache, written on first use.

    config: of Transformers, with its model_type
    """
    text = json.dumps(config, sort_keys=True)
    name = f"{config['model_type']}_{config['hidden_size']}x{config['num_hidden_layers']}"
    folder = cache_dir() / "random" / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}_{dtype}"
    if not folder.is_dir():
        write_in_a_process(config, folder, dtype)
    return folder


def write_in_a_process(config: dict[str, Any], folder: Path, dtype: str, tokenizer: Path | None = None) -> Path:
    """As `write_model`, in a process that ends, so that this one holds neither the weights nor the GPU."""
    command = [sys.executable, "-m", "benchmarks.throughput_parts.random_model", json.dumps(config), str(folder), dtype,
               str(tokenizer or smollm2_dir())]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise UserError(f"the model {folder} could not be written: the message is above")
    return folder


def write_model(config: dict[str, Any], folder: Path, dtype: str = "float32", tokenizer: Path | None = None) -> Path:
    """Write the model into `folder`, complete or not at all; the weights are drawn on a GPU where there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with atomic_directory(folder) as target:
        weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json")
        shutil.copytree(tokenizer or smollm2_dir(), target, dirs_exist_ok=True, ignore=weights)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ids | config), dtype=getattr(torch, dtype))
        model.save_pretrained(target)
    return folder


@one_line_errors
def main(config: str, folder: str, dtype: str, tokenizer: str) -> None:
    write_model(json.loads(config), Path(folder), dtype, Path(tokenizer))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
