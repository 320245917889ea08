"""Llama 3 with `<function=name>{…}</function>` calls, several in a row, every turn ended by `<|eot_id|>`."""

from __future__ import annotations

from formats.base import Format, Ollama, read_template
from formats.builtin.llama3 import CONTROL_TOKENS
from formats.calls import parse_function_tag

FORMAT = Format(
    "llama3-function",
    read_template(__file__),
    end_of_turn=("<|eot_id|>",),
    control_tokens=CONTROL_TOKENS,
    call_markers=("<function=", "</function>"),
    read_calls=parse_function_tag,
    tokens=CONTROL_TOKENS,
    ollama=Ollama("llama3-function", "<function="),
)
