"""The tags around an answer's reasoning, derived from renderings."""

from __future__ import annotations

import re
from collections.abc import Callable

from formats.base import THINK
from formats.derivation import ANSWER, NAMES, USER, answer, call

REASONING = "yq1zk"
_TAG = re.compile(r"\s*(<[^<>]+>|\[[^\[\]]+\])")


def reasoning_tags(render: Callable[..., str | None]) -> tuple[str, str] | None:
    """(opening, closing) around `reasoning_content`; None where the template writes it as `<think>`, or not at all.

    To the closing tag belongs what only answers with reasoning have behind it: `<|end|><|start|>assistant` of gpt-oss.
    """
    prompt = render([USER], add_generation_prompt=True) or ""
    found = set()
    for turn, word in ((answer(ANSWER), ANSWER), (answer("", call()), NAMES[0])):
        text, plain = (render([USER, message]) or "" for message in ({**turn, "reasoning_content": REASONING}, turn))
        head, reasoning, tail = text.partition(REASONING)
        tail = tail.partition(word)[0]
        if reasoning and (closing := _TAG.match(tail)):
            rest = tail.removesuffix(plain.removeprefix(prompt).partition(word)[0]).strip()
            opening = head.removeprefix(prompt).strip() if head.startswith(prompt) else ""
            found.add((opening, rest if rest.startswith(closing[1]) else closing[1]))
    return found.pop() if len(found) == 1 and not any(closing.startswith(THINK[1]) for _, closing in found) else None


def opened_reasoning(render: Callable[..., str | None], template: str) -> tuple[str, str]:
    """(what a prompt ends with to open reasoning that the template writes in no answer, what closes it); "" for none.

    DeepSeek R1, QwQ and their distilled models always think; their templates drop the reasoning of every answer.
    """
    prompt, text = render([USER], add_generation_prompt=True) or "", render([USER, answer(ANSWER)]) or ""
    before, found, _ = text.partition(ANSWER)
    opening = prompt.removeprefix(before) if found and prompt.startswith(before) else ""
    closing = opening.strip().replace("<", "</", 1).replace("[", "[/", 1)
    if not re.fullmatch(_TAG, opening.strip()) or closing not in template:
        return "", ""
    space = opening[len(opening.rstrip()) :]
    return opening, f"{space}{closing}{2 * space}"
