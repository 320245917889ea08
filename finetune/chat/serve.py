"""An OpenAI-compatible server for trying out a client: /v1/chat/completions, /v1/models and /health."""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, model_validator

from finetune.chat.address import check_address
from finetune.chat.guard import MAX_MESSAGES, MAX_TOOLS, Access, Guard, server_token
from finetune.chat.model import TUNED, ChatModel
from finetune.chat.reply import Reply
from finetune.errors import UserError
from formats import FormatError
from formats.calls import reject_lone_surrogates

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding

# Accepted because clients send them, but without effect.
IGNORED_FIELDS = {
    "metadata", "parallel_tool_calls", "reasoning_effort", "service_tier", "store", "stream_options", "top_logprobs",
    "user",
}  # fmt: skip
log = logging.getLogger("sandwich")


class ChatRequest(BaseModel):
    """The fields of OpenAI's chat completion request that are supported."""

    model_config = ConfigDict(extra="allow")
    model: str = TUNED
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none"] | None = None
    stream: StrictBool | None = None
    max_tokens: StrictInt | None = Field(None, ge=1, le=10**9)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=10**9)
    temperature: StrictInt | StrictFloat | None = Field(None, ge=0, le=100)
    top_p: StrictInt | StrictFloat | None = Field(None, ge=0, le=1)
    frequency_penalty: StrictInt | StrictFloat | None = Field(None, gt=-1, le=2)
    presence_penalty: StrictInt | StrictFloat | None = Field(None, ge=-2, le=2)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    stop: None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, body: Any) -> Any:
        reject_lone_surrogates(body)
        if isinstance(body, dict) and (unknown := body.keys() - cls.model_fields.keys() - IGNORED_FIELDS):
            raise ValueError(f"not supported: {', '.join(sorted(unknown))}")
        return body

    def decoding(self, default: Decoding) -> Decoding:
        """The requested decoding; what the request does not set comes from `default`."""
        return replace(
            default,
            max_new_tokens=self.max_tokens or self.max_completion_tokens or default.max_new_tokens,
            temperature=default.temperature if self.temperature is None else float(self.temperature),
            seed=random.getrandbits(63) if self.seed is None else self.seed,
        )

    def options(self) -> dict[str, float]:
        """Further entries of the GenerationConfig; frequency_penalty is mapped as in `transformers serve`."""
        penalty = None if self.frequency_penalty is None else 1.0 + self.frequency_penalty
        options = {"top_p": self.top_p, "repetition_penalty": penalty}
        return {name: value for name, value in options.items() if value is not None}


def serve(model: ChatModel, decoding: Decoding, host: str, port: int) -> None:
    """Serve until Ctrl-C. UserError when the port is in use."""
    check_address(host, port)
    token = server_token(host)
    log.info("serving %s at http://%s:%s/v1 (models: %s) %s an API key; stop with Ctrl-C",
             model.name, host, port, ", ".join(model.sides), "with" if token else "without")  # fmt: skip
    uvicorn.run(guarded(build_app(model, decoding), host, token), host=host, port=port, log_level="warning")


def guarded(app: Callable[..., Awaitable[None]], host: str, token: str = "") -> Guard:
    """The application behind the checks of who may use it; /health always answers."""
    return Guard(app, Access(host, token, health_path="/health"))


def build_app(model: ChatModel, decoding: Decoding) -> FastAPI:
    """The FastAPI application; `decoding` is the default of a request."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    @app.exception_handler(RequestValidationError)
    def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}".lstrip(": ") for one in error.errors()]
        return JSONResponse({"detail": "; ".join(problems)}, 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entry = {"object": "model", "created": started, "owned_by": model.name}
        return {"object": "list", "data": [{"id": side, **entry} for side in model.sides]}

    @app.post("/v1/chat/completions", response_model=None)
    def complete(request: ChatRequest) -> JSONResponse | StreamingResponse:
        if request.model not in (*model.sides, model.name):
            raise HTTPException(404, f"no model {request.model!r}; choose from {', '.join(model.sides)}")
        side = request.model if request.model in model.sides else TUNED
        tools = [] if request.tool_choice == "none" else request.tools or []
        settings = request.decoding(decoding)
        try:
            model.prompt_ids(request.messages, tools, settings.max_new_tokens)
        except (FormatError, UserError) as error:
            raise HTTPException(400, str(error)) from error
        events = model.stream(request.messages, tools, settings, side, **request.options())
        head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": request.model}
        if request.stream:
            return StreamingResponse(_chunks(events, head), media_type="text/event-stream")
        *_, reply = events
        message = {"role": "assistant", **_fields(reply, head["id"])}
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(reply)}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)})

    return app


def _chunks(events: Iterator[str | Reply], head: dict[str, Any]) -> Iterator[str]:
    """Server-sent events of a streamed answer."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice], **more})}\n\n"

    yield chunk({"role": "assistant"})
    for event in events:
        if isinstance(event, str):
            yield chunk({"content": event})
            continue
        fields = _fields(event, head["id"])
        del fields["content"]  # sent in pieces
        calls = [{"index": at, **call} for at, call in enumerate(fields.pop("tool_calls", []))]
        if calls or fields:
            yield chunk({**fields, **({"tool_calls": calls} if calls else {})})
        yield chunk({}, _finish_reason(event), usage=_usage(event))
    yield "data: [DONE]\n\n"


def _fields(reply: Reply, request_id: str) -> dict[str, Any]:
    """Content, reasoning and calls as OpenAI's API has them; calls that cannot be read stay in the content."""
    for error in reply.parse_errors:
        log.warning("not a call: %s (its text is in the answer's content)", error)
    message = reply.message([f"{request_id}_tool_call_{at}" for at in range(len(reply.tool_calls))])
    del message["role"]
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return message


def _finish_reason(reply: Reply) -> str:
    return "tool_calls" if reply.tool_calls else reply.finish_reason


def _usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.new_tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens, "total_tokens": total}
