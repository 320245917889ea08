"""Encoded data on disk: one .npz of flat arrays per combination of data, format, tokenizer, options and code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import formats
from finetune.encoding.encoded import EncodedRows
from finetune.encoding.options import EncodingOptions
from finetune.files import write_to_cache
from formats import Format

ARRAYS = ("input_ids", "trained", "offsets", "rows")


def cache_path(cache_dir: str | Path, fingerprint: str, tokenizer: Any, fmt: Format, options: EncodingOptions) -> Path:
    """The file for exactly this input: everything that could change an id or a label is part of its name.

    fingerprint  of the conversations, order included
    """
    fields = {field.name: getattr(fmt, field.name) for field in dataclasses.fields(fmt)}
    functions = [value for value in fields.values() if callable(value)]
    data = {name: value for name, value in fields.items() if not callable(value) and name != "ollama"}
    described = json.dumps([data, dataclasses.asdict(options)], default=str, sort_keys=True)
    digest = hashlib.sha256()
    for part in (fingerprint, tokenizer_fingerprint(tokenizer), described, _code_fingerprint(functions)):
        digest.update(part.encode())
    return Path(cache_dir) / f"{digest.hexdigest()[:32]}.npz"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over what decides a text's ids: vocabulary, merges, added tokens, and the template it carries."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = dict(sorted(tokenizer.get_vocab().items())) if backend is None else json.loads(backend.to_str())
    for setting_of_last_call in ("padding", "truncation"):
        vocabulary.pop(setting_of_last_call, None)
    rest = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(f"{json.dumps(vocabulary)}{rest!r}".encode()).hexdigest()


def _code_fingerprint(functions: list[Any]) -> str:
    """The code that decides ids and labels, `functions` of a third-party format included, and library versions:
    a fixed bug must not survive in a cache."""
    package = Path(formats.__file__).parent
    files = {path for path in package.rglob("*") if path.suffix in (".py", ".jinja")}
    files |= {Path(__file__).with_name(name) for name in ("encode.py", "encoded.py", "options.py", "rows.py")}
    files |= {Path(str(sys.modules[function.__module__].__file__)) for function in functions}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest() + "".join(version(name) for name in ("tokenizers", "transformers", "jinja2"))


def load(path: Path) -> EncodedRows | None:
    """The stored result; None when there is none or the file is damaged (it is then rebuilt)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
            texts: dict[str, Any] = json.loads(stored["texts"].tobytes())
            texts["left_out"] = [(row, reason) for row, reason in texts["left_out"]]
            texts["warned"] = [(row, warning) for row, warning in texts["warned"]]
            texts["turns_removed"] = {int(row): number for row, number in texts["turns_removed"].items()}
            encoded = EncodedRows(**arrays, **texts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    sizes = {len(encoded.input_ids), len(encoded.trained), int(encoded.offsets[-1])}
    return encoded if len(sizes) == 1 and len(encoded.rows) == len(encoded.sequences) else None


def save(path: Path, encoded: EncodedRows) -> None:
    """Store a result; atomic, so two runs may do it at once. Raises UserError."""
    texts = {name: getattr(encoded, name) for name in ("report", "left_out", "warned", "turns_removed", "longest_row")}
    packed = np.frombuffer(json.dumps(texts).encode("utf-8"), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(encoded, name) for name in ARRAYS}, texts=packed)
    write_to_cache(path, buffer.getvalue())
