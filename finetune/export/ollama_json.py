"""JSON as Python writes it, in Go's text/template: Ollama's own `json` omits spaces and escapes `<`, `>` and `&`.

The definitions are in ollama_templates/shared. Written for the values that Ollama passes to a template: map[string]any
(whose keys come sorted), []any, and Ollama's structs for tools, whose fields are written in the order in which schemas
are usually written (name, description, parameters; type, properties, required).
"""

from __future__ import annotations

import re
from pathlib import Path

SHARED = Path(__file__).with_name("ollama_templates") / "shared"
MAX_DEPTH = 12  # of indentation; deeper values are indented like this one
INDENT = 4


def definitions(body: str, comma: str, colon: str) -> str:
    """The definitions that `body` uses: "string", "trim", "value", "object", "function", "tool", and "tool 0".

    comma, colon  separators, as Python's json.dumps takes them; "tool 0" is indented as by json.dumps(indent=4)
    """
    if "{{ template" not in body:
        return ""
    text = _read("strings")
    if '"tool 0"' in body:
        text += "".join(_expand(_read("json"), ",", ": ", depth) for depth in range(MAX_DEPTH + 1))
        text += _expand(_read("tools"), ",", ": ", 0)
    text += _expand(_read("json") + _read("tools"), comma, colon, None)
    return text


def _read(name: str) -> str:
    """A file of definitions without comments, and without the white space that Go trims before `{{-`."""
    text = (SHARED / f"{name}.gotmpl").read_text(encoding="utf-8")
    text = re.sub(r"\{\{- /\*.*?\*/\}\}", "", text)
    return re.sub(r"\s*\{\{-", "{{", text).strip()


def _expand(text: str, comma: str, colon: str, depth: int | None) -> str:
    """Fill the placeholders for values at one depth of indentation, or on one line (`depth` None).

    @0, @1, …  in a definition's name: the depth of the value plus that number
    @LINE1     line break and indentation for that depth
    @NEXT1     separates the members of an object or list: a comma, except before the first one, and @LINE1
    @COLON     between key and value
    """

    def fill(match: re.Match[str]) -> str:
        kind, offset = match[1], int(match[2] or 0)
        if kind == "COLON":
            return f'{{{{ "{colon}" }}}}'
        if kind is None:
            return "" if depth is None else f" {min(depth + offset, MAX_DEPTH)}"
        line = "" if depth is None else f'{{{{ "\\n{" " * INDENT * (depth + offset)}" }}}}'
        return line if kind == "LINE" else f"{{{{ if $comma }}}}{comma}{{{{ end }}}}{{{{ $comma = true }}}}{line}"

    return re.sub(r"@(LINE|NEXT|COLON)?(\d?)", fill, text)
