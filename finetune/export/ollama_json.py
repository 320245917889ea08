"""JSON as Python writes it, in Go's text/template: Ollama's own `json` leaves out spaces and escapes `<`, `>` and `&`.

Tools are written field by field in the order in which schemas are usually written (name, description, parameters;
type, properties, required), because Ollama keeps them in structs with an order of their own.
"""

from __future__ import annotations

DEEPEST = 12  # levels of indentation that are laid out; deeper ones repeat the last

# A string whose characters need no thought is written by `json`; any other byte by byte, whole characters at a time.
_STRING = (
    '{{ define "string" }}{{ if eq (json .) (printf "%q" .) }}{{ json . }}{{ else }}"{{ $s := . }}'
    "{{ range $i := len $s }}{{ $b := index $s $i }}"
    r"{{ if eq $b 34 }}\"{{ else if eq $b 92 }}\\{{ else if eq $b 10 }}\n{{ else if eq $b 13 }}\r"
    r"{{ else if eq $b 9 }}\t{{ else if eq $b 8 }}\b{{ else if eq $b 12 }}\f"
    r'{{ else if lt $b 32 }}{{ printf "\\u%04x" $b }}'
    '{{ else if or (lt $b 128) (ge $b 192) }}{{ printf "%.1s" (slice $s $i) }}{{ end }}{{ end }}"{{ end }}{{ end }}'
)
# Text between its first and its last character that is no ASCII white space. Templates know no arithmetic, so the
# last character is found by its first byte and printed by itself.
_TRIM = (
    '{{ define "trim" }}{{ $s := . }}{{ $from := -1 }}{{ $to := 0 }}'
    "{{ range $i := len $s }}{{ $b := index $s $i }}"
    "{{ if not (or (eq $b 32) (and (ge $b 9) (le $b 13)) (and (ge $b 28) (le $b 31))) }}"
    "{{ if lt $from 0 }}{{ $from = $i }}{{ end }}"
    "{{ if or (lt $b 128) (ge $b 192) }}{{ $to = $i }}{{ end }}{{ end }}{{ end }}"
    '{{ if ge $from 0 }}{{ slice $s $from $to }}{{ printf "%.1s" (slice $s $to) }}{{ end }}{{ end }}'
)
# Whole numbers as Python would write them back; everything else is a text.
_NUMBER = (
    '{{ define "number or string" }}{{ $s := . }}{{ $digits := gt (len $s) 0 }}'
    "{{ range $i := len $s }}{{ $b := index $s $i }}{{ if or (lt $b 48) (gt $b 57) }}{{ $digits = false }}"
    "{{ else if and (eq $b 48) (not $i) (gt (len $s) 1) }}{{ $digits = false }}{{ end }}{{ end }}"
    '{{ if $digits }}{{ $s }}{{ else }}{{ template "string" $s }}{{ end }}{{ end }}'
)


def prelude(body: str, comma: str, colon: str) -> str:
    """What `body` needs of the definitions "string", "trim", "value", "object", "tool", "tools", "tool indented" ….

    comma, colon: Python's separators. Written for the values that Ollama hands to a template: text/template over
    map[string]any (whose keys it visits in sorted order), []any, and Ollama's structs for tools.
    """
    text = _TRIM if '"trim"' in body else ""
    text += _NUMBER if '"number or string"' in body else ""
    text += _Writer(",", ": ", indent="    ").definitions() if ' indented"' in body else ""
    text += _Writer(comma, colon, indent="").definitions() if "{{ template" in body.replace('"trim"', "") else ""
    return (_STRING if text.replace(_TRIM, "") else "") + text


class _Writer:
    def __init__(self, comma: str, colon: str, indent: str):
        self.comma, self.colon, self.indent = comma, colon, indent

    def name(self, what: str, depth: int) -> str:
        return f'"{what} {min(depth, DEEPEST)}"' if self.indent else f'"{what}"'

    def line(self, depth: int) -> str:
        """What stands before an item at this depth."""
        return f'{{{{ "\\n{self.indent * depth}" }}}}' if self.indent else ""

    def define(self, what: str, depth: int, body: str) -> str:
        return f"{{{{ define {self.name(what, depth)} }}}}{body}{{{{ end }}}}"

    def call(self, what: str, depth: int, value: str) -> str:
        return f"{{{{ template {self.name(what, depth)} {value} }}}}"

    def definitions(self) -> str:
        depths = range(DEEPEST + 1) if self.indent else range(1)
        text = "".join(self.generic(depth) + self.schema(depth) for depth in depths)
        text += self.define("function", 1, self.function(1)) if not self.indent else ""
        label = "tool indented" if self.indent else "tool"
        text += f'{{{{ define "{label}" }}}}{self.tool(0)}{{{{ end }}}}'
        text += f'{{{{ define "{label}s" }}}}{self.tools()}{{{{ end }}}}'
        return text

    def braces(self, depth: int, inside: str, filled: str = "") -> str:
        """`{ … }` around members that lie one deeper; `filled` is a condition under which there are any."""
        body = inside + self.line(depth)
        return '{{ "{" }}' + (f"{{{{ if {filled} }}}}{body}{{{{ end }}}}" if filled else body) + "}"

    def loop(self, header: str, depth: int, item: str) -> str:
        """`item` for each turn of a range, separated, each on a line of its own where lines are indented."""
        return (
            f"{{{{ $more := false }}}}{{{{ range {header} }}}}"
            f"{{{{ if $more }}}}{self.comma}{{{{ end }}}}{{{{ $more = true }}}}{self.line(depth)}{item}{{{{ end }}}}"
        )

    def pair(self, depth: int, what: str) -> str:
        return '{{ template "string" $key }}' + self.colon + self.call(what, depth, "$value")

    def generic(self, depth: int) -> str:
        """Any JSON value: "value", "object", "list"."""
        kinds = (
            '{{ $kind := printf "%T" . }}{{ if eq $kind "string" }}{{ template "string" . }}'
            f'{{{{ else if eq $kind "map[string]interface {{}}" }}}}{self.call("object", depth, ".")}'
            f'{{{{ else if eq $kind "[]interface {{}}" }}}}{self.call("list", depth, ".")}'
            "{{ else }}{{ json . }}{{ end }}"
        )
        members = self.loop("$key, $value := .", depth + 1, self.pair(depth + 1, "value"))
        items = self.loop("$_, $value := .", depth + 1, self.call("value", depth + 1, "$value"))
        return (
            self.define("value", depth, kinds)
            + self.define("object", depth, self.braces(depth, members, "."))
            + self.define("list", depth, f"[{{{{ if . }}}}{items}{self.line(depth)}{{{{ end }}}}]")
        )

    def fields(self, depth: int, *fields: tuple[str, str, str]) -> str:
        """`{"key": value, …}` of (key, condition, value); a field without a condition is always there."""
        text = "{{ $comma := false }}"
        for key, condition, value in fields:
            one = (
                f"{{{{ if $comma }}}}{self.comma}{{{{ end }}}}{{{{ $comma = true }}}}{self.line(depth + 1)}"
                f'"{key}"{self.colon}{value}'
            )
            text += f"{{{{ if {condition} }}}}{one}{{{{ end }}}}" if condition else one
        return self.braces(depth, text)

    def schema(self, depth: int) -> str:
        """One property of a tool's parameters: "property", and "properties" of an object inside one."""
        one_type = '{{ template "string" (index .Type 0) }}'
        types = "{{ if eq (len .Type) 1 }}" + one_type + "{{ else }}" + self.texts(".Type", depth + 1) + "{{ end }}"
        members = self.loop("$key, $value := .Properties.All", depth + 2, self.pair(depth + 2, "property"))
        alternatives = self.loop("$_, $value := .AnyOf", depth + 2, self.call("property", depth + 2, "$value"))
        body = self.fields(
            depth,
            ("type", ".Type", types),
            ("description", ".Description", '{{ template "string" .Description }}'),
            ("enum", ".Enum", self.call("list", depth + 1, ".Enum")),
            ("items", ".Items", self.call("value", depth + 1, ".Items")),
            ("properties", ".Properties", self.braces(depth + 1, members, ".Properties.Len")),
            ("required", ".Required", self.texts(".Required", depth + 1)),
            ("anyOf", ".AnyOf", "[" + alternatives + self.line(depth + 1) + "]"),
        )
        return self.define("property", depth, body)

    def texts(self, where: str, depth: int) -> str:
        """A list of strings that is not empty."""
        return (
            "["
            + self.loop(f"$_, $text := {where}", depth + 1, '{{ template "string" $text }}')
            + self.line(depth)
            + "]"
        )

    def function(self, depth: int) -> str:
        """{"name", "description", "parameters"}; the last two only where the tool has them."""
        members = self.loop("$key, $value := .Properties", depth + 3, self.pair(depth + 3, "property"))
        parameters = self.fields(
            depth + 1,
            ("type", ".Type", '{{ template "string" .Type }}'),
            ("properties", "", self.braces(depth + 2, members, ".Properties")),
            ("required", ".Required", self.texts(".Required", depth + 2)),
            ("items", ".Items", self.call("value", depth + 2, ".Items")),
            ("$defs", ".Defs", self.call("value", depth + 2, ".Defs")),
        )
        return self.fields(
            depth,
            ("name", "", '{{ template "string" .Name }}'),
            ("description", ".Description", '{{ template "string" .Description }}'),
            ("parameters", ".Parameters.Type", "{{ with .Parameters }}" + parameters + "{{ end }}"),
        )

    def tool(self, depth: int) -> str:
        function = "{{ with .Function }}" + self.function(depth + 1) + "{{ end }}"
        return self.fields(depth, ("type", "", '"function"'), ("function", "", function))

    def tools(self) -> str:
        return (
            "[" + self.loop("$_, $tool := .", 1, "{{ with $tool }}" + self.tool(1) + "{{ end }}") + self.line(0) + "]"
        )
