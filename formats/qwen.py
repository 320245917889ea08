"""Qwen2.5 and Qwen3 (Hermes tool calls); the variant follows the model's own template or vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats.base import Format, read_template
from formats.calls import parse_hermes
from formats.probing import default_system, thinks
from formats.tokens import added_tokens

TEMPLATE = read_template("qwen")
END_OF_TURN = ("<|im_end|>",)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>")
CALL_MARKERS = ("<tool_call>", "</tool_call>")
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATE_KWARGS = {"default_system": QWEN25_SYSTEM, "hybrid": False}
parse = parse_hermes


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """Qwen2.5's default system text, Qwen3's reasoning or neither, as the model was trained."""
    if tokenizer.chat_template:
        system = default_system(tokenizer, "<|im_start|>system\n", "<|im_end|>")
        hybrid = thinks(tokenizer)
    else:
        hybrid = "<think>" in added_tokens(tokenizer)
        system = "" if hybrid else QWEN25_SYSTEM
    kwargs = {"default_system": system, "hybrid": hybrid}
    if not hybrid:
        return fmt.with_kwargs(**kwargs)
    # Without thinking the empty block is part of the prompt, so an answer's own words are all that is trained.
    return replace(fmt.with_kwargs(**kwargs, enable_thinking=False), thinking="enable_thinking", reasoning=True)


FORMAT = Format(
    "qwen",
    TEMPLATE,
    END_OF_TURN,
    CONTROL_TOKENS,
    CALL_MARKERS,
    TEMPLATE_KWARGS,
    parse,
    adapt,
    vllm_parser="hermes",
    tokens=("<|im_start|>", "<|im_end|>"),
)
