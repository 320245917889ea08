"""What config.json allows: the positions a model was made for, and the token ids its embeddings have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Without a run's --max_seq_length: some of Unsloth's caches grow with the limit, and models allow up to ten million.
MAX_DEFAULT_CONTEXT = 32_768
# Attributes of tokenizers of multimodal families; their text-only models have no embeddings for these tokens.
PLACEHOLDER_NAMES = ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision")


@dataclass(frozen=True)
class LengthLimit:
    """The maximum length of a row: --max_seq_length, or the model's positions if they are fewer."""

    requested: int
    positions: int | None

    @property
    def tokens(self) -> int:
        return min(self.requested, self.positions or self.requested)

    @property
    def is_lowered(self) -> bool:
        """Whether the model allows less than was requested."""
        return self.tokens < self.requested

    def as_config(self) -> dict[str, int | None]:
        """The entries of experiment_config.json; the flag itself is among its flags."""
        return {"max_seq_length": self.tokens, "model_positions": self.positions}

    def message(self, model: str) -> str:
        """One line for the log of a run whose limit is lowered."""
        return (
            f"rows are limited to {self.tokens:,} tokens: model {model} was made for {self.positions:,} positions, "
            f"which --max_seq_length {self.requested:,} does not change"
        )


def model_positions(config: PreTrainedConfig) -> int | None:
    """Number of positions that the model was made for; None when config.json does not limit them.

    This is max_position_embeddings. Only YaRN can allow more: some models keep the number before scaling there, and
    YaRN states the original length and its factor. Linear scaling does not say whether its factor is included.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) == "yarn":
        original = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(original * (rope.get("factor") or 1)))
    return positions


def context_limit(model: Any) -> int | None:
    """Tokens that a loaded model may read and write in one conversation: the limit it was loaded with; None: unknown.

    Unsloth keeps the limit in `max_seq_length` and cuts longer inputs without an error.
    """
    limits = (model_positions(model.config), getattr(model, "max_seq_length", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int | None, name: str) -> None:
    """UserError when the tokenizer can produce an id for which the model has no embedding; `rows`: embeddings.

    Placeholders for images and sounds are no reason: text-only models of multimodal families lack them.
    """
    if rows is None or len(tokenizer) <= rows:
        return
    placeholders = {
        value
        for key, value in (getattr(tokenizer, "init_kwargs", None) or {}).items()
        if isinstance(value, str) and key.endswith("_token") and key.startswith(PLACEHOLDER_NAMES)
    }
    unknown = [token for token, index in tokenizer.get_vocab().items() if index >= rows and token not in placeholders]
    if unknown:
        shown = ", ".join(sorted(unknown)[:3]) + " …" * (len(unknown) > 3)
        raise UserError(
            f"model {name}: the tokenizer has {len(tokenizer):,} tokens, but the model has embeddings for {rows:,} "
            f"(none for {shown}); use the tokenizer that belongs to the model, or resize the embeddings and save both"
        )
