"""Reads calls by a grammar: literals around the calls, and one of five ways to write a name with its arguments.

`formats.derivation` finds the grammar of a template. White space inside the literals may vary in what is read, because
templates vary it with what stands around a call.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any, Protocol

from formats.base import Parsed
from formats.builtin.qwen_xml import typed_value
from formats.calls import MAX_JSON_DEPTH, call_error, read_json, read_value, skip_space
from formats.pythonic import read_call as read_python_call
from formats.pythonic import read_literal
from formats.schema_types import declared_properties, declared_types

# Characters of Unicode's private use area stand for the parts of a literal that differ from call to call.
ANY_ID, ANY_NUMBER, ANY_NAME = "\ue000", "\ue001", "\ue002"
_WILDCARDS = {ANY_ID: r"[^\s<>\[\]{}]*?", ANY_NUMBER: r"\d+", ANY_NAME: r"[^\s<>\[\]{}]+?"}
_CDATA, _CDATA_END = "<![CDATA[", "]]>"


def source(literal: str) -> str:
    """Regular expression of a literal: white space may vary, wildcards match what they stand for."""
    parts = re.split(rf"(\s+|[{ANY_ID}{ANY_NUMBER}{ANY_NAME}])", literal)
    return "".join(_WILDCARDS.get(part) or (r"\s*" if part.isspace() else re.escape(part)) for part in parts)


def has_wildcards(literal: str) -> bool:
    """Whether the literal has parts that differ from call to call."""
    return any(wildcard in literal for wildcard in _WILDCARDS)


class Core(Protocol):
    """Reads one call (or a list of them) at a position."""

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        """(calls, end position). Raises ValueError."""


@dataclass(frozen=True)
class CallGrammar:
    """Reads `opening core [between core]… closing`, any number of times, with text around it.

    between   None: the template writes one call, or several calls as one list
    wrappers  (prefix, suffix) that the template puts around a turn's text, the longest first
    """

    opening: str
    core: Core
    between: str | None
    closing: str
    wrappers: tuple[tuple[str, str], ...] = ()

    def __call__(self, text: str, tools: list[dict] | None = None) -> Parsed:
        opening, closing = (re.compile(source(part.strip())) for part in (self.opening, self.closing))
        between = None if self.between is None else re.compile(source(self.between.strip()))
        parsed, kept, at = Parsed(), [], 0
        while found := self._find_opening(opening, text, at, tools):
            kept.append(text[at : found.start()])
            try:
                calls, at = self.core(text, skip_space(text, found.end()), tools)
                while between and (found_between := between.match(text, skip_space(text, at))):
                    following = skip_space(text, found_between.end())
                    if not found_between[0] and not self._starts_call(text, following, tools):
                        break
                    more, at = self.core(text, following, tools)
                    calls += more
                close = closing.match(text, skip_space(text, at))
                if close is None:
                    raise ValueError(f"{self.closing.strip() or 'the end of the turn'} is missing behind the call")
                at = close.end()
                parsed.tool_calls += calls
            except ValueError as error:
                parsed.errors.append(call_error(parsed, error))
                again = opening.search(text, max(found.end(), found.start() + 1)) if self.has_anchor else None
                at = again.start() if again else len(text)
                kept.append(text[found.start() : at])
        kept.append(text[at:])
        parsed.content = self._unwrapped("".join(kept).strip())
        return parsed

    def _find_opening(
        self, opening: re.Pattern[str], text: str, at: int, tools: list[dict] | None
    ) -> re.Match[str] | None:
        if self.has_anchor:
            return opening.search(text, at)
        # Without an opening the complete turn must be the call.
        return opening.match(text) if at == 0 and self._starts_call(text, skip_space(text, 0), tools) else None

    @property
    def has_anchor(self) -> bool:
        """Whether the opening has text of its own, so that it can be searched for."""
        return bool(re.sub(f"[{ANY_ID}{ANY_NUMBER}{ANY_NAME}]", "", self.opening).strip())

    @property
    def markers(self) -> tuple[str, ...]:
        """The text that opens a call, and the one behind it where there is one: pieces without wildcards."""
        pieces = [re.split(f"[{ANY_ID}{ANY_NUMBER}{ANY_NAME}]", part.strip()) for part in (self.opening, self.closing)]
        return tuple(found for part in pieces if (found := next(filter(str.strip, part), "").strip()))

    def _starts_call(self, text: str, at: int, tools: list[dict] | None) -> bool:
        try:
            self.core(text, at, tools)
        except ValueError:
            return False
        return True

    def _unwrapped(self, content: str) -> str:
        for prefix, suffix in self.wrappers:
            if len(content) >= len(prefix + suffix) and content.startswith(prefix) and content.endswith(suffix):
                return content[len(prefix) : len(content) - len(suffix)].strip()
        return content


def _name(text: str, at: int, end: int) -> str:
    name = text[at:end].strip()
    if not name or "\n" in name:
        raise ValueError("the function has no name")
    return name


@dataclass(frozen=True)
class ObjectCore:
    """JSON objects with name and arguments in them, one or a list: `{"name": "f", "arguments": {…}}`.

    name_path is None where the name is the only key of the object: `{"f": {…}}`. Arguments may be JSON in a string.
    """

    name_path: tuple[str, ...] | None
    arguments_path: tuple[str, ...]

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        value, end = read_json(text, at)
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ValueError("the list of calls is empty")
        return [self._call(item) for item in items], end

    def _call(self, item: Any) -> dict[str, Any]:
        if self.name_path is None:
            if not isinstance(item, dict) or len(item) != 1:
                raise ValueError("a call must be an object whose one key is the function's name")
            ((name, arguments),) = item.items()
        else:
            name, arguments = _at(item, self.name_path), _at(item, self.arguments_path)
        if isinstance(arguments, str):
            arguments = read_value(arguments)
        if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
            raise ValueError("a call must have a name and an object of arguments")
        return {"name": name, "arguments": arguments}


def _at(item: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(item, dict) or key not in item:
            raise ValueError(f'a call has no "{key}"')
        item = item[key]
    return item


@dataclass(frozen=True)
class NamedJsonCore:
    """A name, `middle` and a JSON object of arguments: `f<|sep|>{…}`."""

    middle: str

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        stop = re.compile(source(self.middle) if self.middle.strip() else r"\s*(?=\{)").search(text, at)
        if not stop:
            raise ValueError("the function's name is cut off")
        name = _name(text, at, stop.start())
        arguments, end = read_json(text, stop.end())
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of {name!r} must be a JSON object")
        return [{"name": name, "arguments": arguments}], end


@dataclass(frozen=True)
class PythonCore:
    """A Python call with named arguments: `f(a='x', b=[1])`."""

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        for match in re.compile(r"\)").finditer(text, at):
            try:
                ast.parse(text[at : match.end()], mode="eval")
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue  # a parenthesis inside a string
            return [read_python_call(text[at : match.end()])], match.end()
        raise ValueError("the call is cut off or not Python")


@dataclass(frozen=True)
class RelaxedCore:
    """A name and JSON whose strings stand between `quote` and whose keys have no quotes: `f{a:<|"|>x<|"|>,b:2}`."""

    middle: str
    quote: str

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        start = text.find(self.middle + "{", at)
        if start < 0:
            raise ValueError("the function's name is cut off")
        arguments, end = self._value(text, start + len(self.middle), 0)
        return [{"name": _name(text, at, start), "arguments": arguments}], end

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"the arguments are nested deeper than {MAX_JSON_DEPTH} levels")
        if text.startswith(self.quote, at):
            start = at + len(self.quote)
            close = text.find(self.quote, start)
            if close < 0:
                raise ValueError("a string is cut off")
            return text[start:close], close + len(self.quote)
        if text.startswith(("{", "["), at):
            return self._object(text, at, depth) if text[at] == "{" else self._list(text, at, depth)
        word = re.compile(r"[^\s,:{}\[\]]+").match(text, at)
        if not word:
            raise ValueError("the arguments are cut off")
        return _constant(word[0]), word.end()

    def _object(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        value: dict[str, Any] = {}
        at = skip_space(text, at + 1)
        while not text.startswith("}", at):
            if text.startswith(self.quote, at):
                key, at = self._value(text, at, depth + 1)
            elif bare := re.compile(r"[^:{}\[\],]+").match(text, at):
                key, at = bare[0].strip(), bare.end()
            else:
                raise ValueError(f"a key is missing at character {at}")
            if not text.startswith(":", at):
                raise ValueError(f"':' is missing at character {at}")
            if key in value:
                raise ValueError(f"duplicate key {key!r}")
            value[key], at = self._value(text, skip_space(text, at + 1), depth + 1)
            at = self._separator(text, at, "}")
        return value, at + 1

    def _list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        items = []
        at = skip_space(text, at + 1)
        while not text.startswith("]", at):
            item, at = self._value(text, at, depth + 1)
            items.append(item)
            at = self._separator(text, at, "]")
        return items, at + 1

    def _separator(self, text: str, at: int, closing: str) -> int:
        at = skip_space(text, at)
        if text.startswith(",", at):
            return skip_space(text, at + 1)
        if not text.startswith(closing, at):
            raise ValueError("the arguments are cut off" if at >= len(text) else f"',' is missing at character {at}")
        return at


def _constant(word: str) -> Any:
    return read_value({"True": "true", "False": "false", "None": "null"}.get(word, word))


@dataclass(frozen=True)
class TaggedCore:
    """A name, then for each argument `key_start KEY equals VALUE value_end`; strings have quotes only in JSON.

    name_end     what ends the name; blank: white space, or what comes next
    follows      what may come next behind a name without `name_end`
    equals       (head, mark of strings, tail): the mark differs by the value's type, `type="string"`; None instead of
                 the mark where all values are written alike, so that the tool's schema decides the type
    json_values  every value is JSON
    """

    name_end: str
    key_start: str
    equals: tuple[str, str | None, str]
    value_end: str
    follows: tuple[str, ...] = ()
    json_values: bool = False

    @property
    def untyped(self) -> bool:
        return self.equals[1] is None and not self.json_values

    def __call__(self, text: str, at: int, tools: list[dict] | None) -> tuple[list[dict[str, Any]], int]:
        follows = "|".join(source(part.strip()) for part in self.follows if part.strip())
        stop_at = source(self.name_end.rstrip()) if self.name_end.strip() else rf"\s*(?={follows})"
        key_start = re.compile(source(self.key_start))
        head, string_mark, tail = map(re.escape, (self.equals[0], self.equals[1] or "", self.equals[2]))
        equals = re.compile(f"{head}(.*?){tail}" if self.equals[1] is not None else f"{head}{tail}", re.DOTALL)
        stop = re.compile(stop_at).search(text, at)
        if not stop:
            raise ValueError("the function's name is cut off")
        name, at = _name(text, at, stop.start()), stop.end()
        types = declared_properties(tools).get(name, {})
        arguments: dict[str, Any] = {}
        while start := key_start.match(text, skip_space(text, at)):
            equal = equals.search(text, start.end())
            if equal is None:
                raise ValueError("an argument is cut off")
            key = text[start.end() : equal.start()].strip()
            if key in arguments:
                raise ValueError(f"duplicate argument {key!r}")
            value, behind = read_json(text, equal.end(), "") if self.json_values else (None, equal.end())
            end = text.find(self.value_end, behind, behind + len(self.value_end) if self.json_values else None)
            if end < 0:
                raise ValueError("an argument is cut off")
            raw = text[equal.end() : end]
            if self.json_values:
                arguments[key] = value
            elif raw.startswith(_CDATA) and raw.endswith(_CDATA_END):
                arguments[key] = raw.removeprefix(_CDATA).removesuffix(_CDATA_END)
            elif self.untyped:
                arguments[key] = _by_schema(raw, types.get(key))
            else:
                arguments[key] = raw if re.escape(equal[1]) == string_mark else _literal(raw)
            at = end + len(self.value_end)
        return [{"name": name, "arguments": arguments}], at


def _literal(raw: str) -> Any:
    try:
        return read_value(raw)
    except ValueError:
        return read_literal(raw)


def _by_schema(raw: str, schema: Any) -> Any:
    """A value by its declared type; objects and lists also as Python writes them."""
    value = typed_value(raw, schema)
    if value is raw and raw[:1] in ("{", "[") and declared_types(schema) & {"object", "array"}:
        try:
            return read_literal(raw)
        except ValueError:
            return raw
    return value
