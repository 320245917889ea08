"""ChatML with Hermes tool calls, kept short for small models; tool results are turns of their own."""

from __future__ import annotations

from typing import Any

from formats.base import Format, read_template
from formats.calls import parse_hermes
from formats.probing import default_system

TEMPLATE = read_template("chatml")
END_OF_TURN = ("<|im_end|>",)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
CALL_MARKERS = ("<tool_call>", "</tool_call>")
TEMPLATE_KWARGS = {"default_system": ""}
parse = parse_hermes


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """With the system text that the model's own template adds, so that plain conversations render as it does."""
    return fmt.with_kwargs(default_system=default_system(tokenizer, "<|im_start|>system\n", "<|im_end|>"))


FORMAT = Format(
    "chatml",
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
