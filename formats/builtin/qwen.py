"""Qwen2.5 and Qwen3 (Hermes tool calls); the variant follows the model's own template or vocabulary."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from formats.base import Format, Ollama, read_template
from formats.calls import parse_hermes
from formats.probing import default_system, thinks
from formats.tokens import added_tokens

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """With Qwen2.5's default system text, Qwen3's reasoning or neither, as the model was trained."""
    if tokenizer.chat_template:
        system, hybrid = default_system(tokenizer), thinks(tokenizer)
    else:
        hybrid = "<think>" in added_tokens(tokenizer)
        system = "" if hybrid else QWEN25_SYSTEM
    fmt = fmt.with_kwargs(default_system=system, hybrid=hybrid)
    if not hybrid:
        return fmt
    # Without thinking the empty block belongs to the prompt, so only the answer's text is trained.
    return replace(fmt.with_kwargs(enable_thinking=False), thinking="enable_thinking", reasoning=True)


def detect(added: Set[str], template: str) -> str | None:
    matches = {"<|im_start|>", "<|im_end|>", "<tool_call>"} <= added
    return "the tokenizer has <|im_start|> and <tool_call>, as Qwen has" if matches else None


FORMAT = Format(
    "qwen",
    read_template(__file__),
    end_of_turn=("<|im_end|>",),
    control_tokens=("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>"),
    call_markers=("<tool_call>", "</tool_call>"),
    template_kwargs={"default_system": QWEN25_SYSTEM, "hybrid": False},
    read_calls=parse_hermes,
    adapt=adapt,
    detect=detect,
    detect_order=30,
    tokens=("<|im_start|>", "<|im_end|>"),
    ollama=Ollama("qwen", "<tool_call>", parser="qwen3"),
)
