"""What a tokenizer's own template does, found by rendering with it (templates are programs: reading them misleads)."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "wq0zk"}


def own_text(tokenizer: Any, messages: list[dict], **kwargs: Any) -> str | None:
    """The own template's rendering of `messages`, None where it raises or there is no template."""
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception:  # templates raise anything
        return None


def default_system(tokenizer: Any, opening: str, closing: str) -> str:
    """The system text that the own template puts before a conversation without one, "" for none."""
    text = own_text(tokenizer, [USER]) or ""
    before = text.partition(USER["content"])[0]
    _, found, rest = before.partition(opening)
    return rest.partition(closing)[0] if found and closing in rest else ""


def thinks(tokenizer: Any) -> bool:
    """True when the own template's prompt depends on `enable_thinking`."""
    prompts = [
        own_text(tokenizer, [USER], add_generation_prompt=True, enable_thinking=value) for value in (True, False)
    ]
    return prompts[0] != prompts[1]
