"""Who answers: a loaded model with its adapter on (tuned) or off (base), one answer at a time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.reply import LiveText, Reply, read_reply
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding

TUNED, BASE = "tuned", "base"


@dataclass
class Speaker:
    """A model, its tokenizer and the format it was trained with; `sides` are the answers it can give.

    Only one answer is computed at a time: switching the adapter off changes the model for everybody.
    """

    model: Any
    tokenizer: Any
    fmt: Any
    name: str = "model"
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def sides(self) -> tuple[str, ...]:
        return (TUNED, BASE) if hasattr(self.model, "disable_adapter") else (TUNED,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        from formats import check_tokenizer

        return tuple(check_tokenizer(self.tokenizer, self.fmt))

    @property
    def room(self) -> int | None:
        """Tokens that prompt and answer may have together, where the model says."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @contextlib.contextmanager
    def side(self, side: str):
        """The model as `side` for the length of a with block; other answers wait."""
        if side not in self.sides:
            raise UserError(f"{self.name} has no adapter that could be switched off, so there is no base to compare")
        with self.lock, self.model.disable_adapter() if side == BASE else contextlib.nullcontext():
            yield self.model

    def prompt_ids(self, messages: list[dict], tools: list[dict], max_new_tokens: int = 1) -> list[int]:
        """Ids of the prompt as a server feeds it. UserError when it leaves no room for an answer."""
        from formats import encode_prompt

        ids = encode_prompt(messages, tools, self.tokenizer, self.fmt)
        if self.room is not None and len(ids) + max_new_tokens > self.room:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, the answer may take {max_new_tokens:,}, the model "
                f"has room for {self.room:,} in all; start anew, declare fewer tools or lower --max_new_tokens"
            )
        return ids

    def answer(
        self,
        messages: list[dict],
        tools: list[dict],
        decoding: Decoding,
        side: str = TUNED,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Generate the next assistant turn; `on_text` gets the content as it becomes certain (see LiveText)."""
        import torch

        ids = self.prompt_ids(messages, tools, decoding.max_new_tokens)
        live = LiveText(self.tokenizer, self.fmt, tools, self.tokenizer.decode(ids[-16:]))
        streamer = _Streamer(self.tokenizer, lambda text: on_text(new) if (new := live.feed(text)) else None)
        started = time.perf_counter()
        with self.side(side) as model, torch.inference_mode():
            prompt = torch.tensor([ids], device=model.device)
            torch.manual_seed(decoding.seed)
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=decoding.generation_config(),
                **({"streamer": streamer} if on_text else {}),
            )[0, len(ids) :].tolist()
        stop = next((at for at, token in enumerate(output) if token in decoding.stop_ids), None)
        text = self.tokenizer.decode(output[:stop], skip_special_tokens=False)
        if on_text and (rest := self._rest(live, text)):
            on_text(rest)
        return read_reply(
            text, tools, self.tokenizer, self.fmt,
            finish_reason="length" if stop is None else "stop", prompt_tokens=len(ids), new_tokens=len(output),
            seconds=time.perf_counter() - started,
        )  # fmt: skip

    @staticmethod
    def _rest(live: LiveText, text: str) -> str:
        live.text = text  # without the end of the turn, which the streamer has seen too
        return live.finish()[0]


class _Streamer:
    """What `generate` calls with each new token (its `streamer` protocol); text comes out in whole characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any]):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer._tokenizer  # the fast tokenizer inside, as Transformers' own server takes it
        self._stream = DecodeStream([], skip_special_tokens=False)
        self._on_text, self._prompt = on_text, True

    def put(self, value: Any) -> None:
        if self._prompt:  # the first call brings the prompt
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            if text := self._stream.step(self._tokenizer, token):
                self._on_text(text)

    def end(self) -> None:
        pass


def load_speaker(path: str | Path, *, base: bool = False, merged: bool = False, format_name: str | None = None):
    """Load what `path` names (see `load_for_inference`) for talking; `format_name` overrules the trained format."""
    from finetune.runs.find import load_for_inference

    model, tokenizer, fmt = load_for_inference(path, base=base, merged=merged)
    if format_name:
        from formats import get_format

        fmt = get_format(format_name, tokenizer)
    return Speaker(model, tokenizer, fmt, Path(path).resolve().name if Path(path).is_dir() else str(path))
