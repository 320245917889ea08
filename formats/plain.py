"""`User: …\\nAssistant: …` and the tokenizer's end token, for models without a chat template. No tools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats.base import Format, FormatError, Parsed, read_template

TEMPLATE = read_template("plain")
CONTROL_TOKENS = ("\nUser:", "\nAssistant:", "\nSystem:")
TEMPLATE_KWARGS = {"start": "", "end": "</s>"}
END_OF_TURN = ("</s>",)


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """The answer: the text up to where the model starts to write the next turn itself."""
    ends = [at for mark in CONTROL_TOKENS if (at := text.find(mark)) >= 0]
    return Parsed(content=text[: min(ends, default=len(text))].strip())


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """With the tokenizer's own start token, where it adds one to a text, and its end token."""
    if not tokenizer.eos_token:
        raise FormatError("format plain: the tokenizer has no end token, so generation would not stop")
    start = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    end = tokenizer.eos_token
    if end == tokenizer.bos_token:
        raise FormatError(f"format plain: {end} is both start and end token of this tokenizer; correct eos_token first")
    return replace(fmt.with_kwargs(start=start or "", end=end), end_of_turn=(end,))


FORMAT = Format("plain", TEMPLATE, END_OF_TURN, CONTROL_TOKENS, (), TEMPLATE_KWARGS, parse, adapt)
