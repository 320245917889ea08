"""A format by its name, and which one fits a tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formats import native, text_calls, yaml_format
from formats.base import Format, FormatError
from formats.comparison import compare, shows_tools
from formats.probing import own_template
from formats.registry import FORMATS, load_entry_points, register
from formats.tokens import added_tokens, check_tokenizer

OWN_TEMPLATE = ("native", "native-tools", "tool-reasoning")  # formats that render with the tokenizer's own template

register(native.FORMAT)
register(text_calls.FORMAT)
register(text_calls.TOOL_REASONING)


def get_format(name: str, tokenizer: Any = None) -> Format:
    """The format called `name`, of a YAML file, or chosen by `auto`; with a tokenizer, the variant its model knows.

    Raises FormatError for an unknown name, and for `native` and `auto` without a tokenizer.
    """
    load_entry_points()
    if tokenizer is None and name in ("auto", *OWN_TEMPLATE) and not (name in FORMATS and FORMATS[name].read_calls):
        raise FormatError(f"format {name} needs a tokenizer")
    if name == "auto":
        return choose_format(tokenizer)[0]
    if name in FORMATS:
        fmt = FORMATS[name]
        return fmt.adapt(fmt, tokenizer) if fmt.adapt and tokenizer is not None else fmt
    if name.endswith((".yaml", ".yml")):
        return yaml_format.load(name, tokenizer, None if tokenizer is None else _turn_layout(tokenizer))
    raise FormatError(_unknown(name))


def check_format_name(name: str) -> None:
    """FormatError for a name that `get_format` would not know, before there is a tokenizer."""
    load_entry_points()
    if name in ("auto", *FORMATS):
        return
    if not name.endswith((".yaml", ".yml")):
        raise FormatError(_unknown(name))
    if not Path(name).is_file():
        raise FormatError(f"format {name}: there is no such file")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, ["auto", *FORMATS], n=1)
    advice = f"did you mean {close[0]}?" if close else "choose one of the known formats"
    return f"unknown format {name!r}; {advice} (known: {', '.join(FORMATS)}, auto, or a YAML file of four strings)"


def choose_format(tokenizer: Any) -> tuple[Format, str]:
    """(format, one sentence why) for `--format auto`.

    A registered template that the tokenizer carries (as a trained model does) wins. Then a named format must render
    the very text of the tokenizer's own template, else the own template itself is used. Only a tokenizer without a
    template gets a format by its control tokens (`Format.detect`). Raises FormatError when nothing fits.
    """
    load_entry_points()
    own, added = own_template(tokenizer), set(added_tokens(tokenizer))
    for name, fmt in FORMATS.items():
        if text_calls.PREAMBLE in own and name in (text_calls.FORMAT.name, text_calls.TOOL_REASONING.name):
            fmt = get_format(name, tokenizer)  # its template is made for the tokenizer's own
        if (pinned := fmt.pinned_in(own)) is not None:
            return get_format(name, tokenizer).with_kwargs(**pinned), f"the tokenizer carries our template of {name}"
    if not own:
        fmt, reason = detect(added, "")
        return get_format(fmt.name, tokenizer), reason
    has_tools = native.writes_tools(tokenizer)
    for fmt in _candidates(added, own, tokenizer):
        found = compare(fmt, tokenizer)
        if found.difference is None and (found.with_tools or not has_tools):
            missing = "" if has_tools else ", which has no place for tools,"
            return fmt, f"the tokenizer's own template{missing} renders as {fmt.name} does"
    native.raise_if_broken(tokenizer)
    if has_tools:
        return get_format("native", tokenizer), "no named format renders what the tokenizer's own template does"
    if shows_tools(tokenizer):
        name = "native-tools" if text_calls.spelling(tokenizer) else "native"
        return get_format(name, tokenizer), "the tokenizer's own template shows tools but writes no calls"
    why = "the tokenizer's own template has no place for tools; tools and calls are written into its messages"
    return get_format("native-tools", tokenizer), why


def alternatives(fmt: Format, tokenizer: Any) -> Iterator[Format]:
    """The other formats that the tokenizer's model can be trained with, the one that `auto` chooses first."""
    chosen = []
    with contextlib.suppress(FormatError):  # its own template is broken, which the user has avoided by --format
        chosen.append(choose_format(tokenizer)[0])
    named = _candidates(set(added_tokens(tokenizer)), own_template(tokenizer), tokenizer)
    for other in itertools.chain(chosen, named):
        if other.name != fmt.name:
            yield other


def _candidates(added: set[str], own: str, tokenizer: Any) -> Iterator[Format]:
    """The named formats whose control tokens the tokenizer has; those that its tokens suggest first."""
    named = [fmt for fmt in FORMATS.values() if fmt.name not in OWN_TEMPLATE]
    for fmt in sorted(named, key=lambda fmt: (not (fmt.detect and fmt.detect(added, own)), fmt.detect_order)):
        try:
            variant = get_format(fmt.name, tokenizer)
            check_tokenizer(tokenizer, variant)
        except FormatError:
            continue
        yield variant


def detect(added: set[str], template: str) -> tuple[Format, str]:
    """(format, why) for a tokenizer's added tokens and its chat template, "" for none. Raises FormatError."""
    for fmt in sorted(FORMATS.values(), key=lambda fmt: fmt.detect_order):
        if fmt.detect and (reason := fmt.detect(added, template)):
            return fmt, reason
    raise FormatError("no format fits this tokenizer and it carries no chat template; choose one with --format")


def _turn_layout(tokenizer: Any) -> Format:
    """The format whose turns a YAML format uses: the tokenizer's own template, else the one that `auto` chooses."""
    return get_format("native" if tokenizer.chat_template else "auto", tokenizer)
