"""What a format is, and how a conversation is rendered with one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.rendering import render_template


class FormatError(ValueError):
    """A conversation, tokenizer or format file that cannot be used together; the text says which and what to do."""


@dataclass
class Parsed:
    """Generated text read back.

    `content` is the text outside well-formed calls, `tool_calls` a list of {"name", "arguments"}, `errors` one line
    for everything that looks like a call and is none (its text stays in `content`: nothing is guessed or lost).
    """

    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reasoning_content: str | None = None


@dataclass(frozen=True)
class Format:
    """One chat format.

    template          Jinja chat template, as `tokenizer.chat_template` takes it
    end_of_turn       strings that end an assistant turn; each must be one token of the tokenizer
    control_tokens    strings with which the template structures a conversation: neutralised in every content
    call_markers      strings that `parse` takes for a call: neutralised in assistant contents and arguments only
    template_kwargs   variables passed to every rendering (pinned: dates, thinking); see `pinned_template`
    read_calls        the module's `parse`: (text without end of turn, tools or None) -> Parsed
    adapt             (format, tokenizer) -> format; chooses the variant that the tokenizer's model was trained with
    thinking          template variable that switches reasoning on for a turn that has `reasoning_content`
    reasoning         the template takes a lone `</think>` for the end of reasoning (the prompt may open it)
    untyped           calls carry values without their type: 7 and "7" look alike, a server decides by the schema
    tokens            strings that must be exactly one token each, besides end_of_turn
    prepare           messages -> messages, before anything is rendered (Mistral: ids of nine characters)
    vllm_parser       name for vLLM's --tool-call-parser, None when vLLM has none for it
    """

    name: str
    template: str
    end_of_turn: tuple[str, ...]
    control_tokens: tuple[str, ...] = ()
    call_markers: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    read_calls: Callable[..., Parsed] | None = None
    adapt: Callable[[Format, Any], Format] | None = None
    thinking: str | None = None
    vllm_parser: str | None = None
    reasoning: bool = False
    untyped: bool = False
    tokens: tuple[str, ...] = ()
    prepare: Callable[[list[dict]], list[dict]] | None = None

    def parse(self, text: str, tools: list[dict] | None = None) -> Parsed:
        """Read one generated turn; everything from the first end-of-turn string on is ignored.

        `tools` is only needed by formats that write values without their type (qwen-xml).
        """
        ends = [at for mark in self.end_of_turn if (at := text.find(mark)) >= 0]
        if ends:
            text = text[: min(ends)]
        reasoning, text = split_reasoning(text, self.reasoning)
        parsed = self.read_calls(text, tools) if self.read_calls else Parsed(content=text.strip())
        parsed.reasoning_content = reasoning
        return parsed

    def pinned_template(self) -> str:
        """The template with its pinned variables baked in: renders the same when a server passes no variables.

        A variable that a caller does pass still wins.
        """
        lines = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}{{%- endif %}}"
            for name, value in self.template_kwargs.items()
        ]
        # A template's first output may be text: the block tags above strip nothing behind them but their own newline.
        return "".join(lines) + self.template

    def pinned_in(self, template: str) -> dict[str, Any] | None:
        """The variables that `pinned_template` has baked into `template`; None when that is another template."""
        if not self.template or not template.endswith(self.template):
            return None
        pins = _PIN.findall(template.removesuffix(self.template))
        try:
            found = {name: None if value == "none" else json.loads(value) for name, value in pins}
        except json.JSONDecodeError:
            return None
        return found if replace(self, template_kwargs=found).pinned_template() == template else None

    def with_kwargs(self, **kwargs: Any) -> Format:
        """The same format with some pinned variables replaced."""
        return replace(self, template_kwargs={**self.template_kwargs, **kwargs})


# One variable as `pinned_template` writes it: (name, literal).
_PIN = re.compile(r"\{%- if (\w+) is not defined %\}\{%- set \1 = (.*?) %\}\{%- endif %\}", re.DOTALL)


def _jinja_literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)


def read_template(name: str) -> str:
    """The Jinja file of a format of this package."""
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def split_reasoning(text: str, lone_end: bool = False) -> tuple[str | None, str]:
    """(reasoning, rest) of a turn that starts with `<think>…</think>`; (None, text) when it does not.

    With `lone_end` the opening tag may be missing: it belongs to the prompt of templates that start the answer so.
    """
    head, closing, tail = text.partition("</think>")
    if not closing:
        return None, text
    before, opening, reasoning = head.partition("<think>")
    if opening and not before.strip():
        return reasoning.strip(), tail.lstrip("\n")
    if lone_end and not opening:
        return head.strip(), tail.lstrip("\n")
    return None, text  # somebody writes about tags


def place(index: int, role: str = "") -> str:
    """How a reason names a message: "message 3 (user)", counted from 1 like rows."""
    return f"message {index + 1} ({role})" if role else f"message {index + 1}"


def call_of(tool_call: Mapping[str, Any]) -> dict[str, Any]:
    """{"name", "arguments"} of one entry of `tool_calls`."""
    function = tool_call.get("function", tool_call)
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def clean_messages(messages: list[dict[str, Any]], fmt: Format | None = None) -> list[dict[str, Any]]:
    """Messages as a template shall see them: no None, no empty `tool_calls`, no keys that only training knows.

    Lists of text parts become one string. Raises FormatError for other contents.
    """
    cleaned = []
    for index, message in enumerate(messages):
        copy = {key: value for key, value in message.items() if value is not None and key != "train"}
        if not copy.get("tool_calls"):
            copy.pop("tool_calls", None)
        copy["content"] = _as_text(copy.get("content", ""), index)
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = [_clean_call(call, index) for call in calls]
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
    function = dict(call.get("function", call))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise FormatError(f"{place(index)}: arguments of {function.get('name')!r} are no JSON: {error}") from error
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise FormatError(f"{place(index)}: a tool call needs a name and arguments that are a JSON object")
    function = {"name": function["name"], "arguments": arguments}
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {"type": "function", **rest, "function": function}


def render_messages(
    messages: list[dict[str, Any]],
    tools: list[dict] | None,
    fmt: Format,
    tokenizer: Any,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> str:
    """Text of clean messages, as `apply_chat_template` renders it for a server. Raises whatever the template raises."""
    variables = {**fmt.template_kwargs, **kwargs}
    return render_template(tokenizer, fmt.template, messages, tools or None, add_generation_prompt, **variables)


def render(conversation: Mapping[str, Any], fmt: Format, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Text of a whole conversation {"messages", "tools"}; contents are taken as they are (nothing is escaped).

    Raises FormatError when the template cannot express the conversation.
    """
    try:
        return render_messages(
            clean_messages(conversation["messages"], fmt),
            conversation.get("tools"),
            fmt,
            tokenizer,
            add_generation_prompt,
        )
    except FormatError:
        raise
    except Exception as error:  # templates raise anything: TemplateError, TypeError, UndefinedError …
        raise FormatError(f"format {fmt.name} cannot express this conversation: {error}") from error
