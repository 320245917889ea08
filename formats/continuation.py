"""The text of an answer behind the prompt that a server feeds, where a template writes the two differently."""

from __future__ import annotations

import os
import re


def continuation(prompt: str, upto: str, last: str, tags: tuple[str, str]) -> str | None:
    """What `upto`, the conversation with its answer, adds to `prompt`; None: it is not written behind that prompt.

    A template may write a prompt differently once the answer follows: with other white space, without the empty block
    that stands for no reasoning (Gemma 4), without the reasoning of past calls (gpt-oss), without a text that it has
    only at the last user's message (Mistral's system message). Then the answer is what follows the end of the prompt,
    from the text of its last message (`last`) on. `tags` open and close reasoning.
    """
    if upto.startswith(prompt):
        return upto[len(prompt) :]
    head, closing = prompt.rstrip().removesuffix(tags[1]).rstrip(), prompt.rstrip().endswith(tags[1])
    if closing and tags[0] and head.endswith(tags[0]) and upto.startswith(head.removesuffix(tags[0])):
        return upto[len(head) - len(tags[0]) :]
    end = prompt[max(prompt.rfind(last.strip()), 0) :] if last.strip() else prompt[-40:]
    if (at := upto.rfind(end.rstrip())) >= 0:
        at += len(end.rstrip())
    else:  # other white space
        characters, wanted = [*re.finditer(r"\S", upto)], "".join(end.split())
        if (found := "".join(match[0] for match in characters).rfind(wanted)) < 0:
            return None
        at = characters[found + len(wanted) - 1].end()
    space = prompt[len(prompt.rstrip()) :]
    return upto[at + len(os.path.commonprefix([space, upto[at:]])) :]  # noqa: RUF071  texts, not paths
