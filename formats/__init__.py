"""How a conversation becomes tokens and labels, and how generated text becomes calls again.

A format is one Jinja chat template and one small module. `encode` is the only place that writes a label. Nothing in
this package imports torch; a loaded tokenizer is always passed in.
"""

from __future__ import annotations

from formats.base import Format, FormatError, Parsed, render
from formats.choosing import check_format_name, choose_format, get_format
from formats.escape import decode, escape_conversation, unescape
from formats.masks import IGNORE_INDEX, Encoded, Sequence, encode, encode_prompt
from formats.registry import FORMATS, register
from formats.tokens import check_tokenizer

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
    "Encoded",
    "Format",
    "FormatError",
    "Parsed",
    "Sequence",
    "check_format_name",
    "check_tokenizer",
    "choose_format",
    "decode",
    "encode",
    "encode_prompt",
    "escape_conversation",
    "get_format",
    "register",
    "render",
    "unescape",
]
