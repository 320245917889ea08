"""Pictures, sounds and videos beside the text: such rows are refused, because only text can be trained."""

from __future__ import annotations

import re
from typing import Any

from finetune.reading.row_files import EMPTY, RowError, as_text

_COLUMNS = ("images", "videos", "audios")  # lists of files, of which the text may or may not hold placeholders
_SINGULAR = ("image", "video", "audio", "image_path", "video_path", "audio_path", "image_url")
_PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_?(?:pad|\d+))?\|?>", re.IGNORECASE)
_MESSAGE_KEYS = ("images", "image", "image_url", "videos", "video", "audios")


def refuse_media_columns(row: dict[str, Any], messages: list[Any]) -> None:
    """Raises RowError naming a column of a row that holds images, videos or audio for its messages."""
    for column in (*_COLUMNS, *_SINGULAR):
        if row.get(column) in EMPTY:
            continue
        if column in _COLUMNS or _PLACEHOLDER.search(as_text(messages)):
            raise RowError(f"has the column {column}, but only text can be trained; remove such rows")


def refuse_media_keys(unread: dict[str, Any]) -> None:
    """Raises RowError naming a key of a message that holds images, videos or audio."""
    key = next((key for key in unread if key in _MESSAGE_KEYS), None)
    if key is not None:
        raise RowError(f"has {key}, but only text can be trained; remove such rows")
