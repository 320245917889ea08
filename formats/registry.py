"""The list of formats, and which one fits a tokenizer."""

from __future__ import annotations

from typing import Any

from formats import (
    chatml,
    gemma,
    kanana,
    llama3,
    llama3_function,
    llama3_pythonic,
    mistral,
    native,
    phi4_mini,
    plain,
    qwen,
    qwen_xml,
    user_yaml,
)
from formats.base import Format, FormatError
from formats.tokens import added_tokens

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(llama3_function.FORMAT, kanana.FORMAT, llama3.FORMAT, llama3_pythonic.FORMAT, qwen.FORMAT, qwen_xml.FORMAT),
        *(mistral.FORMAT, *mistral.FORMATS, chatml.FORMAT, gemma.FORMAT, phi4_mini.FORMAT, plain.FORMAT, native.FORMAT),
    )
}


def get_format(name: str, tokenizer: Any = None) -> Format:
    """The format called `name`, a user's YAML file, or `auto`; with a tokenizer, in the variant its model knows.

    Raises FormatError for an unknown name and for `native` and `auto` without a tokenizer.
    """
    if name == "auto":
        if tokenizer is None:
            raise FormatError("format auto needs a tokenizer to look at")
        return choose_format(tokenizer)[0]
    if name not in FORMATS and name.endswith((".yaml", ".yml")):
        return user_yaml.load(name, None if tokenizer is None else _layout(tokenizer))
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; known: {', '.join(FORMATS)}, auto, or a YAML file of four strings")
    fmt = FORMATS[name]
    if fmt.adapt is None:
        return fmt
    if tokenizer is not None:
        return fmt.adapt(fmt, tokenizer)
    if not fmt.template:
        raise FormatError(f"format {name} needs a tokenizer to look at")
    return fmt


def choose_format(tokenizer: Any) -> tuple[Format, str]:
    """(format, one sentence why) for `--format auto`: a template that one of ours is in decides, as a trained model
    carries it; else control tokens, then the own template.

    Raises FormatError when nothing fits.
    """
    have = set(added_tokens(tokenizer))
    own = str(tokenizer.chat_template or "")
    for name, fmt in FORMATS.items():
        if (pinned := fmt.pinned_in(own)) is not None:
            return get_format(name, tokenizer).with_kwargs(**pinned), f"the tokenizer carries our template of {name}"
    name, reason = _guess(have, own)
    if name is None:
        raise FormatError("no format fits this tokenizer and it carries no chat template; choose one with --format")
    return get_format(name, tokenizer), reason


def _guess(have: set[str], own: str) -> tuple[str | None, str]:
    if {"<|start_header_id|>", "<|eot_id|>"} <= have:
        return "llama3", "the tokenizer has Llama 3's <|start_header_id|> and <|eot_id|>"
    if {"<|im_start|>", "<|im_end|>"} <= have:
        if "<parameter=" in own:
            return "qwen-xml", "the tokenizer has <|im_start|>, and its template writes calls as XML"
        if "<tool_call>" in have:
            return "qwen", "the tokenizer has <|im_start|> and <tool_call>, as Qwen has"
        if "tool_call" not in own:
            return "chatml", "the tokenizer has <|im_start|>, and its template knows no tools"
    if "[INST]" in have or "[INST]" in own:
        return "mistral", "the tokenizer has Mistral's [INST]"
    if {"<start_of_turn>", "<end_of_turn>"} <= have:
        return "gemma", "the tokenizer has Gemma's <start_of_turn>"
    if {"<|tool_call|>", "<|end|>"} <= have:
        return "phi4-mini", "the tokenizer has Phi-4-mini's <|tool_call|> and <|end|>"
    return ("native", "the tokenizer carries a template of its own") if own else (None, "")


def _layout(tokenizer: Any) -> Format:
    """The format whose turns are used: the own template, else the one that fits the control tokens."""
    return get_format("native", tokenizer) if tokenizer.chat_template else choose_format(tokenizer)[0]
