"""Control tokens that contents spell, encoded as ordinary text.

A mark inside a control string tells it from the template's own tokens, through rendering and up to the tokenizer. There
the mark is removed and the string encoded without looking for added tokens. The ids are those that Transformers (5.20
and later) gives with `apply_chat_template(…, sanitize_control_tokens=True)`: each such string and the text around it
are encoded separately, behind a newline that is removed again, so that SentencePiece adds no space.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

TEXT_MARK = "\U000f0000"  # of a private use area; removed from contents


def marked(text: str, mark: str = TEXT_MARK) -> str:
    """`text` with a mark behind its first character."""
    return text[0] + mark + text[1:]


def ids_as_text(tokenizer: Any, texts: Iterable[str], control: Set[int]) -> dict[str, list[int]]:
    """By marked control string, its ids as ordinary text; without those that always become one of the `control` ids."""
    if not getattr(tokenizer, "is_fast", False):
        return {}
    newline, found = _without_added_tokens(tokenizer, "\n"), {}
    for text in filter(None, texts):
        ids = _without_added_tokens(tokenizer, "\n" + text)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else _without_added_tokens(tokenizer, text)
        if ids and control.isdisjoint(ids):
            found[marked(text)] = ids
    return found


def _without_added_tokens(tokenizer: Any, text: str) -> list[int]:
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    parts = [text]
    if backend.pre_tokenizer is not None:
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for part in parts for token in backend.model.tokenize(part)]
