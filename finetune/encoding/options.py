"""What decides token ids and labels besides data, format and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from finetune.errors import UserError


@dataclass(frozen=True)
class EncodingOptions:
    """Options of training, under the names of their flags; the first five are explained at `formats.encode`.

    overlong        "drop" omits a longer sequence, "trim_turns" removes the oldest turns (system messages and tools
                    stay) until the rest fits, "error" raises UserError; an answer is never cut
    max_seq_length  in tokens; None: no limit
    max_positions   the model's, if they are fewer than max_seq_length: the limit instead; None: no limit by the model
    """

    train_on: str = "all"
    control_tokens: str = "escape"
    reasoning: str = "keep"
    train_reasoning: str = "on"
    allow_unreadable_calls: bool = False
    overlong: str = "drop"
    max_seq_length: int | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if self.overlong not in ("drop", "trim_turns", "error"):
            raise UserError(f"overlong is {self.overlong!r}; choose drop, trim_turns or error")
        if None not in (self.max_positions, self.max_seq_length) and self.max_positions >= self.max_seq_length:
            object.__setattr__(self, "max_positions", None)

    @classmethod
    def of(cls, flags: Any, **changes: Any) -> EncodingOptions:
        """Those of parsed flags, settings or a mapping; what they do not have gets its default.

        changes  values that take the place of those of `flags`
        """
        given = flags if isinstance(flags, Mapping) else vars(flags)
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given} | changes)

    @property
    def limit(self) -> int | None:
        """The maximum length of a sequence in tokens."""
        return self.max_positions or self.max_seq_length

    @property
    def overlong_reason(self) -> str:
        return "longer than the model's positions" if self.max_positions else "longer than max_seq_length"

    @property
    def of_format(self) -> dict[str, Any]:
        """The keyword arguments of `formats.encode`."""
        values = asdict(self)
        for name in ("overlong", "max_seq_length", "max_positions"):
            del values[name]
        return values | {"max_tokens": self.limit}


DEFAULT_OPTIONS = EncodingOptions()
