"""Whether a message is trained, under the key of each trainer. There are no weights here: a mark says yes or no."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from finetune.reading.row_files import EMPTY, RowError

# key -> whether a true value means trained
TRAINING_MARKS = {
    **dict.fromkeys(("train", "training", "trainable", "weight", "loss", "loss_scale", "loss_weight"), True),
    **dict.fromkeys(("loss_mask", "step_loss_mask"), True),
    "masked": False,
}
# train_detail, lossMask, unmasked, sample_weight; not constraint, glossary, lightweight
_LOOKS_LIKE_MARK = re.compile(r"(?<![a-z])(?:un|non?)?(?:train|loss|mask|weight)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Mark(NamedTuple):
    """One training mark as the row has it."""

    key: str
    value: Any
    trained: bool

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.value)}"


def snake_case(key: str) -> str:
    """`toolCalls` -> `tool_calls`."""
    return _CAMEL.sub("_", key).replace("-", "_").lower()


def training_mark(holder: dict[str, Any]) -> Mark | None:
    """The training mark of a message or of a content part; None without one.

    Raises RowError when a value is not 0, 1, true or false, or when two marks disagree.
    """
    found: Mark | None = None
    for key, value in holder.items():
        if key not in TRAINING_MARKS or value is None:
            continue
        if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
            raise RowError(f"{key} is {_shown(value)}; there are no weights: write true or false")
        mark = Mark(key, value, bool(value) is TRAINING_MARKS[key])
        if found is not None and found.trained is not mark.trained:
            raise RowError(f"the training marks {found} and {mark} disagree; keep one of them")
        found = found or mark
    return found


def refuse_unknown_marks(holder: dict[str, Any]) -> None:
    """Raises RowError for a key that looks like a training mark but is not a known one (train_detail, lossFactor)."""
    for key, value in holder.items():
        if key not in TRAINING_MARKS and value not in EMPTY and _LOOKS_LIKE_MARK.search(snake_case(key)):
            raise RowError(
                f"{key[:40]} is {_shown(value)}; it looks like a training mark but is not a known one: mark the "
                "complete message with train true or false, or remove the key"
            )


def mark_of_parts(message: Mark | None, parts: list[Mark | None]) -> Mark | None:
    """The mark of a message whose content parts may have marks too. Raises RowError unless all agree."""
    given = [mark for mark in parts if mark is not None]
    if not given:
        return message
    default = True if message is None else message.trained
    if {default if mark is None else mark.trained for mark in parts} != {given[0].trained} or (
        message is not None and message.trained is not given[0].trained
    ):
        raise RowError(
            f"its content parts differ in their training marks ({given[0]}); a message is trained completely or not "
            "at all: mark all of its parts alike"
        )
    return given[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
