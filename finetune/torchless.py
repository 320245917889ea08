"""Keeping torch out of processes that only turn text into tokens.

Transformers imports torch wherever it finds it, also to load a tokenizer; that takes seconds of every command and of
every worker process. A process that has called `leave_torch_out` gets the tokenizers without it.
"""

from __future__ import annotations

import sys


def leave_torch_out() -> None:
    """For the rest of this process torch counts as not installed; without effect where it is loaded already."""
    sys.modules.setdefault("torch", None)


def let_torch_in() -> None:
    """Undo `leave_torch_out`, for what does need torch; Transformers must not have been imported in between."""
    if sys.modules.get("torch", "") is None:
        del sys.modules["torch"]
