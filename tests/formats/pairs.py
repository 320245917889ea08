"""Every format with every real tokenizer it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from formats import Format, get_format
from tests import parts


class Pair(NamedTuple):
    """A format on a vocabulary; `template` is a published template to carry, `tokens` control tokens lent to it."""

    format: str
    vocabulary: str
    template: str = ""
    tokens: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        lent = " + its control tokens" if self.tokens else ""
        return f"{self.vocabulary}{lent}{', ' + Path(self.template).stem if self.template else ''}"

    def load(self) -> tuple[Any, Format]:
        text = parts.reference_template(self.template) if self.template else None
        tokenizer = (
            parts.fresh_tokenizer(self.vocabulary, text, self.tokens)
            if text or self.tokens
            else parts.tokenizer(self.vocabulary)
        )
        return tokenizer, get_format(self.format, tokenizer)


PAIRS = [
    Pair("llama3-function", "llama3"),
    Pair("kanana", "llama3"),
    Pair("llama3", "llama3"),
    Pair("llama3-pythonic", "llama3"),
    Pair("qwen", "qwen2.5"),
    Pair("qwen", "qwen3"),
    Pair("qwen", "qwen3", "qwen3_instruct_2507"),
    Pair("qwen-xml", "qwen3", "qwen3_5_nothink"),
    Pair("qwen-xml", "qwen3", "qwen3_5_think"),
    Pair("qwen-xml", "qwen3", "qwen3_6"),
    Pair("qwen-xml", "qwen3", "qwen3_8"),
    Pair("mistral", "mistral-v1"),
    Pair("mistral", "mistral-v3"),
    Pair("mistral", "mistral-v7"),
    Pair("mistral", "mistral-tekken"),
    Pair("mistral-v11", "mistral-tekken", tokens=parts.MISTRAL_ARGS),
    Pair("mistral-v13", "mistral-tekken", tokens=parts.MISTRAL_ARGS),
    Pair("chatml", "smollm2"),
    Pair("chatml", "qwen3"),
    Pair("gemma", "llama3", tokens=parts.GEMMA_TOKENS),
    Pair("phi4-mini", "qwen2.5", tokens=parts.PHI4_TOKENS),
    Pair("plain", "smollm2"),
    Pair("plain", "mistral-v3"),
    Pair("native", "qwen2.5"),
    Pair("native", "qwen3"),
    Pair("native", "qwen3", "qwen3_6"),
    Pair("native", "qwen3", "qwen3_8"),
    Pair("native", "llama3", "llama3_1"),
    Pair("native", "llama3", "llama3_2"),
    Pair("native", "smollm2"),
    Pair("native", "mistral-v3"),
    Pair("native", "mistral-v7"),
    Pair("native", "mistral-tekken"),
    Pair("tool-reasoning", "mistral-v1"),
]
