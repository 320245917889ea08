"""What reading some files found, kept for the next time: all but the conversations, which are read again when needed.

The name of an entry is a hash over the contents of the files and over everything else that decides the result, so an
entry never speaks of other data than it was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.files import write_to_cache
from finetune.reading.sources import Spec, files_of

FIELDS = ("counts", "mappings", "notes", "fingerprint")


class ReadLater(Sequence):
    """A list of known length whose items are read when the first one is asked for."""

    def __init__(self, length: int, read: Callable[[], list]):
        self._length, self._read, self._items = length, read, None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if self._items is None:
            self._items = self._read()
        return self._items[index]


def entry_path(cache_dir: str | Path, specs: list[Spec], options: dict[str, Any]) -> Path | None:
    """The file for exactly these sources and options; None where a source is no file (a Hub dataset)."""
    digest = hashlib.sha256(json.dumps([options, _code_fingerprint()], sort_keys=True).encode())
    for spec in specs:
        paths = files_of(spec)
        if paths is None or not all(path.is_file() for path in paths):  # a pipe can be read once only
            return None
        digest.update(json.dumps([spec.text, *map(str, paths)]).encode())
        try:
            for path in paths:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:  # reading the rows says what is wrong
            return None
    return Path(cache_dir) / f"{digest.hexdigest()[:32]}.json"


def load_entry(path: Path) -> dict[str, Any] | None:
    """{"origins", …FIELDS} of an entry; None when there is none or it is damaged (it is then made anew)."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        check, text = entry["check"], entry["text"]
        if hashlib.sha256(text.encode()).hexdigest() != check:
            return None
        found = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found["origins"] = [(source, row) for source, rows in found["origins"] for row in rows]
    return found


def save_entry(path: Path, loaded: Any) -> None:
    """Store what a `LoadResult` says besides its conversations. Raises UserError."""
    sources = groupby(loaded.origins, key=lambda origin: origin[0])
    origins = [(source, [row for _, row in group]) for source, group in sources]
    text = json.dumps({"origins": origins, **{name: getattr(loaded, name) for name in FIELDS}}, ensure_ascii=False)
    check = hashlib.sha256(text.encode()).hexdigest()
    write_to_cache(path, json.dumps({"check": check, "text": text}, ensure_ascii=False).encode())


@cache
def _code_fingerprint() -> str:
    """The code that reads and normalises, and the library below it: a mended bug must not live on in a cache."""
    root = Path(__file__).resolve().parents[2]
    files = [*sorted((root / "finetune" / "reading").glob("*.py")), *sorted((root / "formats").glob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() + version("pyarrow")
