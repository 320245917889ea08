"""Keeping torch out of processes that only turn text into tokens.

Transformers imports torch wherever it is installed, even to load a tokenizer, which takes seconds in every command and
worker process. A process that has called `hide_torch` gets the tokenizers without it.
"""

from __future__ import annotations

import sys


def hide_torch() -> None:
    """Make torch count as not installed in this process; no effect once it is imported."""
    sys.modules.setdefault("torch", None)


def unhide_torch() -> None:
    """Undo `hide_torch`; Transformers must not have been imported in between."""
    if sys.modules.get("torch", "") is None:
        del sys.modules["torch"]
