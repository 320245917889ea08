"""Letters for which no font is installed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def boxes_unremarked() -> Iterator[None]:
    """No warning for each letter that is drawn as a box: the picture shows it, and the same text stands beside it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
