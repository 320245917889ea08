"""Format `native`: the template that the tokenizer carries; its end of turn and its calls are found by rendering."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats.base import THINK, Format, FormatError, template_error
from formats.builtin import mistral
from formats.call_grammar import has_wildcards
from formats.continuation import continuation
from formats.derivation import (
    NAMES,
    TEXT,
    TOOLS,
    Turns,
    call,
    call_grammar,
    cut,
    writes_calls,
)
from formats.probing import RESULT, USER, call_message, own_template, own_text, thinks
from formats.reasoning import opened_reasoning, reasoning_tags
from formats.registry import FORMATS
from formats.tokens import added_tokens
from formats.turn_ends import Ends, ends_of_turn

ANSWER = {"role": "assistant", "content": "wq1zk"}
DATE = "26 Jul 2024"
_VALUES = {"a": "7", "b": 7, "c": [1.5, True, None], "d": {"e": {"f": "x"}}}
_TYPES = {"a": "string", "b": "integer", "c": "array", "d": "object"}
# Turns that a parser must read back, the simplest first.
PROBES: list[dict[str, Any]] = [
    {"content": "", "calls": [call(0, {"a": "x y"})]},
    {"content": "", "calls": [call(0, _VALUES)]},
    {"content": "", "calls": [call(0, {})]},
    {"content": "", "calls": [call(0, {"a": 'say "hi" it\'s {x} [y] <b> (z) \\ 한국'})]},
    {"content": "", "calls": [call(0, {"a": "one\ntwo"})]},
    {"content": "", "calls": [call(0, {"a": "x"}), call(1, {"b": 1})]},
    {"content": TEXT, "calls": [call(0, {"a": "x"})]},
    {"content": TEXT, "calls": [call(0, {}), call(1, {"b": 1})]},
]
PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in _TYPES.items()}},
        },
    }
    for name in NAMES
]


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """The format of the tokenizer's own template.

    Raises FormatError when there is no template or no token that ends an answer.
    """
    template = own_template(tokenizer)
    if not template:
        raise FormatError(
            "this tokenizer carries no chat template; choose a format by name (--format chatml, llama3, …)"
        )
    kwargs = _variables(tokenizer)
    hybrid = "enable_thinking" in kwargs
    turns = turns_of(tokenizer, kwargs)
    found = _ends_of_turn(turns, tokenizer)
    ends = found.tokens
    added = added_tokens(tokenizer)
    control = [text for text in ("[INST]", "[/INST]", "<tool_response>", "</tool_response>") if text in template]
    style = _reader(turns, ends)
    made = replace(
        fmt,
        template=template,
        end_of_turn=ends,
        unwritten_ends=(found.behind_answer, found.behind_call),
        control_tokens=tuple(dict.fromkeys((*ends, *control))),
        call_markers=tuple(marker for marker in style.call_markers if marker not in added) if style else (),
        template_kwargs=kwargs,
        read_calls=style.read_calls if style else None,
        thinking="enable_thinking" if hybrid else None,
        reasoning="</think>" in template,
        vllm_parser=style.vllm_parser if style else None,
        untyped=style is not None and style.untyped,
        has_tools=writes_calls(turns),
        prepare=mistral.prepare if _requires_mistral_ids(tokenizer, kwargs) else None,
    )
    opened = opened_reasoning(turns.render, template)
    if opened[0]:
        marks = (opened[0].strip(), opened[1].strip())
        made = replace(made, opened_reasoning=opened, reasoning_tags=marks, reasoning=marks == THINK)
    tags = _own_tags(tokenizer, kwargs)
    # A tag that also stands in turns without reasoning would cut them; gpt-oss writes a text beside calls as reasoning.
    texts = [(turns.text(probe["content"], *probe["calls"]) or "", probe["content"]) for probe in PROBES if tags]
    cuts = any(tags[1] in text and not (said and text.startswith(tags[0] + said)) for text, said in texts if tags)
    return replace(made, reasoning_tags=tags) if tags and not cuts else made


def writes_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's own template shows the model its tools and writes calls."""
    return writes_calls(turns_of(tokenizer, _variables(tokenizer)))


def _variables(tokenizer: Any) -> dict[str, Any]:
    """Template variables of every rendering: a fixed date, and no thinking where it can be switched.

    Some templates open reasoning in the prompt without thinking and write none in the answer: they keep their default,
    or think always (`opened_reasoning`).
    """
    date = {"date_string": DATE} if "date_string" in own_template(tokenizer) else {}
    if not thinks(tokenizer):
        return date
    tried: list[dict[str, Any]] = [{**date, "enable_thinking": False}, date, {**date, "enable_thinking": True}]
    exact = next((kwargs for kwargs in tried if _continues(tokenizer, kwargs, [USER], exact=True)), None)
    if exact is None:
        return tried[-1]
    # One that continues behind a result as well, such as Gemma 4's empty block without thinking.
    pasts = [USER], [USER, call_message(), RESULT]
    found = (kwargs for kwargs in (exact, *tried) if all(_continues(tokenizer, kwargs, past) for past in pasts))
    return next(found, exact)


def _continues(tokenizer: Any, kwargs: dict[str, Any], past: list[dict[str, Any]], exact: bool = False) -> bool:
    """Whether an answer without reasoning is rendered behind the prompt that a server feeds; not `exact`: but for what
    `continuation` finds.
    """
    tools = None if past == [USER] else TOOLS
    prompt = own_text(tokenizer, past, tools=tools, add_generation_prompt=True, **kwargs)
    text = own_text(tokenizer, [*past, ANSWER], tools=tools, **kwargs)
    if prompt is None or text is None:
        return False
    tags = _own_tags(tokenizer, kwargs) or THINK
    return text.startswith(prompt) or not (exact or continuation(prompt, text, past[-1]["content"], tags) is None)


def _own_tags(tokenizer: Any, kwargs: dict[str, Any]) -> tuple[str, str] | None:
    """What the template writes around reasoning, with thinking on."""
    on = {**kwargs, "enable_thinking": True} if "enable_thinking" in kwargs else kwargs
    return reasoning_tags(lambda messages, **more: own_text(tokenizer, messages, tools=TOOLS, **on, **more))


def turns_of(tokenizer: Any, kwargs: dict[str, Any]) -> Turns:
    """What the own template writes for assistant turns, with tools."""
    return Turns(lambda messages, **more: own_text(tokenizer, messages, tools=TOOLS, **kwargs, **more))


def _ends_of_turn(turns: Turns, tokenizer: Any) -> Ends:
    ends = ends_of_turn(turns, set(added_tokens(tokenizer)))
    if not ends.tokens:
        raise_if_broken(tokenizer)
        raise FormatError(
            "the tokenizer's own template ends an answer with no token (neither the last answer nor one that a user's "
            "message follows), so generation would not stop; choose a format by name"
        )
    return ends


def raise_if_broken(tokenizer: Any) -> None:
    """Raise FormatError with the template's own message when Transformers can render no answer with it."""
    tried = [([USER, ANSWER], None), ([USER, ANSWER], TOOLS)]
    if any(own_text(tokenizer, messages, tools=tools) for messages, tools in tried):
        tried = [([USER, call_message()], TOOLS)]  # may need a filter that Transformers does not have
    try:
        for messages, tools in tried:
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception as error:  # templates raise anything
        if messages[-1] == ANSWER or "No filter named" in str(error):
            raise FormatError(
                f"the tokenizer's own template cannot render an answer ({template_error(error)[:200]}); "
                "choose a format by name"
            ) from error


def _reader(turns: Turns, ends: tuple[str, ...]) -> Format | None:
    """A format whose parser reads the template's calls back; None when nothing does.

    The parsers of all formats and the derived grammar are tried on calls of all kinds that the template has written;
    the one that reads most of them wins, a known one before the derived one.
    """
    grammar = call_grammar(turns, ends)
    candidates = [fmt for fmt in FORMATS.values() if fmt.read_calls]
    if grammar is not None:
        untyped = getattr(grammar.core, "untyped", False)
        markers = (grammar.opening.strip(),) if grammar.has_anchor and not has_wildcards(grammar.opening) else ()
        candidates.append(Format("native", "", (), (), markers, read_calls=grammar, untyped=untyped))
    written = [(text, probe) for probe in PROBES if (text := turns.text(probe["content"], *probe["calls"]))]
    best = max(candidates, key=lambda fmt: _read_back(fmt, written, ends), default=None)
    return best if best is not None and _read_back(best, written, ends) else None


def _read_back(fmt: Format, written: list[tuple[str, dict[str, Any]]], ends: tuple[str, ...]) -> int:
    """How many of the turns `fmt` reads back; 0 when it reads not even one with a single call of texts."""
    reader = fmt.read_calls
    if reader is None:
        return 0
    read = [reader(cut(text, ends), PROBE_TOOLS) for text, _ in written]
    right = [
        parsed.tool_calls == probe["calls"] and parsed.content == probe["content"]
        for parsed, (_, probe) in zip(read, written, strict=True)
    ]
    return sum(right) if right and right[0] else 0


def _requires_mistral_ids(tokenizer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the template raises for call ids that do not have nine characters, as Mistral's do."""
    nine, *others = (
        own_text(tokenizer, [USER, call_message(call_id=call_id)], **kwargs)
        for call_id in ("callid000", "call_1", "call_0123456789")
    )
    return nine is not None and others == [None, None]


FORMAT = Format("native", "", (), adapt=adapt)
