"""A call format from four strings in a YAML file, without a module or a Jinja template.

    start: "<call>"         before a call
    separator: "|"          between the function's name and its arguments (a JSON object)
    end: "</call>"          after a call
    tools: system           where the tools go: system, first_user or last_user

Turns are laid out by the template of another format; calls become part of the assistant's text there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.base import Format, FormatError, Parsed, read_template
from formats.calls import read_named_call, read_tagged
from formats.safe_yaml import load_yaml

TOOL_PLACES = ("system", "first_user", "last_user")
KEYS = ("start", "separator", "end", "tools")

# Rewrites the messages so that calls and tools are plain text; the template below it renders them.
PREAMBLE = read_template(__file__) + "\n"


@dataclass(frozen=True)
class DelimitedCallParser:
    """Parses calls written as start + name + separator + JSON object + end; a class, so that it can be pickled."""

    start: str
    separator: str
    end: str

    def __call__(self, text: str, tools: list[dict] | None = None) -> Parsed:
        return read_tagged(text, self.start, self.end, self._read_call)

    def _read_call(self, source: str, at: int) -> tuple[dict[str, Any], int]:
        call, end = read_named_call(source, at, self.separator)
        return {**call, "name": call["name"].strip()}, end


def load(path: str | Path, base: Format | None = None) -> Format:
    """The format of a YAML file with the turn layout of `base`; without `base` it can only parse.

    Raises FormatError that names the file and the key.
    """
    import yaml

    path = Path(path)
    try:
        given = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"format file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"format file {path} is not valid YAML: {error}") from error
    if (
        not isinstance(given, dict)
        or set(given) != set(KEYS)
        or not all(isinstance(value, str) for value in given.values())
    ):
        raise FormatError(f"format file {path} must hold exactly the four strings {', '.join(KEYS)}")
    for key in ("start", "separator", "end"):
        text = given[key] if key == "separator" else given[key].strip()  # a separator may be white space
        if not text:
            raise FormatError(f"format file {path}: {key} must not be empty")
    if given["tools"] not in TOOL_PLACES:
        raise FormatError(f"format file {path}: tools must be one of {', '.join(TOOL_PLACES)}, not {given['tools']!r}")
    return replace(
        base or Format("", "", ()),
        name=path.stem,
        template=_preamble(given) + base.template if base else "",
        call_markers=(given["start"], given["end"]),
        read_calls=DelimitedCallParser(given["start"], given["separator"], given["end"]),
        adapt=None,
        detect=None,
        untyped=False,
        has_tools=True,
        vllm_parser=None,
        ollama=None,
    )


def _preamble(given: dict[str, str]) -> str:
    variables = {
        "HINT": f"\nTo call one, write: {given['start']}name{given['separator']}{{arguments as JSON}}{given['end']}",
        "ROLE": "system" if given["tools"] == "system" else "user",
        "LAST": given["tools"] == "last_user",
        "START": given["start"],
        "SEPARATOR": given["separator"],
        "END": given["end"],
    }
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    return "".join(f"{{%- set {name} = {value} %}}\n" for name, value in literals.items()) + PREAMBLE
