"""A call format from four or five strings in a YAML file, without a module or a Jinja template.

    start: "<call>"         before a call
    separator: "|"          between the function's name and its arguments (a JSON object)
    end: "</call>"          after a call; "": a call begins a line and ends with its arguments
    tools: system           where the tools go: system, first_user or last_user
    reasoning: "\nWhy: "    optional: before the text of a turn, which then stands behind its calls

Turns are laid out by the template of another format; calls become part of the assistant's text there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats import text_calls
from formats.base import Format, FormatError
from formats.delimited import DelimitedCallParser
from formats.safe_yaml import load_yaml

TOOL_PLACES = ("system", "first_user", "last_user")
KEYS = ("start", "separator", "end", "tools")
OPTIONAL = "reasoning"


def load(path: str | Path, tokenizer: Any = None, base: Format | None = None) -> Format:
    """The format of a YAML file with the turn layout of `base`; without a tokenizer it can only parse.

    Raises FormatError that names the file and the key.
    """
    path = Path(path)
    try:
        given = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"format file {path}: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"format file {path} is not valid YAML: {error}") from error
    if (
        not isinstance(given, dict)
        or given.keys() - {OPTIONAL} != set(KEYS)
        or not all(isinstance(value, str) for value in given.values())
    ):
        raise FormatError(
            f"format file {path} must hold exactly the four strings {', '.join(KEYS)}, and may hold {OPTIONAL}"
        )
    for key in ("start", "separator", OPTIONAL):
        text = given.get(key, "-") if key == "separator" else given.get(key, "-").strip()  # it may be white space
        if not text:
            raise FormatError(f"format file {path}: {key} must not be empty")
    if given["end"] and not given["end"].strip():
        raise FormatError(f'format file {path}: end must not be white space; write "" for none')
    if given["tools"] not in TOOL_PLACES:
        raise FormatError(f"format file {path}: tools must be one of {', '.join(TOOL_PLACES)}, not {given['tools']!r}")
    parser = DelimitedCallParser(given["start"], given["separator"], given["end"], given.get(OPTIONAL, ""))
    spelling = text_calls.named(parser, place=given["tools"])
    fmt = Format(path.stem, "", (), call_markers=text_calls.call_markers(spelling), read_calls=parser)
    return fmt if tokenizer is None else text_calls.adapt(fmt, tokenizer, spelling, base)
