"""A loaded model that answers one request at a time, with its adapter on (tuned) or off (base)."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.reply import LiveText, Reply, read_reply
from finetune.errors import UserError
from finetune.models.limits import context_limit
from formats import Format, check_tokenizer, decode, encode_prompt

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.generation.generate import Decoding

TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class Penalties:
    """OpenAI's penalties on tokens that the answer already has: for each time, and once. A logits processor."""

    frequency: float
    presence: float
    prompt_length: int = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self.prompt_length :]
        counts = scores.new_zeros(scores.shape).scatter_add_(1, answer, scores.new_ones(answer.shape))
        return scores - self.frequency * counts - self.presence * (counts > 0)


@dataclass
class ChatModel:
    """A model, its tokenizer and the format it was trained with.

    Only one answer is computed at a time, because switching the adapter off changes the model for every request.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    fmt: Format
    name: str = "model"
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def sides(self) -> tuple[str, ...]:
        """Which answers it can give: TUNED, and BASE where the adapter can be switched off."""
        return (TUNED, BASE) if hasattr(self.model, "disable_adapter") else (TUNED,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(check_tokenizer(self.tokenizer, self.fmt))

    @contextlib.contextmanager
    def side(self, side: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model as `side` inside the block; other answers wait."""
        if side not in self.sides:
            raise UserError(f"{self.name} has no adapter to switch off, so there is no base model to compare with")
        with self.lock, self.model.disable_adapter() if side == BASE else contextlib.nullcontext():
            yield self.model

    def prompt_ids(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Ids of the prompt as a server feeds it. UserError when it leaves no room for an answer."""
        ids = encode_prompt(messages, tools, self.tokenizer, self.fmt)
        if self.room(ids) < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the model has room for {context_limit(self.model):,} "
                "with the answer; start a new conversation, or declare fewer tools"
            )
        return ids

    def room(self, ids: list[int]) -> float:
        """The longest answer to this prompt."""
        context = context_limit(self.model)
        return math.inf if context is None else context - len(ids)

    def stream(
        self, messages: list[dict], tools: list[dict], decoding: Decoding, side: str = TUNED,
        penalties: Penalties | None = None, **options: Any,
    ) -> Iterator[str | Reply]:  # fmt: skip
        """Generate the next assistant turn: yields its content as it becomes certain (see LiveText), then the Reply.

        Closing the iterator stops the generation. `options` are further entries of the GenerationConfig.
        """
        ids = self.prompt_ids(messages, tools)
        decoding = replace(decoding, max_new_tokens=int(min(decoding.max_new_tokens, self.room(ids))))
        live = LiveText(self.tokenizer, self.fmt, tools, self.tokenizer.decode(ids[-16:]))
        events: queue.Queue[str | list[int] | BaseException] = queue.Queue()
        streamer = _Streamer(self.tokenizer, events.put)
        processors = [replace(penalties, prompt_length=len(ids))] if penalties else []

        def work() -> None:
            try:
                with self.side(side) as model:
                    events.put(_generate(model, ids, decoding, streamer, processors, options))
            except BaseException as error:
                events.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(event := _next(events), str):
                if new := live.feed(event):
                    yield new
        finally:
            streamer.cancelled = True
            worker.join()
        if isinstance(event, BaseException):
            raise event
        stop = next((at for at, token in enumerate(event) if token in decoding.stop_ids), None)
        live.text = text = decode(event[:stop], self.tokenizer, self.fmt)  # without the end of the turn
        if rest := live.finish(is_cut=stop is None)[0]:
            yield rest
        yield read_reply(
            text, tools, self.tokenizer, self.fmt,
            finish_reason="length" if stop is None else "stop", prompt_tokens=len(ids), new_tokens=len(event),
        )  # fmt: skip


def _generate(
    model: PreTrainedModel, ids: list[int], decoding: Decoding, streamer: _Streamer, processors: list[Penalties],
    options: dict[str, Any],
) -> list[int]:  # fmt: skip
    import torch
    from transformers import LogitsProcessorList

    config = decoding.generation_config()
    config.update(**options)
    prompt = torch.tensor([ids], device=model.device)
    torch.manual_seed(decoding.seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer,
            logits_processor=LogitsProcessorList(processors),
        )  # fmt: skip
    return output[0, len(ids) :].tolist()


def _next(events: queue.Queue) -> Any:
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=0.5)  # on Windows, Ctrl-C does not interrupt a wait without a timeout


class _Streamer:
    """The `streamer` of `generate`: passes on the text in complete characters; raises when cancelled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer._tokenizer  # the fast tokenizer, as in Transformers' own server
        self._decoder = DecodeStream([], skip_special_tokens=False)
        self._on_text, self._is_prompt, self.cancelled = on_text, True, False

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise RuntimeError("the answer was cancelled")
        if not self._is_prompt:  # the first call passes the prompt
            for token in value.reshape(-1).tolist():
                if text := self._decoder.step(self._tokenizer, token):
                    self._on_text(text)
        self._is_prompt = False

    def end(self) -> None:
        """Called after the last token."""


def load_chat_model(path: str | Path, **options: Any) -> ChatModel:
    """Load the model that `path` names; options and errors as of `load_for_inference`."""
    from finetune.runs.find import load_for_inference

    name = Path(path).resolve().name if Path(path).is_dir() else str(path)
    return ChatModel(*load_for_inference(path, **options), name)
