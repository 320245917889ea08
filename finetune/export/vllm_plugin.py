"""Tool parser for vLLM: --tool-parser-plugin sandwich_tool_parser.py --tool-call-parser sandwich

Parses calls with the `formats` package beside this file: the same code that training used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from formats import FORMATS, get_format, pythonic  # noqa: E402
from formats.base import THINK, split_reasoning  # noqa: E402
from formats.builtin import llama3, mistral  # noqa: E402

try:  # since vLLM 0.32
    from vllm.renderers.chat_utils import make_tool_call_id

    RETURNS_RAW_TEXT = True  # without "tools_called", whatever the content is
except ImportError:
    from vllm.entrypoints.chat_utils import make_tool_call_id

    RETURNS_RAW_TEXT = False
try:  # vLLM has moved its messages twice
    from vllm.entrypoints.generate.base import protocol
except ImportError:
    try:
        from vllm.entrypoints.openai.engine import protocol
    except ImportError:
        from vllm.entrypoints.openai import protocol
try:
    from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
except ImportError:
    from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

PARSER = "sandwich"
FORMAT = "llama3-function"
# Readers for which a call is the complete answer, and how such an answer begins.
WHOLE_ANSWER = (llama3.parse, pythonic.parse)
STARTS = ("[", "{", "<|python_tag|>")


class SandwichToolParser(ToolParser):
    """Complete answers through `parse`; in a stream, text is sent at once and each call when it is complete."""

    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        name = str(HERE / FORMAT) if FORMAT.endswith(".yaml") else FORMAT
        self.format = get_format(name, tokenizer)
        self.end_ids = {tokenizer.convert_tokens_to_ids(marker) for marker in self.format.end_of_turn}
        self.sent_text = ""
        self.sent_calls = 0

    def adjust_request(self, request):
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False  # the markers of a call may be special tokens
        return request

    def extract_tool_calls(self, model_output, request):
        parsed = self.format.parse(model_output, _tools(request))
        self.prev_tool_call_arr = [_as_strings(call) for call in parsed.tool_calls]
        return protocol.ExtractedToolCallInformation(
            tools_called=bool(parsed.tool_calls) or (RETURNS_RAW_TEXT and parsed.content != model_output),
            tool_calls=[
                protocol.ToolCall(
                    id=make_tool_call_id(), type="function", function=protocol.FunctionCall(**_as_strings(call))
                )
                for call in parsed.tool_calls
            ],
            content=parsed.content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request,
    ):
        ended = bool(self.end_ids.intersection(delta_token_ids))
        ended = ended or any(marker in current_text for marker in self.format.end_of_turn)
        parsed = self.format.parse(current_text, _tools(request))
        text = parsed.content if ended else final_content(current_text, self.format)
        delta = text[len(self.sent_text) :] if text.startswith(self.sent_text) else ""
        calls = []
        for index in range(self.sent_calls, len(parsed.tool_calls)):
            call = _as_strings(parsed.tool_calls[index])
            self.prev_tool_call_arr.append(call)
            self.streamed_args_for_tool.append(call["arguments"])
            self.current_tool_id, self.current_tool_name_sent = index, True
            function = protocol.DeltaFunctionCall(**call)
            calls.append(
                protocol.DeltaToolCall(index=index, id=make_tool_call_id(), type="function", function=function)
            )
        self.sent_calls += len(calls)
        self.sent_text += delta
        if not calls and not delta:
            return None
        return protocol.DeltaMessage(content=delta or None, tool_calls=calls)


def final_content(text, fmt):
    """The content of an incomplete answer that no later token can change; "" while anything can.

    Of a format's markers the second closes a call, the others open one. A call without closing marker lasts until the
    end of the turn, and one without any is the complete answer or begins it.
    """
    text = text.lstrip()
    for opening, closing in dict.fromkeys((fmt.reasoning_tags, THINK)):
        begins = text.startswith(opening[: len(text)] or " ") or fmt.opened_reasoning[1].strip() == closing
        if begins and closing not in text:
            return ""
        lone_end = fmt.reasoning or (opening, closing) != THINK
        text = split_reasoning(text, lone_end, (opening, closing))[1].lstrip()
    marks = call_markers(fmt)
    if fmt.read_calls in WHOLE_ANSWER:
        if any(text.startswith(start[: len(text)]) for start in STARTS):
            return ""
    elif not marks or (text.startswith(("{", "[")) and len(marks) < 2):
        return ""
    text, suffixes = _unwrapped(text, fmt)
    text = "\n" + text  # a marker may be the beginning of a line
    # The text may end with the beginning of a marker.
    ends = (*marks, *fmt.end_of_turn, *suffixes)
    cut = max((n for marker in ends for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
    text = text[: len(text) - cut]
    at = 0
    while (start := _next_opening(text, at, marks)) >= 0:
        end = _call_end(text, start, marks[1], fmt) if len(marks) > 1 else None
        if end is None:
            text = text[:start]
            break
        at = end
    return fmt.parse(min((text.partition(suffix)[0] for suffix in suffixes), key=len, default=text)).content


def call_markers(fmt):
    """What opens and closes calls; `Format.call_markers` omits what are tokens of the vocabulary."""
    derived = getattr(fmt.read_calls, "markers", None)
    if derived is not None:
        return derived if fmt.read_calls.has_anchor else ()
    if fmt.read_calls is mistral.parse:
        return (mistral.CALLS,)
    named = [one.call_markers for one in FORMATS.values() if one.read_calls is fmt.read_calls]
    return max([fmt.call_markers, *named], key=len)


def _unwrapped(text, fmt):
    """(text without what the template puts before an answer, what it puts behind it); "" while that may come."""
    wrappers = getattr(fmt.read_calls, "wrappers", ())
    for prefix, suffix in wrappers:
        if prefix and text.startswith(prefix):
            return text.removeprefix(prefix), [suffix] if suffix else []
    if any(prefix.startswith(text) for prefix, _ in wrappers):
        return "", []
    return text, [suffix for prefix, suffix in wrappers if suffix and not prefix]


def _next_opening(text, at, marks):
    openings = (*marks[:1], *marks[2:])
    return min((found for marker in openings if (found := text.find(marker, at)) >= 0), default=-1)


def _call_end(text, start, closing, fmt):
    """Where the call at `start` ends; `start` + 1 when it is invalid whatever follows; None while it is incomplete."""
    invalid = False
    close = text.find(closing, start)
    while True:  # a string may contain the closing marker: the first that completes a call counts
        end = close + len(closing) if close >= 0 else len(text)
        parsed = fmt.parse(text[start:end])
        if not parsed.errors:
            return end
        if close < 0:
            return start + 1 if invalid else None
        invalid = invalid or not ("cut off" in parsed.errors[0] or "the text ends" in parsed.errors[0])
        close = text.find(closing, end)


def _as_strings(call):
    return {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


def _tools(request):
    """The request's tools as dictionaries; None without any."""
    tools = getattr(request, "tools", None) or []
    return [tool if isinstance(tool, dict) else tool.model_dump() for tool in tools] or None


ToolParserManager.register_module(PARSER, module=SandwichToolParser)
