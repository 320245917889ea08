"""Llama 3.2 and 3.3 with calls as a Python list, several in one turn, no text beside them."""

from __future__ import annotations

from formats.base import Format, read_template
from formats.llama3 import CONTROL_TOKENS, END_OF_TURN, TEMPLATE_KWARGS
from formats.pythonic import parse

TEMPLATE = read_template("llama3_pythonic")

FORMAT = Format(
    "llama3-pythonic",
    TEMPLATE,
    END_OF_TURN,
    CONTROL_TOKENS,
    (),
    TEMPLATE_KWARGS,
    parse,
    vllm_parser="pythonic",
    tokens=CONTROL_TOKENS,
)
