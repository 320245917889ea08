"""Cache of what reading some files found: everything but the conversations, which are read again when needed.

An entry is named by a hash over the contents of the files and all else that decides the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from finetune.files import sha256_of, write_to_cache
from finetune.reading.sources import Spec, files_of


class LazyList(Sequence):
    """A list of known length that is read when the first item is accessed."""

    def __init__(self, length: int, read: Callable[[], Sequence]):
        self._length, self._read, self._items = length, read, None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if self._items is None:
            self._items = self._read()
        return self._items[index]


def entry_path(cache_dir: str | Path, specs: list[Spec], options: dict[str, Any]) -> Path | None:
    """The cache file for exactly these sources and options; None where a source is not a file (a Hub dataset)."""
    digest = hashlib.sha256(json.dumps([options, _code_fingerprint()], sort_keys=True).encode())
    for spec in specs:
        paths = files_of(spec)
        if paths is None or not all(path.is_file() for path in paths):  # a pipe can be read only once
            return None
        digest.update(json.dumps([spec.text, *map(str, paths)]).encode())
        try:
            for path in paths:
                digest.update(sha256_of(path).encode())
        except OSError:  # reported when the rows are read
            return None
    return Path(cache_dir) / f"{digest.hexdigest()[:32]}.json"


def load_entry(path: Path) -> dict[str, Any] | None:
    """The fields of an entry, as given to `save_entry`; None if it is missing or damaged."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(entry["text"].encode()).hexdigest() != entry["check"]:
            return None
        found = json.loads(entry["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found["origins"] = [(source, row) for source, rows in found["origins"] for row in rows]
    return found


def save_entry(path: Path, *, origins: list[tuple[str, int]], **fields: Any) -> None:
    """Store the origins and other fields of a result. Raises UserError."""
    grouped = [(source, [row for _, row in group]) for source, group in groupby(origins, key=itemgetter(0))]
    text = json.dumps({"origins": grouped, **fields}, ensure_ascii=False)
    check = hashlib.sha256(text.encode()).hexdigest()
    write_to_cache(path, json.dumps({"check": check, "text": text}, ensure_ascii=False).encode())


@cache
def _code_fingerprint() -> str:
    """Changes with the code that reads and normalises, so that a fixed bug does not survive in the cache."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in (root / "finetune" / "reading", root / "formats"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest() + version("pyarrow")
