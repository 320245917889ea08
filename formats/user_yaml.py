"""A call format of one's own from four strings in a YAML file; no class and no Jinja.

    start: "<call>"         what stands before a call
    separator: "|"          between the function's name and its arguments (a JSON object)
    end: "</call>"          what stands behind a call
    tools: system           where the tools go: system, first_user or last_user

Turns are laid out as the tokenizer's own template does it; calls become part of the assistant's text there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.base import Format, FormatError, Parsed
from formats.calls import read_arguments, read_tagged

PLACES = ("system", "first_user", "last_user")
KEYS = ("start", "separator", "end", "tools")

# Rewrites the messages so that calls and tools are plain text, then hands over to the template below it.
_PREAMBLE = """\
{%- set own = namespace(messages=[], tools='', at=-1) %}
{%- if tools %}
    {%- set own.tools = 'You have access to the following functions:' %}
    {%- for tool in tools %}
        {%- set own.tools = own.tools + '\\n' + tool.function | tojson %}
    {%- endfor %}
    {%- set own.tools = own.tools + HINT %}
    {%- for message in messages %}
        {%- if message.role == ROLE and (LAST or own.at < 0) %}
            {%- set own.at = loop.index0 %}
        {%- endif %}
    {%- endfor %}
    {%- if own.at < 0 and ROLE == 'system' %}
        {%- set own.messages = [{'role': 'system', 'content': own.tools}] %}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- set text = namespace(value=message.content) %}
    {%- if loop.index0 == own.at %}
        {%- if ROLE == 'system' %}
            {%- set text.value = text.value + ('\\n\\n' if text.value else '') + own.tools %}
        {%- else %}
            {%- set text.value = own.tools + '\\n\\n' + text.value %}
        {%- endif %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set text.value = text.value + START + call.function.name + SEPARATOR %}
        {%- set text.value = text.value + call.function.arguments | tojson + END %}
    {%- endfor %}
    {%- set made = {'role': message.role, 'content': text.value} %}
    {%- if message.reasoning_content is string %}
        {%- set made = dict(made, reasoning_content=message.reasoning_content) %}
    {%- endif %}
    {%- if message.tool_call_id is string %}
        {%- set made = dict(made, tool_call_id=message.tool_call_id) %}
    {%- endif %}
    {%- set own.messages = own.messages + [made] %}
{%- endfor %}
{%- set messages = own.messages %}
{%- set tools = none %}
"""


@dataclass(frozen=True)
class FourStrings:
    """Reads calls written as start + name + separator + JSON object + end."""

    start: str
    separator: str
    end: str

    def __call__(self, text: str, tools: list[dict] | None = None) -> Parsed:
        return read_tagged(text, self.start, self.end, self._body)

    def _body(self, source: str, at: int) -> tuple[dict[str, Any], int]:
        close = source.find(self.separator, at)
        if close < 0:
            raise ValueError("the function's name is cut off")
        name = source[at:close].strip()
        arguments, end = read_arguments(source, close + len(self.separator), name)
        return {"name": name, "arguments": arguments}, end


def load(path: str | Path, base: Format | None = None) -> Format:
    """The format of a YAML file, as `build`; raises FormatError that names the file and the key."""
    import yaml

    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"format file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"format file {path} is no YAML: {error}") from error
    if (
        not isinstance(given, dict)
        or set(given) != set(KEYS)
        or not all(isinstance(value, str) for value in given.values())
    ):
        raise FormatError(f"format file {path} must hold exactly the four strings {', '.join(KEYS)}")
    return build(path.stem, given, base, str(path))


def build(name: str, given: dict[str, str], base: Format | None, where: str) -> Format:
    """The format of four strings under the turn layout of `base`; without one it can only parse."""
    for key in ("start", "separator", "end"):
        if not (given[key] if key == "separator" else given[key].strip()):  # a name may end at a space or a line end
            raise FormatError(f"format file {where}: {key} must not be empty")
    if given["tools"] not in PLACES:
        raise FormatError(f"format file {where}: tools must be one of {', '.join(PLACES)}, not {given['tools']!r}")
    parse = FourStrings(given["start"], given["separator"], given["end"])
    markers = (given["start"], given["end"])
    if base is None:
        return Format(name, "", (), call_markers=markers, read_calls=parse)
    return replace(
        base,
        name=name,
        template=_preamble(given) + base.template,
        call_markers=markers,
        read_calls=parse,
        vllm_parser=None,
        adapt=None,
        untyped=False,
    )


def _preamble(given: dict[str, str]) -> str:
    hint = f"\nTo call one, write: {given['start']}name{given['separator']}{{arguments as JSON}}{given['end']}"
    words = {
        "HINT": json.dumps(hint, ensure_ascii=False),
        "ROLE": json.dumps("system" if given["tools"] == "system" else "user"),
        "LAST": "true" if given["tools"] == "last_user" else "false",
        "START": json.dumps(given["start"], ensure_ascii=False),
        "SEPARATOR": json.dumps(given["separator"], ensure_ascii=False),
        "END": json.dumps(given["end"], ensure_ascii=False),
    }
    sets = "".join(f"{{%- set {word} = {value} %}}\n" for word, value in words.items())
    return sets + _PREAMBLE
