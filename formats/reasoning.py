"""The tags around an answer's reasoning, derived from renderings."""

from __future__ import annotations

import os
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
    """(what a prompt ends with to open reasoning, what closes it) where an answer has none of it; "" for none.

    DeepSeek R1 and QwQ always think; their templates drop the reasoning of every answer. Cohere 2 writes it, but
    opens none where there is none.
    """
    prompt, plain = render([USER], add_generation_prompt=True) or "", render([USER, answer(ANSWER)]) or ""
    if ANSWER not in plain:
        return "", ""
    opened = re.search(r"[<\[][^<>\[\]]*[>\]]\s*\Z", prompt)
    unclosed = plain.startswith(prompt)  # the answer may still be inside of the reasoning
    shared = prompt[: opened.start()] if opened and unclosed else os.path.commonprefix([prompt, plain])  # noqa: RUF071
    start = re.sub(r"[<\[][^>\]]*\Z", "", shared)  # without a tag that has only begun
    opening, before = prompt[len(start) :], plain[len(start) :].partition(ANSWER)[0]
    if not re.fullmatch(_TAG, opening.strip()):
        return "", ""
    written = render([USER, {**answer(ANSWER), "reasoning_content": REASONING}]) or ""
    closing = written.removeprefix(prompt + REASONING).partition(ANSWER)[0].removesuffix(before)
    if not written.startswith(prompt + REASONING) or not closing.strip():
        closing = opening.strip().replace("<", "</", 1).replace("[", "[/", 1)
        if closing not in template:
            return "", ""
        space = opening[len(opening.rstrip()) :]
        closing = f"{space}{closing}{2 * space}"
    return ("", "") if unclosed and closing.strip() in plain[len(prompt) :] else (opening, closing)
