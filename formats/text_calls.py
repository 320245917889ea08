"""Calls as text of the messages, on the template that lays out the turns: that of the tokenizer, or of a YAML format.

`native-tools`: for a template that shows no tools or writes no calls. Calls that it writes stay as they are (DeepSeek
V3), others are spelled as the template or the vocabulary names, else as `<function=NAME>{…}</function>`.

`tool-reasoning`: three lines, for models that have no calls at all (Mistral 7B v0.1 and v0.2) or shall give a reason:

    Tool: NAME
    Parameters: {…}
    Reasoning: the text of the answer

Tools and results that the template has no place for are written into the system's (or the first user's) and the user's
messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from formats import native
from formats.base import Format, Ollama, Parsed, clean_messages, read_template, render_messages
from formats.call_grammar import CallGrammar, ObjectCore, PythonCore
from formats.calls import parse_function_tag, parse_hermes
from formats.comparison import SYSTEM, USER
from formats.delimited import DelimitedCallParser
from formats.derivation import NAMES, TEXT, TOOLS, answer, call
from formats.probing import own_template
from formats.tokens import added_tokens

RESULT, RESULT_END = "<result>", "</result>"
PREAMBLE = read_template(__file__) + "\n"


@dataclass(frozen=True)
class Spelling:
    """How calls are written: start, calls with `between` between them, end; `read_calls` reads them back.

    style      of a call: "object" (JSON), "python", "named" (name, `separator`, JSON of the arguments), or "own" (as
               the template writes it)
    hint       a call as the prompt explains it
    lead       between a text and the calls behind it
    reasoning  what precedes the text of a turn behind its calls; "": the text stands in front of them
    place      of the tools: system, first_user or last_user
    """

    style: str
    start: str
    between: str
    end: str
    hint: str
    read_calls: Callable[[str, list[dict] | None], Parsed] | None = None
    vllm_parser: str | None = None
    separator: str = ""
    lead: str = ""
    reasoning: str = ""
    place: str = "system"


_JSON = '{"name": name, "arguments": {arguments as JSON}}'
_LIST = CallGrammar("<|tool_call|>", ObjectCore(("name",), ("arguments",)), None, "")
_PYTHON = CallGrammar("<|tool_call_start|>[", PythonCore(), ", ", "]<|tool_call_end|>")
_LFM2 = Spelling("python", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "name(argument=value)", _PYTHON, "lfm2")
# By the text that a template or a vocabulary has of them.
SPELLINGS = {
    "<|tool_call_start|>": _LFM2,
    "<|tool_list_start|>": _LFM2,
    "<tool_call>": Spelling(
        "object", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", _JSON, parse_hermes
    ),
    "<|tool_call|>": Spelling("object", "<|tool_call|>[", ", ", "]", _JSON, _LIST),
}


def named(
    parser: DelimitedCallParser, read_calls: Callable[..., Parsed] | None = None, place: str = "system"
) -> Spelling:
    """The spelling that `parser` reads: a name, its separator and JSON, in tags or (with an empty end) on lines."""
    start, end = parser.start, parser.end
    between = end + start if end else "\n" + start
    hint = f"name{parser.separator}{{arguments as JSON}}"
    reason = f"{parser.reasoning}why this function" if parser.reasoning else ""
    return Spelling(
        "named", start, between, end, hint + reason, read_calls or parser, separator=parser.separator,
        lead="" if end else "\n", reasoning=parser.reasoning, place=place,
    )  # fmt: skip


FUNCTION_TAG = named(DelimitedCallParser("<function=", ">", "</function>"), parse_function_tag)
OWN = Spelling("own", "", "", "", "")
TOOL_LINES = DelimitedCallParser("Tool: ", "\nParameters: ", "", "\nReasoning: ")


def spelling(tokenizer: Any) -> Spelling | None:
    """The spelling of calls that the tokenizer's own template or vocabulary names; None for none."""
    added, template = added_tokens(tokenizer), own_template(tokenizer)
    found = next((found for text, found in SPELLINGS.items() if text in added or text in template), None)
    # With <parameter=…> inside the tag the arguments are not JSON.
    tag = FUNCTION_TAG if FUNCTION_TAG.start in template and "<parameter=" not in template else None
    return found or tag


def adapt(fmt: Format, tokenizer: Any, found: Spelling | None = None, base: Format | None = None) -> Format:
    """Calls in the spelling `found` on the turns of `base`; by default the spelling that the tokenizer names, and its
    own template. Raises FormatError when that cannot be used at all.
    """
    own = base or native.adapt(native.FORMAT, tokenizer)
    head, _, turns = own.template.rpartition(PREAMBLE)  # head: of a model that was trained with this format
    writes_calls = _literal("STYLE", OWN.style) in head if head else _ends_calls_once(tokenizer, own)
    layout = replace(own, template=turns)
    given = found
    found = found or (OWN if writes_calls else spelling(tokenizer) or FUNCTION_TAG)

    def renders(word: str, *messages: dict[str, Any], tools: list[dict] | None = None) -> bool:
        try:
            return word in render_messages(
                clean_messages(list(messages), layout), tools, layout, tokenizer, bool(tools)
            )
        except Exception:  # templates raise anything
            return False

    result = {"role": "tool", "name": NAMES[0], "tool_call_id": "callid000", "content": "rq0zk"}
    tool_role = renders(result["content"], USER, answer(TEXT), result)
    system = renders(SYSTEM["content"], SYSTEM, USER)
    gap = " " if found.end else "\n"
    values = {
        "STYLE": found.style, "START": found.start, "SEPARATOR": found.separator, "BETWEEN": found.between,
        "END": found.end, "LEAD": found.lead, "REASONING": found.reasoning,
        "HINT": gap + found.start + found.hint + found.end if found.hint else "",
        "RESULT": RESULT, "RESULT_END": RESULT_END,
        "SHOWN": given is None and renders(NAMES[0], USER, tools=TOOLS), "TOOL_ROLE": tool_role, "SYSTEM": system,
        "ROLE": "system" if found.place == "system" and system else "user", "LAST": found.place == "last_user",
    }  # fmt: skip
    made = replace(
        layout,
        name=fmt.name,
        template="".join(_literal(name, value) for name, value in values.items()) + PREAMBLE + turns,
        control_tokens=layout.control_tokens if tool_role else (*layout.control_tokens, RESULT, RESULT_END),
        has_tools=True,
        adapt=None,
        detect=None,
    )
    if found is OWN:
        return made
    return replace(
        made,
        call_markers=call_markers(found),
        read_calls=found.read_calls,
        vllm_parser=found.vllm_parser,
        ollama=fmt.ollama,
        untyped=False,
        unwritten_ends=(made.unwritten_ends[0], made.unwritten_ends[0]),
        prepare=partial(_reasons_as_texts, prepare=made.prepare) if found.reasoning else made.prepare,
    )


def _literal(name: str, value: Any) -> str:
    return f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n"


def _ends_calls_once(tokenizer: Any, own: Format) -> bool:
    """Whether the own template writes calls that are read back, and no end of turn inside them."""
    turn = native.turns_of(tokenizer, {**own.template_kwargs}).text("", call()) or ""
    return own.read_calls is not None and sum(turn.count(end) for end in own.end_of_turn) == 1


def _reasons_as_texts(messages: list[dict], prepare: Callable[[list[dict]], list[dict]] | None) -> list[dict]:
    """The reasoning of a call that has no text beside it becomes that text, which the format has a place for."""
    prepared = []
    for message in messages:
        if message.get("tool_calls") and not message["content"].strip() and message.get("reasoning_content"):
            message = {**message, "content": message["reasoning_content"]}
            del message["reasoning_content"]
        prepared.append(message)
    return prepare(prepared) if prepare else prepared


def call_markers(found: Spelling) -> tuple[str, ...]:
    """What an answer's text may not hold: start and end of a call; without an end a line that begins like one."""
    if not found.end:
        return ("\n" + found.start.strip(),)
    named_call = found.style == "named"  # its white space is part of the marker
    return (found.start, found.end) if named_call else (found.start.strip(), found.end.strip())


FORMAT = Format("native-tools", "", (), adapt=adapt)
TOOL_REASONING = Format(
    "tool-reasoning",
    "",
    ("</s>",),
    read_calls=TOOL_LINES,
    call_markers=call_markers(named(TOOL_LINES)),
    adapt=partial(adapt, found=named(TOOL_LINES)),
    ollama=Ollama(refused="it finds no calls that are written as lines"),
)
