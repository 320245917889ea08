"""What must hold for every encoded conversation, checked without using the encoder's own helpers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from formats import IGNORE_INDEX, Encoded, Format, decode
from formats.as_text import TEXT_MARK, marked
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
    return unicodedata.normalize("NFC", json.dumps(calls, ensure_ascii=False, sort_keys=True))


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
        texts = [
            tokenizer.apply_chat_template(
                messages[:index],
                tools=tools or None,
                chat_template=fmt.template,
                add_generation_prompt=True,
                tokenize=False,
                **{**fmt.template_kwargs, **mode},
            )
            for mode in modes
        ]
        prompts[index] = [sanitized_ids(tokenizer, text) for text in texts]
    return prompts


def sanitized_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text, as `sanitize_control_tokens=True` of Transformers 5.24 gives them: marked control strings
    and the text around them are encoded separately, behind a newline that is removed again."""

    def behind_newline(encode: Callable[[str], list[int]], piece: str) -> list[int]:
        newline, ids = ids_of("\n"), encode("\n" + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    def ids_of(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False)["input_ids"]

    if TEXT_MARK not in text:
        return ids_of(text)
    plain = _without_added_tokens(tokenizer)
    marks = {marked(token) for token in plain.removed if token}
    # A template that prints its own spelling of a control string leaves the mark alone: it only separates.
    pattern = f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})|{TEXT_MARK}"
    first, *rest = re.split(pattern, text)
    ids = ids_of(first)
    for number, piece in enumerate(rest):
        if number % 2 and piece:
            ids += behind_newline(ids_of, piece)
        elif piece:
            ids += behind_newline(plain.ids, piece.replace(TEXT_MARK, ""))
    return ids


class _WithoutAddedTokens:
    """The backend of a tokenizer, loaded without its added tokens."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.removed = [token["content"] for token in state["added_tokens"]]
        state["added_tokens"], state["post_processor"] = [], None
        self.backend = Tokenizer.from_str(json.dumps(state))

    def ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


_PLAIN: dict[Any, _WithoutAddedTokens] = {}


def _without_added_tokens(tokenizer: Any) -> _WithoutAddedTokens:
    # One for each vocabulary: loading takes a second.
    key = (tokenizer.name_or_path, tokenizer.vocab_size, frozenset(tokenizer.added_tokens_encoder))
    if key not in _PLAIN:
        _PLAIN[key] = _WithoutAddedTokens(tokenizer)
    return _PLAIN[key]


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
            answer = fmt.parse(decode(sequence.input_ids[start:end], tokenizer, fmt), row["tools"])
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
