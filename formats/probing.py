"""What a tokenizer's own template does, found by rendering with it (templates are programs: reading them misleads)."""

from __future__ import annotations

import json
import re
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

PREAMBLE = Path(__file__).with_name("own_messages.jinja").read_text(encoding="utf-8")
DATE = datetime(2024, 7, 26)
USER = {"role": "user", "content": "wq0zk"}
CALL_NAME = "fq0zk"


RESULT = {"role": "tool", "tool_call_id": "callid000", "name": CALL_NAME, "content": "rq0zk"}


def call_message(arguments: dict[str, Any] | str | None = None, call_id: str = "callid000") -> dict[str, Any]:
    """An assistant message with one call of CALL_NAME."""
    call = {"type": "function", "id": call_id, "function": {"name": CALL_NAME, "arguments": arguments or {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_USED: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


def own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; "" when there is none. Of several, as Transformers chooses: "tool_use" with tools,
    else "default".

    Lines before it make it independent of the day and of how a server spells messages: today's date is fixed, and a
    template that takes arguments only as JSON text (DeepSeek V3, functionary), that reads reasoning from `thinking` or
    `reasoning` (gpt-oss, LFM2.5), or that requires the name of the function in a result (FunctionGemma) gets them so.
    """
    if not (template := _published(tokenizer)):
        return ""
    known = _USED.setdefault(tokenizer, {})
    if template not in known:
        text = _takes_only_text(tokenizer, template)
        flags = {"TEXT_ARGUMENTS": text,
                 "REASONING": _names_reasoning_differently(tokenizer, template),
                 "RESULT_NAMES": _requires_result_names(tokenizer, template, "{}" if text else {})}  # fmt: skip
        literals = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in flags.items())
        known[template] = _fixed_date(template) + (literals + PREAMBLE if any(flags.values()) else "") + template
    return known[template]


def _fixed_date(template: str) -> str:
    """A macro in place of `strftime_now`, for the forms that the template asks for."""
    forms = set(re.findall(r"strftime_now\(\s*[\"']([^\"']+)[\"']\s*\)", template))
    if not forms or "macro strftime_now" in template:
        return ""
    dates = json.dumps({form: DATE.strftime(form) for form in sorted(forms)})
    return f"{{%- macro strftime_now(form) %}}{{{{ {dates}[form] }}}}{{%- endmacro %}}\n"


def _takes_only_text(tokenizer: Any, template: str) -> bool:
    """Whether the template raises for arguments that are an object or writes Python's repr of them, and writes JSON
    text as it is."""
    arguments = {"kq0zk": "vq0zk"}
    function = {"name": CALL_NAME, "description": "d", "parameters": {"type": "object", "properties": {}}}
    text, tools = json.dumps(arguments), [{"type": "function", "function": function}]
    of_object, of_text = (
        _rendered(tokenizer, template, [USER, call_message(one)], tools=tools) for one in (arguments, text)
    )
    written = of_text is not None and text in of_text
    return written and (of_object is None or (str(arguments) in of_object and text not in of_object))


def _requires_result_names(tokenizer: Any, template: str, arguments: dict[str, Any] | str) -> bool:
    """Whether the template raises for a result without the name of its function."""
    asked, nameless = [USER, call_message(arguments)], {key: value for key, value in RESULT.items() if key != "name"}
    named, unnamed = (_rendered(tokenizer, template, [*asked, one], tools=None) for one in (RESULT, nameless))
    return named is not None and unnamed is None


def _names_reasoning_differently(tokenizer: Any, template: str) -> bool:
    """Whether the template writes reasoning, but not that of `reasoning_content`."""
    answer, word = {"role": "assistant", "content": "aq0zk"}, "yq0zk"
    standard, *others = (
        word in (_rendered(tokenizer, template, [USER, {**answer, **dict.fromkeys(names, word)}]) or "")
        for names in (["reasoning_content"], ["thinking"], ["reasoning"], ["thinking", "reasoning"])
    )
    return not standard and any(others[:2]) and others[2]


def _published(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        with_tools, plain = template.get("tool_use"), template.get("default")
        if with_tools and plain:
            parts = (text.removesuffix("\n") for text in (with_tools, plain))
            return "{% if tools is not none %}" + "{% else %}".join(parts) + "{% endif %}"
        template = with_tools or plain
    return template or ""


def own_text(tokenizer: Any, messages: list[dict], **kwargs: Any) -> str | None:
    """The own template's rendering of `messages`; None where it raises or there is no template."""
    template = own_template(tokenizer)
    return _rendered(tokenizer, template, messages, **kwargs) if template else None


def _rendered(tokenizer: Any, template: str, messages: list[dict], **kwargs: Any) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **kwargs)
    except Exception:  # templates raise anything
        return None


def default_system(tokenizer: Any, **kwargs: Any) -> str:
    """The system text that a ChatML template adds to a conversation without one, "" for none."""
    before = (own_text(tokenizer, [USER], **kwargs) or "").partition(USER["content"])[0]
    rest = before.partition("<|im_start|>system\n")[2]
    return rest.partition("<|im_end|>")[0] if "<|im_end|>" in rest else ""


def thinks(tokenizer: Any) -> bool:
    """Whether the own template's prompt depends on `enable_thinking`."""
    prompts = [
        own_text(tokenizer, [USER], add_generation_prompt=True, enable_thinking=value) for value in (True, False)
    ]
    return prompts[0] != prompts[1]
