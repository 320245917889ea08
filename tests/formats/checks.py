"""What must hold for every encoded conversation, checked without using the encoder's own helpers."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from formats import IGNORE_INDEX, Encoded, Format
from formats.base import clean_messages
from formats.escape import escape_conversation


def spans(labels: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of trained tokens."""
    found, start = [], None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            found.append((start, index))
            start = None
    return found


def exact_calls(calls: list[dict]) -> str:
    return unicodedata.normalize("NFC", json.dumps(calls, ensure_ascii=False))


def served_prompts(
    row: dict, tokenizer: Any, fmt: Format, control_tokens: str = "escape"
) -> dict[int, list[list[int]]]:
    """Ids a server gets before each assistant turn, through Transformers alone; with thinking off and on.

    It is fed what training was: escaped contents, and ids that the template takes.
    """
    messages, tools, _ = escape_conversation(
        clean_messages(row["messages"], fmt), row["tools"], tokenizer, fmt, control_tokens
    )
    modes = [{}] if fmt.thinking is None else [{}, {fmt.thinking: True}]
    prompts = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not index or row["messages"][index].get("train") is False:
            continue
        prompts[index] = [
            tokenizer.apply_chat_template(
                messages[:index],
                tools=tools or None,
                chat_template=fmt.template,
                add_generation_prompt=True,
                return_dict=False,
                **{**fmt.template_kwargs, **mode},
            )
            for mode in modes
        ]
    return prompts


def assert_exact(row: dict, encoded: Encoded, tokenizer: Any, fmt: Format, control_tokens: str = "escape") -> None:
    """Parity with the server at every trained turn, and nothing trained but answers and their end."""
    trained = [
        index
        for index, message in enumerate(row["messages"])
        if message["role"] == "assistant" and message.get("train", True) is not False
    ]
    if encoded.status == "refused":
        assert encoded.reason and not encoded.sequences
        return
    assert encoded.status == ("ok" if len(encoded.sequences) == 1 else "split")
    prompts = served_prompts(row, tokenizer, fmt, control_tokens)
    ends = {tokenizer.convert_tokens_to_ids(end) for end in fmt.end_of_turn}
    turn = 0
    for sequence in encoded.sequences:
        assert len(sequence.input_ids) == len(sequence.labels) == len(sequence.roles)
        pairs = zip(sequence.labels, sequence.input_ids, strict=True)
        assert all(label in (IGNORE_INDEX, token) for label, token in pairs)
        for start, end in spans(sequence.labels):
            index = trained[turn]
            assert sequence.input_ids[:start] in prompts[index], f"turn {index}: not what a server feeds"
            assert sequence.input_ids[end - 1] in ends, f"turn {index}: does not end with the end of the turn"
            assert not ends & set(sequence.input_ids[start : end - 1]), f"turn {index}: an end inside the span"
            answer = fmt.parse(tokenizer.decode(sequence.input_ids[start:end]), row["tools"])
            message = escape_conversation([row["messages"][index]], [], tokenizer, fmt, control_tokens)[0][0]
            wanted = [call["function"] for call in message.get("tool_calls", [])]
            if fmt.read_calls is not None:
                # Qwen's tokenizer composes characters (NFC): that much a decoded text may differ.
                same = exact_calls(answer.tool_calls) == exact_calls(wanted) if not fmt.untyped else True
                assert same, f"turn {index}: {answer.tool_calls} is trained for {wanted}"
            turn += 1
        outside = {role for role, label in zip(sequence.roles, sequence.labels, strict=True) if label != IGNORE_INDEX}
        assert outside <= {"assistant"}, f"trained tokens of {outside}"
    assert turn == len(trained), f"{turn} of {len(trained)} turns are trained"
