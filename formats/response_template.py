"""The `response_template` of a format: how Transformers' `parse_response` (5.17) splits an answer into fields.

It is written into tokenizer_config.json, so that `transformers serve` and pipelines read the calls that were trained.
Each call's opening pattern looks ahead for complete JSON (a recursive pattern of the `regex` module), and its closing
pattern starts where the JSON ends, so that malformed calls stay in the content and strings may contain the markers, as
in `Format.parse`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from formats.base import THINK, Format, FormatError, render_messages
from formats.builtin import kanana, llama3, mistral, phi4_mini
from formats.call_grammar import CallGrammar, NamedJsonCore, ObjectCore, source
from formats.calls import parse_function_tag, parse_hermes
from formats.delimited import DelimitedCallParser

JSON = (
    r"(?(DEFINE)(?P<string>\"(?:[^\"\\\x00-\x1f]|\\[\"\\/bfnrt]|\\u[0-9a-fA-F]{4})*+\")"
    r"(?P<number>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"(?P<object>\{\s*(?:(?&string)\s*:\s*(?&value)\s*(?:,\s*(?&string)\s*:\s*(?&value)\s*)*)?\})"
    r"(?P<list>\[\s*(?:(?&value)\s*(?:,\s*(?&value)\s*)*)?\])"
    r"(?P<value>(?&string)|(?&object)|(?&list)|(?&number)|true|false|null))"
)
# `\G` is where the search began: at the call's JSON, or behind it when the parser waits for the rest of the marker.
# `\K` keeps the JSON out of the closing marker.
CLOSE = JSON + r"\G(?:\s*+{body})?\s*\K{closing}\s*"
_MARK = "wq0zk"
FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def response_template(fmt: Format, tokenizer: Any) -> dict[str, Any] | None:
    """The value of `tokenizer.response_template`; None for a format whose calls it cannot express."""
    calls: dict[str, Any] | None = None
    if fmt.read_calls is not None and fmt.has_tools:
        make_field: Callable[[Format], dict[str, Any] | None] | None = _READERS.get(fmt.read_calls)
        if isinstance(fmt.read_calls, DelimitedCallParser):
            make_field = _delimited
        elif isinstance(fmt.read_calls, CallGrammar):
            make_field = _grammar
        calls = make_field(fmt) if make_field else None
        if calls is None:
            return None
    anchors = start_anchors(fmt, tokenizer)
    if not anchors:
        return None
    ends = "|".join(map(re.escape, fmt.end_of_turn))
    opening, closing = map(re.escape, fmt.reasoning_tags if fmt.reasoning_tags[0] else THINK)
    fields = {
        "thinking": {"open_pattern": rf"\A\s*{opening}", "close_pattern": rf"{closing}\s*", "content": "text"},
        "tool_calls": calls,
        # White space before a marker, and all that follows the end of the turn, belongs to no content.
        "content": {"close_pattern": rf"\s*(?:{ends}).*", "content": "text", "repeats": True, "join": "\n"},
    }
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": anchors,
        "fields": {name: field for name, field in fields.items() if field},
    }


def start_anchors(fmt: Format, tokenizer: Any) -> list[str]:
    """The texts with which a prompt ends before the answer starts: after a user's message and after a tool's result."""
    user = {"role": "user", "content": _MARK}
    # Some templates write a call's id or name after its result: only what does not depend on them is an anchor.
    results = [
        _tail([user, _message_with_call(name, call_id), {"role": "tool", "content": _MARK, "name": name,
                                                          "tool_call_id": call_id}], fmt, tokenizer)
        for name, call_id in (("f1", "callid001"), ("f2", "callid002"))
    ]  # fmt: skip
    result = ""
    texts = [text for text in results if text is not None]
    if len(texts) == len(results) and fmt.has_tools:
        result = os.path.commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071  texts, not paths
    anchors = [(tail or "").partition("<think>")[0] for tail in (_tail([user], fmt, tokenizer), result)]
    return list(dict.fromkeys(filter(str.strip, anchors)))


def example_answers(fmt: Format, tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt, answer) as the format writes them: a text, a call and two calls; none for what it cannot express."""
    user = {"role": "user", "content": _MARK}
    call, other = _message_with_call("f1", "callid001"), _message_with_call("f2", "callid002")
    call["tool_calls"][0]["function"]["arguments"] = {"a": "7", "b": [1, None, {"c": 'say "}" twice'}]}
    both = {**call, "tool_calls": call["tool_calls"] + other["tool_calls"]}
    examples = []
    for answer in ({"role": "assistant", "content": "It is 7."}, call, both):
        messages = fmt.prepare([user, answer]) if fmt.prepare else [user, answer]
        try:
            prompt = render_messages(messages[:1], None, fmt, tokenizer, add_generation_prompt=True)
            text = render_messages(messages, None, fmt, tokenizer)
        except Exception:  # noqa: S112  (templates raise anything)
            continue
        if text.startswith(prompt):
            examples.append((prompt, text[len(prompt) :]))
    return examples


def _message_with_call(name: str, call_id: str) -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _tail(messages: list[dict[str, Any]], fmt: Format, tokenizer: Any) -> str | None:
    """The generation prompt, or where the template has none, all that follows the last message's content."""
    messages = fmt.prepare(messages) if fmt.prepare else messages
    try:
        prompt, text = (render_messages(messages, None, fmt, tokenizer, add) for add in (True, False))
    except Exception:  # templates raise anything
        return None
    if prompt.startswith(text) and prompt != text:
        return prompt[len(text) :]
    return prompt.rpartition(_MARK)[2]


def _tagged(opening: str, closing: str, content: str, transform: Any, body: str = "(?&object)") -> dict[str, Any]:
    """A field of calls between two patterns, JSON between them."""
    return {
        "open_pattern": rf"{JSON}\s*{opening}\s*(?={body}\s*{closing})",
        "close_pattern": CLOSE.replace("{body}", body).replace("{closing}", closing),
        "repeats": True,
        "content": content,
        "transform": transform,
    }


def _hermes(fmt: Format) -> dict[str, Any]:
    call = {"name": "{content.name}", "arguments": "{content.arguments}"}
    return _tagged("<tool_call>", "</tool_call>", "json", {"type": "function", "function": call})


def _function_tag(fmt: Format) -> dict[str, Any]:
    return _tagged("<function=(?P<name>[^>]*[^>\\s][^>]*)>", "</function>", "json", FUNCTION)


def _delimited(fmt: Format) -> dict[str, Any] | None:
    parser = fmt.read_calls
    if not isinstance(parser, DelimitedCallParser):
        raise FormatError(f"format {fmt.name} has no delimited calls")
    if not parser.end or parser.reasoning:  # it can tell neither where a line begins nor what is before a text
        return None
    start, separator, end = (re.escape(text) for text in (parser.start, parser.separator, parser.end))
    name = rf"(?P<name>(?:(?!{separator}).)*?\S)"
    return _tagged(rf"{start}\s*{name}\s*?{separator}", end, "json", FUNCTION)


def _grammar(fmt: Format) -> dict[str, Any] | None:
    """A derived grammar of JSON calls, each between the same texts or all in one list."""
    grammar = fmt.read_calls
    if not isinstance(grammar, CallGrammar) or not grammar.has_anchor or grammar.wrappers:
        return None
    opening, closing = source(grammar.opening.strip()), source(grammar.closing.strip()) or _at_end(fmt)
    each = grammar.between is not None and "".join(grammar.between.split()) == "".join(
        (grammar.closing + grammar.opening).split()
    )
    if grammar.between is not None and not each:
        return None
    core = grammar.core
    if isinstance(core, NamedJsonCore) and grammar.closing.strip():
        name = rf"(?P<name>(?:(?!{source(core.middle)}).)*?\S)" if core.middle.strip() else r"(?P<name>[^\n{]*?[^\s{])"
        return _tagged(rf"{opening}\s*{name}\s*?{source(core.middle)}", closing, "json", FUNCTION)
    if isinstance(core, ObjectCore) and core.name_path and core.arguments_path:
        keys = [".".join(path) for path in (core.name_path, core.arguments_path)]
        if not each:
            return _call_list(opening, closing, *keys)
        call = dict(zip(("name", "arguments"), (f"{{content.{key}}}" for key in keys), strict=True))
        return _tagged(opening, closing, "json", {"type": "function", "function": call})
    return None


def _at_end(fmt: Format) -> str:
    return "(?:" + "|".join(rf"(?={re.escape(text)})" for text in fmt.end_of_turn) + r"|\s*\Z)"


def _call_list(opening: str, closing: str, name: str = "name", arguments: str = "arguments") -> dict[str, Any]:
    """One list of all calls of an answer."""
    call = {"type": "function", "function": {"name": f"{{{name}}}", "arguments": f"{{{arguments}}}"}}
    field = _tagged(opening, closing, "json", call, "(?&list)")
    return {**field, "repeats": False, "transform_each": True}


def _phi4(fmt: Format) -> dict[str, Any]:
    return _call_list(r"<\|tool_call\|>", r"<\|/tool_call\|>")


def _mistral(fmt: Format) -> dict[str, Any]:
    end = _at_end(fmt)
    if fmt.template_kwargs.get("version") in ("v11", "v13"):
        opening = r"\[TOOL_CALLS\]\s*(?P<name>[^\[\]\s][^\[\]]*?)\s*(?:\[CALL_ID\][^\[\]]*)?\[ARGS\]"
        return _tagged(opening, rf"(?:(?=\[TOOL_CALLS\])|{end})", "json", FUNCTION)
    return _call_list(r"\[TOOL_CALLS\]", end)


def _llama3(fmt: Format) -> dict[str, Any]:
    end = "(?:" + "|".join(rf"(?={re.escape(text)})" for text in fmt.end_of_turn) + r"|\s*\Z|;)"
    call = {"name": "{content.name}", "arguments": "{content.parameters}"}
    opening = r"(?:\A\s*(?:<\|python_tag\|>\s*)?|(?<=;)\s*)"
    field = _tagged(opening, end, "json", {"type": "function", "function": call})
    start = r'(?=\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*\S[^"]*"\s*,\s*"parameters"\s*:\s*\{)'
    return {**field, "open_pattern": field["open_pattern"].replace(r"\s*(?=(?&object)", rf"\s*{start}(?=(?&object)", 1)}


_READERS: dict[Callable[..., Any], Callable[[Format], dict[str, Any]]] = {
    parse_hermes: _hermes,
    parse_function_tag: _function_tag,
    kanana.parse: _function_tag,
    phi4_mini.parse: _phi4,
    mistral.parse: _mistral,
    llama3.parse: _llama3,
}
