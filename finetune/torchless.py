"""Keeping torch out of processes that only turn text into tokens.

Transformers imports torch wherever it is installed, even to load a tokenizer, which takes seconds in every command and
worker process. A process that has called `hide_torch` gets the tokenizers without it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


def hide_torch() -> None:
    """Make torch count as not installed in this process; no effect once it is imported."""
    sys.modules.setdefault("torch", None)


def hide_unused() -> None:
    """Make packages count as not installed that Transformers would import and a process without a model never uses.

    No effect once Transformers is imported: it has then found them.
    """
    if "transformers" not in sys.modules:
        for name in ("sklearn", "scipy", "peft", "bitsandbytes"):
            sys.modules.setdefault(name, None)


@contextlib.contextmanager
def without_scipy_integrate() -> Iterator[None]:
    """Import datasketch without scipy.integrate: it takes more than a second, and given parameters need no integral."""
    names = [name for name in ("scipy", "scipy.integrate") if name not in sys.modules]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    if "scipy.integrate" in names:
        sys.modules["scipy.integrate"].quad = None
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def unhide_torch() -> None:
    """Undo `hide_torch`; Transformers must not have been imported in between."""
    if sys.modules.get("torch", "") is None:
        del sys.modules["torch"]
