"""ChatML with Hermes tool calls, kept short for small models; tool results are turns of their own."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from formats.base import Format, Ollama, read_template
from formats.calls import parse_hermes
from formats.probing import default_system


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """With the system text of the model's own template, so that plain conversations render as it does."""
    return fmt.with_kwargs(default_system=default_system(tokenizer))


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<|im_start|>", "<|im_end|>"} <= added and "tool_call" not in template
    return "the tokenizer has <|im_start|>, and its template has no tools" if matches else None


FORMAT = Format(
    "chatml",
    read_template(__file__),
    end_of_turn=("<|im_end|>",),
    control_tokens=("<|im_start|>", "<|im_end|>"),
    call_markers=("<tool_call>", "</tool_call>"),
    template_kwargs={"default_system": ""},
    read_calls=parse_hermes,
    adapt=adapt,
    detect=detect,
    detect_order=40,
    tokens=("<|im_start|>", "<|im_end|>"),
    ollama=Ollama("chatml", "<tool_call>", parser="qwen3", compact_json=True),
)
