"""Format `native-tools`: the tokenizer's own template where that shows no tools or writes no calls.

Calls that the template writes stay as they are (DeepSeek V3). Others are written into the assistant's text: in the
spelling that the template or the vocabulary names, else as `<function=NAME>{…}</function>`. Tools and results that the
template has no place for are written into the system's (or the first user's) and the user's messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from formats import native
from formats.base import Format, Parsed, read_template
from formats.call_grammar import CallGrammar, ObjectCore, PythonCore
from formats.calls import parse_function_tag, parse_hermes
from formats.comparison import SYSTEM, USER
from formats.derivation import NAMES, TEXT, TOOLS, answer, call
from formats.probing import own_template, own_text
from formats.tokens import added_tokens

RESULT, RESULT_END = "<result>", "</result>"
PREAMBLE = read_template(__file__) + "\n"


@dataclass(frozen=True)
class Spelling:
    """How calls are written: start, calls with `between` between them, end; `read_calls` reads them back."""

    style: str
    start: str
    between: str
    end: str
    hint: str
    read_calls: Callable[[str, list[dict] | None], Parsed] | None = None
    vllm_parser: str | None = None


_JSON = '{"name": name, "arguments": {arguments as JSON}}'
_LIST = CallGrammar("<|tool_call|>", ObjectCore(("name",), ("arguments",)), None, "")
_PYTHON = CallGrammar("<|tool_call_start|>[", PythonCore(), ", ", "]<|tool_call_end|>")
_LFM2 = Spelling("python", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "name(argument=value)", _PYTHON, "lfm2")
# By the text that a template or a vocabulary has of them.
SPELLINGS = {
    "<|tool_call_start|>": _LFM2,
    "<|tool_list_start|>": _LFM2,
    "<tool_call>": Spelling(
        "object", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", _JSON, parse_hermes, "hermes"
    ),
    "<|tool_call|>": Spelling("object", "<|tool_call|>[", ", ", "]", _JSON, _LIST, "granite"),
}
FUNCTION_TAG = Spelling(
    "tag", "<function=", "</function><function=", "</function>", "name>{arguments as JSON}", parse_function_tag
)
OWN = Spelling("own", "", "", "", "")  # as the template writes them


def spelling(tokenizer: Any) -> Spelling | None:
    """The spelling of calls that the tokenizer's own template or vocabulary names; None for none."""
    added, template = added_tokens(tokenizer), own_template(tokenizer)
    return next((found for text, found in SPELLINGS.items() if text in added or text in template), None)


def shows_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's own template writes the tools into a prompt."""
    return NAMES[0] in (own_text(tokenizer, [USER], tools=TOOLS, add_generation_prompt=True) or "")


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """The format on the tokenizer's own template. Raises FormatError when that cannot be used at all."""
    own = native.adapt(native.FORMAT, tokenizer)
    if PREAMBLE in own.template:  # a model that was trained with this format
        head = own.template.partition(PREAMBLE)[0]
        known = (*SPELLINGS.values(), FUNCTION_TAG, OWN)
        trained = next(one for one in known if _literal("START", one.start) in head)
        return _with_spelling(own, fmt.name, own.template, trained, _literal("TOOL_ROLE", True) in head)
    found = OWN if _ends_calls_once(tokenizer, own) else spelling(tokenizer) or FUNCTION_TAG
    shown = shows_tools(tokenizer)
    result = {"role": "tool", "name": NAMES[0], "tool_call_id": "callid000", "content": "rq0zk"}

    def renders(word: str, *messages: dict[str, Any]) -> bool:
        return word in (own_text(tokenizer, list(messages), **own.template_kwargs) or "")

    tool_role = renders(result["content"], USER, answer(TEXT), result)
    values = {
        "STYLE": found.style, "START": found.start, "BETWEEN": found.between, "END": found.end, "HINT": found.hint,
        "RESULT": RESULT, "RESULT_END": RESULT_END, "SHOWN": shown, "TOOL_ROLE": tool_role,
        "SYSTEM": renders(SYSTEM["content"], SYSTEM, USER),
    }  # fmt: skip
    literals = "".join(_literal(name, value) for name, value in values.items())
    return _with_spelling(own, fmt.name, literals + PREAMBLE + own.template, found, tool_role)


def _ends_calls_once(tokenizer: Any, own: Format) -> bool:
    """Whether the own template writes calls that are read back, and no end of turn inside them."""
    turn = native.turns_of(tokenizer, {**own.template_kwargs}).text("", call()) or ""
    return own.read_calls is not None and sum(turn.count(end) for end in own.end_of_turn) == 1


def _literal(name: str, value: Any) -> str:
    return f"{{%- set {name} = {json.dumps(value)} %}}\n"


def _with_spelling(own: Format, name: str, template: str, found: Spelling, tool_role: bool) -> Format:
    control = own.control_tokens if tool_role else (*own.control_tokens, RESULT, RESULT_END)
    own = replace(own, name=name, template=template, control_tokens=control, has_tools=True)
    if found is OWN:
        return own
    return replace(
        own,
        call_markers=(found.start.strip(), found.end.strip()),
        read_calls=found.read_calls,
        vllm_parser=found.vllm_parser,
        untyped=False,
        unwritten_ends=(own.unwritten_ends[0], own.unwritten_ends[0]),
    )


FORMAT = Format("native-tools", "", (), adapt=adapt)
