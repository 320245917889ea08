"""Llama 3.2 and 3.3 with calls as a Python list, several in one turn, without text beside them."""

from __future__ import annotations

from dataclasses import replace

from formats.base import read_template
from formats.builtin import llama3
from formats.pythonic import OLLAMA, parse

FORMAT = replace(
    llama3.FORMAT,
    name="llama3-pythonic",
    template=read_template(__file__),
    read_calls=parse,
    detect=None,
    vllm_parser=None,
    ollama=OLLAMA,
)
