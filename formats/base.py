"""What a format is, and how a conversation is rendered with one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.rendering import render_template

THINK = ("<think>", "</think>")  # the tags of most models


class FormatError(ValueError):
    """A conversation, tokenizer or format file that cannot be used together; the message says why and what to do."""


@dataclass
class Parsed:
    """One parsed turn.

    content     text outside well-formed calls
    tool_calls  list of {"name", "arguments"}
    errors      one line for each malformed call; its text stays in `content`
    """

    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reasoning_content: str | None = None


@dataclass(frozen=True)
class Ollama:
    """How Ollama serves a format (finetune/export/ollama.py).

    template      name of the Go template
    call_start    text that starts a call; empty: a call starts with "{"
    parser        one of Ollama's own parsers, when the Go template does not suffice to find calls
    compact_json  JSON has no spaces after separators
    stop          stop strings besides `end_of_turn`
    refused       why Ollama cannot serve the format
    """

    template: str = ""
    call_start: str = ""
    parser: str | None = None
    compact_json: bool = False
    stop: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Format:
    """One chat format.

    name              value of `--format`
    template          Jinja chat template, as `tokenizer.chat_template` takes it
    end_of_turn       strings that end an assistant turn; each must be one token of the tokenizer
    unwritten_ends    what the template writes behind an answer and behind a call only where the conversation
                      continues, up to the end of the turn; "" where the turn itself has its end
    control_tokens    strings with which the template structures a conversation; escaped in every content
    call_markers      strings that `parse` reads as a call; escaped only where the assistant writes them
    template_kwargs   variables passed to every rendering (dates, thinking); see `pinned_template`
    read_calls        (text without end of turn, tools or None) -> Parsed; None: calls are not parsed
    adapt             (format, tokenizer) -> the variant that the tokenizer's model was trained with
    detect            (added tokens, chat template of a tokenizer or "") -> why `auto` chooses the format, or None
    detect_order      `auto` asks formats in ascending order
    thinking          template variable that enables reasoning for a turn that has `reasoning_content`
    reasoning         a lone `</think>` ends reasoning, because the prompt may open it
    opened_reasoning  (what a prompt ends with to open reasoning, what closes it) where the template writes no answer's
                      reasoning behind it; "" for none
    reasoning_tags    what opens and closes reasoning before an answer; the prompt may open it
    untyped           calls carry values without their type: 7 and "7" look alike
    has_tools         the template has a place for tools and calls
    tokens            strings that must be exactly one token each, besides `end_of_turn`
    prepare           messages -> messages, applied before rendering
    vllm_parser       value of vLLM's --tool-call-parser; None: vLLM has none that reads all its calls
    ollama            how Ollama serves the format; None: it has no Go template
    """

    name: str
    template: str
    end_of_turn: tuple[str, ...]
    control_tokens: tuple[str, ...] = ()
    call_markers: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    read_calls: Callable[[str, list[dict] | None], Parsed] | None = None
    adapt: Callable[[Format, Any], Format] | None = None
    detect: Callable[[Set[str], str], str | None] | None = None
    detect_order: int = 100
    thinking: str | None = None
    reasoning: bool = False
    untyped: bool = False
    has_tools: bool = True
    tokens: tuple[str, ...] = ()
    prepare: Callable[[list[dict]], list[dict]] | None = None
    vllm_parser: str | None = None
    ollama: Ollama | None = None
    unwritten_ends: tuple[str, str] = ("", "")
    opened_reasoning: tuple[str, str] = ("", "")
    reasoning_tags: tuple[str, str] = THINK

    def parse(self, text: str, tools: list[dict] | None = None) -> Parsed:
        """Parse one generated turn; everything from the first end-of-turn string on is ignored.

        `tools` are only needed by `untyped` formats.
        """
        ends = [at for mark in self.end_of_turn if (at := text.find(mark)) >= 0]
        text = text[: min(ends, default=len(text))]
        reasoning = None
        if self.reasoning_tags != THINK:
            reasoning, text = split_reasoning(text, True, self.reasoning_tags)
        if reasoning is None:
            reasoning, text = split_reasoning(text, self.reasoning)
        parsed = self.read_calls(text, tools) if self.read_calls else Parsed(content=text.strip())
        parsed.reasoning_content = reasoning
        return parsed

    @property
    def unreadable_calls(self) -> str | None:
        """One line for a format whose generated calls nothing can read back; None for all others."""
        if self.read_calls is not None:
            return None
        return f"calls of format {self.name} cannot be read back: no parser reads what its template writes for them"

    def pinned_template(self) -> str:
        """The template with `template_kwargs` as defaults: a server that passes no variables renders the same.

        A variable that a caller passes overrides its default.
        """
        # The template may start with text, so nothing but the newline after a block tag may be stripped.
        defaults = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}{{%- endif %}}"
            for name, value in self.template_kwargs.items()
        ]
        return "".join(defaults) + self.template

    def pinned_in(self, template: str) -> dict[str, Any] | None:
        """The variables that `pinned_template` wrote into `template`; None when that is a different template."""
        if not self.template or not template.endswith(self.template):
            return None
        pins = _PIN.findall(template.removesuffix(self.template))
        try:
            found = {name: None if value == "none" else json.loads(value) for name, value in pins}
        except json.JSONDecodeError:
            return None
        return found if replace(self, template_kwargs=found).pinned_template() == template else None

    def with_kwargs(self, **kwargs: Any) -> Format:
        """The same format with some template variables replaced."""
        return replace(self, template_kwargs={**self.template_kwargs, **kwargs})


# One variable as `pinned_template` writes it: (name, literal).
_PIN = re.compile(r"\{%- if (\w+) is not defined %\}\{%- set \1 = (.*?) %\}\{%- endif %\}", re.DOTALL)


def _jinja_literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def read_template(module_file: str) -> str:
    """The Jinja template beside a format's module: same file name, suffix .jinja."""
    return Path(module_file).with_suffix(".jinja").read_text(encoding="utf-8").removesuffix("\n")


def without_reasoning(message: dict[str, Any], fmt: Format) -> dict[str, Any]:
    """A message without its reasoning, in a field of its own or at the start of the text."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": split_reasoning(kept["content"], fmt.reasoning)[1]}


def split_reasoning(text: str, lone_end: bool = False, tags: tuple[str, str] = THINK) -> tuple[str | None, str]:
    """(reasoning, rest) of a turn that starts with `<think>…</think>`, or other tags; (None, text) otherwise.

    With `lone_end` the opening tag may be missing, because the prompt already contains it.
    """
    head, closing, tail = text.partition(tags[1])
    before, opening, reasoning = head.partition(tags[0]) if tags[0] else (head, "", "")
    if closing and opening and not before.strip():
        return reasoning.strip(), tail.lstrip("\n")
    if closing and lone_end and not opening:
        return head.strip(), tail.lstrip("\n")
    return None, text


def template_error(error: Exception) -> str:
    """What a template raised, in one line."""
    text = " ".join(str(error).split())
    return text.replace("'formats.rendering.CachedDict object'", "a tool")


def place(index: int, role: str = "") -> str:
    """How a reason names a message: "message 3 (user)", counted from 1 like rows."""
    return f"message {index + 1} ({role})" if role else f"message {index + 1}"


def call_of(tool_call: Mapping[str, Any]) -> dict[str, Any]:
    """{"name", "arguments"} of one entry of `tool_calls`."""
    function = tool_call.get("function", tool_call)
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def clean_messages(messages: list[dict[str, Any]], fmt: Format | None = None) -> list[dict[str, Any]]:
    """Messages as templates expect them: no None, no empty `tool_calls`, no `train`; text parts joined to one string.

    Raises FormatError for other contents.
    """
    cleaned = []
    for index, message in enumerate(messages):
        copy = {key: value for key, value in message.items() if value is not None and key != "train"}
        copy["content"] = _as_text(copy.get("content", ""), index)
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = [_clean_call(call, index) for call in calls]
        else:
            copy.pop("tool_calls", None)
        cleaned.append(copy)
    return fmt.prepare(cleaned) if fmt is not None and fmt.prepare else cleaned


def _as_text(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise FormatError(f"{place(index)}: content must be text, not {type(content).__name__}")


def _clean_call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    function = call.get("function", call)
    function = function if isinstance(function, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise FormatError(f"{place(index)}: arguments of {name!r} are not valid JSON: {error}") from error
    if not isinstance(arguments, dict) or not isinstance(name, str):
        raise FormatError(f"{place(index)}: a tool call needs a name and arguments that are a JSON object")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {"type": "function", **rest, "function": {"name": name, "arguments": arguments}}


def render_messages(
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    fmt: Format,
    tokenizer: Any,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> str:
    """Text of cleaned messages, exactly what `apply_chat_template` renders. Raises whatever the template raises."""
    variables = {**fmt.template_kwargs, **kwargs}
    return render_template(tokenizer, fmt.template, messages, tools or None, add_generation_prompt, **variables)


def render(conversation: Mapping[str, Any], fmt: Format, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Text of a conversation {"messages", "tools"}; contents are not escaped.

    Raises FormatError when the template cannot express the conversation.
    """
    messages = clean_messages(conversation["messages"], fmt)
    try:
        return render_messages(messages, conversation.get("tools"), fmt, tokenizer, add_generation_prompt)
    except Exception as error:  # templates raise anything: TemplateError, TypeError, UndefinedError …
        raise FormatError(f"format {fmt.name} cannot express this conversation: {template_error(error)}") from error
