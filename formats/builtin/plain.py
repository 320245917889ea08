r"""`User: …\nAssistant: …` and the tokenizer's end token, for models without a chat template. No tools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats.base import Format, FormatError, Ollama, Parsed, read_template

TURN_STARTS = ("\nUser:", "\nAssistant:", "\nSystem:")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """The answer: the text up to where the model starts to write the next turn itself."""
    ends = [at for mark in TURN_STARTS if (at := text.find(mark)) >= 0]
    return Parsed(content=text[: min(ends, default=len(text))].strip())


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """With the tokenizer's end token, and its start token where it adds one to a text."""
    end = tokenizer.eos_token
    if not end:
        raise FormatError("format plain: the tokenizer has no end token, so generation would not stop")
    if end == tokenizer.bos_token:
        raise FormatError(f"format plain: {end} is both start and end token of this tokenizer; correct eos_token first")
    adds_start = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = tokenizer.bos_token if adds_start else None
    return replace(fmt.with_kwargs(start=start or "", end=end), end_of_turn=(end,))


FORMAT = Format(
    "plain",
    read_template(__file__),
    end_of_turn=("</s>",),
    control_tokens=TURN_STARTS,
    template_kwargs={"start": "", "end": "</s>"},
    read_calls=parse,
    adapt=adapt,
    has_tools=False,
    ollama=Ollama("plain", stop=TURN_STARTS),
)
