"""Encoded data on disk: one .npz of flat arrays per combination of data, format, tokenizer, flags and code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from finetune.encoding.encoded import EncodedRows
from finetune.encoding.rows import Flags
from finetune.files import write_to_cache

ARRAYS = ("input_ids", "trained", "offsets", "rows")


def cache_path(cache_dir: str | Path, fingerprint: str, tokenizer, fmt, flags: Flags) -> Path:
    """The file for exactly this input: anything that could change an id or a label is part of its name.

    fingerprint  of the conversations, order included
    """
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    described = [fmt.name, fmt.template, fmt.end_of_turn, fmt.control_tokens, fmt.template_kwargs]
    digest.update(json.dumps([described, dataclasses.asdict(flags)], default=str, sort_keys=True).encode())
    digest.update(_code_fingerprint().encode())
    return Path(cache_dir) / f"{digest.hexdigest()[:32]}.npz"


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over what decides a text's ids: vocabulary, merges, added tokens, and the template carried along."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    else:
        # Padding and truncation are settings of the last call, not of the vocabulary.
        padding, truncation = backend.padding, backend.truncation
        backend.no_padding()
        backend.no_truncation()
        digest.update(backend.to_str().encode("utf-8"))
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
    digest.update(repr([type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]).encode())
    return digest.hexdigest()


def _code_fingerprint() -> str:
    """The code that makes ids and labels, and the libraries below it: a mended bug must not live on in a cache."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(p for p in (root / "formats").rglob("*") if p.suffix in (".py", ".jinja"))
    digest = hashlib.sha256()
    for path in [*files, root / "finetune" / "encoding" / "encode.py", root / "finetune" / "encoding" / "rows.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest() + "".join(version(name) for name in ("tokenizers", "transformers", "jinja2"))


def load(path: Path) -> EncodedRows | None:
    """The stored result; None when there is none or the file is damaged (it is then made anew)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
            texts: dict[str, Any] = json.loads(stored["texts"].tobytes())
            report, left_out = texts["report"], [(row, reason) for row, reason in texts["left_out"]]
            turns_removed = {int(row): number for row, number in texts["turns_removed"].items()}
            longest_row = texts["longest_row"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    sizes = {len(arrays["input_ids"]), len(arrays["trained"]), int(arrays["offsets"][-1])}
    if len(sizes) != 1 or len(arrays["rows"]) != len(arrays["offsets"]) - 1:
        return None
    return EncodedRows(**arrays, report=report, left_out=left_out, turns_removed=turns_removed, longest_row=longest_row)


def save(path: Path, encoded: EncodedRows) -> None:
    """Store a result; written aside and renamed, so that two runs at once do no harm. Raises UserError."""
    texts = {name: getattr(encoded, name) for name in ("report", "left_out", "turns_removed", "longest_row")}
    packed = np.frombuffer(json.dumps(texts).encode("utf-8"), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(encoded, name) for name in ARRAYS}, texts=packed)
    write_to_cache(path, buffer.getvalue())
