"""A format by its name, and which one fits a tokenizer."""

from __future__ import annotations

from typing import Any

from formats import native, yaml_format
from formats.base import Format, FormatError
from formats.registry import FORMATS, load_entry_points, register
from formats.tokens import added_tokens

register(native.FORMAT)


def get_format(name: str, tokenizer: Any = None) -> Format:
    """The format called `name`, of a YAML file, or chosen by `auto`; with a tokenizer, the variant its model knows.

    Raises FormatError for an unknown name, and for `native` and `auto` without a tokenizer.
    """
    load_entry_points()
    if tokenizer is None and name in ("auto", "native"):
        raise FormatError(f"format {name} needs a tokenizer")
    if name == "auto":
        return choose_format(tokenizer)[0]
    if name in FORMATS:
        fmt = FORMATS[name]
        return fmt.adapt(fmt, tokenizer) if fmt.adapt and tokenizer is not None else fmt
    if name.endswith((".yaml", ".yml")):
        return yaml_format.load(name, None if tokenizer is None else _turn_layout(tokenizer))
    raise FormatError(f"unknown format {name!r}; known: {', '.join(FORMATS)}, auto, or a YAML file of four strings")


def choose_format(tokenizer: Any) -> tuple[Format, str]:
    """(format, one sentence why) for `--format auto`.

    A registered template that the tokenizer carries (as a trained model does) wins; otherwise `Format.detect` decides.
    Raises FormatError when nothing fits.
    """
    load_entry_points()
    own = str(tokenizer.chat_template or "")
    for name, fmt in FORMATS.items():
        if (pinned := fmt.pinned_in(own)) is not None:
            return get_format(name, tokenizer).with_kwargs(**pinned), f"the tokenizer carries our template of {name}"
    fmt, reason = detect(set(added_tokens(tokenizer)), own)
    return get_format(fmt.name, tokenizer), reason


def detect(added: set[str], template: str) -> tuple[Format, str]:
    """(format, why) for a tokenizer's added tokens and its chat template, "" for none. Raises FormatError."""
    for fmt in sorted(FORMATS.values(), key=lambda fmt: fmt.detect_order):
        if fmt.detect and (reason := fmt.detect(added, template)):
            return fmt, reason
    raise FormatError("no format fits this tokenizer and it carries no chat template; choose one with --format")


def _turn_layout(tokenizer: Any) -> Format:
    """The format whose turns a YAML format uses: the tokenizer's own template, else the one that `auto` chooses."""
    return get_format("native" if tokenizer.chat_template else "auto", tokenizer)
