"""The text of an answer behind the prompt that a server feeds, where a template writes the two differently."""

from __future__ import annotations

import os


def continuation(prompt: str, upto: str, last: str, tags: tuple[str, str]) -> str | None:
    """What `upto`, the conversation with its answer, adds to `prompt`; None: it is not written behind that prompt.

    A template may write a prompt differently once the answer follows: with other white space, without a text that it
    has only at the last user's message (Mistral's system message), without the empty block that stands for no reasoning
    (Gemma 4). Then the answer is what follows the end of the prompt, from the text of its last message on.

    last  the text of the last message in the prompt
    tags  what opens and closes reasoning
    """
    if upto.startswith(prompt):
        return upto[len(prompt) :]
    before = _without_empty_block(prompt, tags)
    if before is not None and upto.startswith(before):
        return upto[len(before) :]
    shared = len(os.path.commonprefix([prompt, upto]))  # noqa: RUF071  texts, not paths
    rest, at = upto[shared:].lstrip(), shared
    while at >= 0 and not rest.startswith(prompt[at:].strip()):
        at = prompt.find(rest[:1], at + 1)
    end = prompt[at:].strip() if at >= 0 else ""
    missing = prompt[shared:at] if at >= 0 else prompt[shared:]
    if missing.strip() and not (last.strip() and last.strip() in end):
        return None
    answer = rest.removeprefix(end) if end else upto[shared:]
    space = prompt[len(prompt.rstrip()) :]
    return answer[len(os.path.commonprefix([space, answer])) :]  # noqa: RUF071


def _without_empty_block(prompt: str, tags: tuple[str, str]) -> str | None:
    """A prompt up to the reasoning that it opens and closes at once; None where it does not."""
    opened = prompt.rstrip().removesuffix(tags[1]).rstrip()
    closes = tags[0] and prompt.rstrip().endswith(tags[1]) and opened.endswith(tags[0])
    return opened.removesuffix(tags[0]) if closes else None
