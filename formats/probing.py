"""What a tokenizer's own template does, found by rendering with it (templates are programs: reading them misleads)."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "wq0zk"}
CALL_NAME = "fq0zk"


def call_message(arguments: dict[str, Any] | None = None, call_id: str = "callid000") -> dict[str, Any]:
    """An assistant message with one call of CALL_NAME."""
    call = {"type": "function", "id": call_id, "function": {"name": CALL_NAME, "arguments": arguments or {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; "" when there is none. Of several, as Transformers chooses: "tool_use" with tools,
    else "default"."""
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
    if not template:
        return None
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
