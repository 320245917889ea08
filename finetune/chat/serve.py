"""An OpenAI-compatible server for trying a client: Transformers' own (`transformers serve`), with our formats in it.

Taken over: HTTP, validation, streaming, the inference thread, the objects of OpenAI's API. Put in at its seams:
* a processor whose `apply_chat_template` is `encode_prompt` (the trained template, control tokens of the data
  neutralised) and whose `parse_response` is the format's `parse`;
* a response parser for streams with the same meaning (LiveText);
* a model that is already loaded, with the adapter on or off by the name a request asks for.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from dataclasses import replace
from typing import Any, ClassVar

from finetune.chat.address import check_address
from finetune.chat.reply import LiveText, unescaped
from finetune.chat.speaker import BASE, TUNED, Speaker
from finetune.errors import UserError
from finetune.generation.generate import Decoding
from formats.calls import reject_lone_surrogates

PATHS = ("/v1/chat/completions", "/v1/models", "/health")
log = logging.getLogger("sandwich")


def serve(speaker: Speaker, decoding: Decoding, host: str, port: int) -> None:
    """Serve until Ctrl-C. UserError when the packages are missing or the port is taken."""
    app = build_app(speaker, decoding)
    import uvicorn

    check_address(host, port)
    models = " and ".join(speaker.sides)
    log.info("serving %s at http://%s:%s/v1 (models: %s); no password is asked; Ctrl-C ends it",
             speaker.name, host, port, models)  # fmt: skip
    uvicorn.run(app, host=host, port=port, log_level="warning")


def build_app(speaker: Speaker, decoding: Decoding) -> Any:
    """The FastAPI application; `decoding` is what a request gets that names no limit and no temperature."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--serve needs {', '.join(missing)}; run: pip install -r requirements_optional.txt")
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    handler = _handler(speaker, decoding)
    app = build_server(_OneModel(speaker), handler, None, None, None, GenerationState())
    # What is left is what works with a trained format; the rest would load other models or skip the format.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    return app


class _OneModel:
    """Takes the place of Transformers' model manager: nothing is loaded or unloaded on request."""

    def __init__(self, speaker: Speaker):
        self.speaker, self.started = speaker, int(time.time())

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [
            {"id": side, "object": "model", "created": self.started, "owned_by": self.speaker.name}
            for side in self.speaker.sides
        ]

    def get_model_modality(self, model: Any, processor: Any = None) -> Any:
        from transformers.cli.serving.utils import Modality

        return Modality.LLM

    def shutdown(self) -> None:
        """Nothing to unload."""


class _Side:
    """The model with the adapter on or off, for the length of one `generate`."""

    def __init__(self, speaker: Speaker, side: str, generation_config: Any):
        self._speaker, self._side, self.generation_config = speaker, side, generation_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._speaker.model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._speaker.side(self._side) as model:
            return model.generate(*args, **kwargs)


class _Processor:
    """The tokenizer of one request: renders and parses by the format, which may need the request's tools."""

    # Only its presence matters: `parse_response` and `stream_parser` below do the work.
    response_template: ClassVar[dict] = {"start_anchor": "\0", "fields": {"content": {"content": "text"}}}

    def __init__(self, speaker: Speaker, tools: list[dict[str, Any]], max_new_tokens: int):
        self._speaker, self._tools, self._max_new_tokens = speaker, tools, max_new_tokens
        self.prompt = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._speaker.tokenizer, name)

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> Any:
        import torch
        from transformers import BatchEncoding

        ids = self._speaker.prompt_ids(messages, self._tools, self._max_new_tokens)
        self.prompt = self._speaker.tokenizer.decode(ids[-16:])
        return BatchEncoding({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()})

    def parse_response(self, generated_ids: Any, _template: Any, prefix: str = "") -> dict[str, Any]:
        text = self._speaker.tokenizer.decode(generated_ids, skip_special_tokens=False)
        fmt = self._speaker.fmt
        parsed = unescaped(fmt.parse(text, self._tools or None), self._speaker.tokenizer, fmt)
        for error in parsed.errors:
            log.warning("not a call: %s (its text is in the answer's content)", error)
        calls = [{"type": "function", "function": _sent(call)} for call in parsed.tool_calls]
        return {"content": parsed.content, "thinking": parsed.reasoning_content, "tool_calls": calls}

    def stream_parser(self) -> _StreamParser:
        return _StreamParser(self)


def _sent(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


class _StreamParser:
    """The events of Transformers' ResponseParser, out of LiveText."""

    initial_events: tuple = ()

    def __init__(self, processor: _Processor):
        speaker = processor._speaker
        self._live = LiveText(speaker.tokenizer, speaker.fmt, processor._tools, processor.prompt)

    def feed(self, text: str) -> list[dict[str, Any]]:
        return _content(self._live.feed(text))

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rest, parsed = self._live.finish()
        for error in parsed.errors:
            log.warning("not a call: %s (its text is in the answer's content)", error)
        events = []
        if parsed.reasoning_content:
            events.append({"type": "region_chunk", "field": "thinking", "text": parsed.reasoning_content})
        events += _content(rest)
        for call in parsed.tool_calls:
            value = {"type": "function", "function": _sent(call)}
            events.append({"type": "region_close", "field": "tool_calls", "value": value})
        return {}, events


# What a request may say, from and to; whole numbers where the bounds are.
NUMBERS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 10**9), "max_completion_tokens": (1, 10**9), "seed": (-(2**63), 2**63 - 1),
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "frequency_penalty": (-2.0, 2.0), "presence_penalty": (-2.0, 2.0),
}  # fmt: skip


def wrong_number(body: dict[str, Any]) -> str | None:
    """What is wrong with the first number of a request that is none or out of bounds; None when nothing is."""
    for name, (low, high) in NUMBERS.items():
        value = body.get(name)
        kinds = (int,) if isinstance(low, int) else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high):
            return f"{name}: {value!r} is no {'whole ' if kinds == (int,) else ''}number from {low:g} to {high:g}"
    return None


def _content(text: str) -> list[dict[str, Any]]:
    return [{"type": "region_chunk", "field": "content", "text": text}] if text else []


def _handler(speaker: Speaker, decoding: Decoding) -> Any:
    """Transformers' handler of /v1/chat/completions; made here because its module needs fastapi and openai."""
    from fastapi import HTTPException
    from transformers.cli.serving import chat_completion
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    from formats import FormatError

    class Manager(GenerateManager):
        """Sequential generation; streams are read by the request's own format."""

        def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
            return super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser=processor.stream_parser()
            )

    class State(GenerationState):
        manager = Manager()

        def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
            return self.manager

        def use_continuous_batching(self, model: Any, modality: Any) -> bool:
            return False

    class Handler(chat_completion.ChatCompletionHandler):
        def _validate_request(self, body: dict) -> None:
            super()._validate_request(body)
            choice = body.get("tool_choice")
            if choice not in (None, "auto", "none"):
                raise HTTPException(400, "tool_choice: a call cannot be forced here; leave it out, or say auto or none")
            # Transformers' server would pass over these in silence.
            wanted = body.get("response_format") or {"type": "text"}
            if wanted != {"type": "text"} or body.get("n") not in (None, 1) or body.get("logprobs") or body.get("stop"):
                raise HTTPException(400, "response_format, n, logprobs and stop are not served here")
            if not body.get("messages"):
                raise HTTPException(400, "messages: there is none")
            if not isinstance(body["messages"], list) or not all(isinstance(one, dict) for one in body["messages"]):
                raise HTTPException(400, "messages: a list of objects is needed")
            if reason := wrong_number(body):
                raise HTTPException(400, reason)
            try:
                reject_lone_surrogates(body)
            except ValueError as error:
                raise HTTPException(400, f"the request holds {error}") from error
            if body.get("max_tokens") is None and body.get("max_completion_tokens") is not None:
                body["max_tokens"] = body["max_completion_tokens"]

        def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
            name = body.get("model") or TUNED
            side = BASE if name == BASE else TUNED
            if name not in (*speaker.sides, speaker.name):
                raise HTTPException(404, f"model {name!r} is not served here; there is {', '.join(speaker.sides)}")
            tools = [] if body.get("tool_choice") == "none" else body.get("tools") or []
            processor = _Processor(speaker, tools, int(body.get("max_tokens") or decoding.max_new_tokens))
            return name, _Side(speaker, side, decoding.generation_config()), processor

        @staticmethod
        def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
            return messages  # formats.base.clean_messages reads OpenAI's own spelling, and keeps text beside calls

        def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
            config = super()._build_generation_config(body, model_generation_config)
            config.max_new_tokens = int(body.get("max_tokens") or decoding.max_new_tokens)
            temperature = body.get("temperature")
            given = replace(decoding, temperature=decoding.temperature if temperature is None else float(temperature))
            drawn = given.generation_config()
            config.do_sample, config.temperature, config.top_k = drawn.do_sample, drawn.temperature, drawn.top_k
            return config

        async def handle_request(self, body: dict, request_id: str) -> Any:
            try:
                return await super().handle_request(body, f"chatcmpl-{request_id}")
            except (FormatError, UserError) as error:
                raise HTTPException(400, str(error)) from error

    # The module builds a parser for streams of every model with a response template; ours comes from the manager.
    return Handler(_OneModel(speaker), State())
