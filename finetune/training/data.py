"""The rows of a run: conversations, tokens, and the checks that enough of them are left."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.models.bundled import cache_dir
from finetune.models.limits import LengthLimit
from finetune.progress import counted
from finetune.settings import Settings
from formats import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.encoding.encoded import EncodedRows
    from finetune.encoding.options import EncodingOptions
    from finetune.reading.load_result import LoadResult

log = logging.getLogger("sandwich")
MAX_DROPPED_FRACTION = 0.5  # of the rows; a run that loses more would not train what it was meant to


@dataclass
class RunData:
    """Conversations and, after `encode`, their tokens; `held_out` and `eval_rows` are None without evaluation."""

    train: LoadResult
    held_out: LoadResult | None = None
    rows: EncodedRows = field(init=False)
    eval_rows: EncodedRows | None = None

    def encode(self, tokenizer: PreTrainedTokenizerBase, fmt: Format, settings: Settings, limit: LengthLimit) -> None:
        """Make token ids and labels, or take them from the cache. UserError when too few rows are left."""
        from finetune.encoding.encode import encode_conversations
        from finetune.encoding.options import EncodingOptions

        options = EncodingOptions.of(settings, max_seq_length=limit.requested, max_positions=limit.positions)

        def encoded(loaded: LoadResult) -> EncodedRows:
            return encode_conversations(
                loaded.conversations, tokenizer, fmt, options, cache_dir=cache_dir() / "tokens",
                origins=loaded.origins, fingerprint=loaded.fingerprint,
            )  # fmt: skip

        self.rows = encoded(self.train)
        self.eval_rows = encoded(self.held_out) if self.held_out is not None else None
        if self.rows.report["refused"] and (name := self._better_format(tokenizer, fmt, options)):
            log.warning("%s cannot be written in format %s; --format %s has a place for what they need",
                        counted(self.rows.report["refused"], "row"), fmt.name, name)  # fmt: skip
        check_report(self.rows.report, can_raise_limit=not limit.is_lowered)
        if self.eval_rows is not None and not self.eval_rows.report["trained_tokens"]:
            raise UserError(f"no rows left to evaluate on: {row_counts(self.eval_rows.report)}")

    def _better_format(self, tokenizer: PreTrainedTokenizerBase, fmt: Format, options: EncodingOptions) -> str | None:
        """A format of this tokenizer that expresses a row of each kind that `fmt` refuses; None where there is none."""
        from finetune.encoding.rows import encode_answers
        from formats.choosing import alternatives

        examples = {reason: row for row, reason in self.rows.left_out if reason.startswith("refused: ")}
        rows = [self.train.conversations[row] for row in examples.values()]
        for other in alternatives(fmt, tokenizer):
            if all(encode_answers(row, tokenizer, other, options).status != "refused" for row in rows):
                return other.name
        return None


def check_report(report: dict[str, Any], *, can_raise_limit: bool = True) -> None:
    """UserError when no token would be trained, or when most rows were dropped; `report` is that of EncodedRows.

    can_raise_limit  whether a higher --max_seq_length would keep longer rows
    """
    if not report["trained_tokens"]:
        raise UserError(f"no rows left to train on: {row_counts(report)}")
    if report["rows"] - report["kept"] > MAX_DROPPED_FRACTION * report["rows"]:
        raise UserError(
            f"most rows would be dropped: {row_counts(report)}; "
            + ("raise --max_seq_length, " if can_raise_limit else "choose a model with more positions, ")
            + "choose another --format or --overlong trim_turns, or fix the data"
        )


def row_counts(report: dict[str, Any]) -> str:
    """Rows read and kept, with the first reasons for dropping the others."""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(report["reasons"].items())[:3])
    return f"{report['rows']} read, {report['kept']} kept ({reasons or 'the data is empty'})"
