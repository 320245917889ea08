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
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from finetune.chat.address import check_address, url
from finetune.chat.guard import MAX_MESSAGES, MAX_TOOLS, Access, Guard, server_token
from finetune.chat.model import TUNED, ChatModel, Penalties
from finetune.chat.reply import Reply
from finetune.errors import UserError
from finetune.reading.row_files import RowError
from finetune.reading.tool_schemas import normalize_tools
from formats import FormatError
from formats.calls import MAX_JSON_DEPTH, json_depth, reject_lone_surrogates

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding

# Accepted because clients send them, but without effect.
IGNORED_FIELDS = {
    "metadata", "reasoning_effort", "service_tier", "store", "stream_options", "top_logprobs", "user",
}  # fmt: skip
MAX_DETAIL = 2000  # characters of a refusal, which may quote the request
log = logging.getLogger("sandwich")


class Message(BaseModel):
    """What every template relies on; further fields are passed on."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """The fields of OpenAI's chat completion request that are supported."""

    model_config = ConfigDict(extra="allow")
    model: str = TUNED
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: StrictBool | None = None
    stream: StrictBool | None = None
    max_tokens: StrictInt | None = Field(None, ge=1, le=10**9)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=10**9)
    temperature: StrictInt | StrictFloat | None = Field(None, ge=0, le=100)
    top_p: StrictInt | StrictFloat | None = Field(None, ge=0, le=1)
    frequency_penalty: StrictInt | StrictFloat | None = Field(None, ge=-2, le=2)
    presence_penalty: StrictInt | StrictFloat | None = Field(None, ge=-2, le=2)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    stop: None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body  # refused by its type
        if json_depth(body) > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
        reject_lone_surrogates(body)
        if unknown := body.keys() - cls.model_fields.keys() - IGNORED_FIELDS:
            raise ValueError(f"not supported: {', '.join(sorted(unknown))[:MAX_DETAIL]}")
        return body

    @field_validator("tools")
    @classmethod
    def _read_tools(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        """As training reads them, so that the prompt is the one that was trained."""
        try:
            return normalize_tools(tools)
        except RowError as error:
            raise ValueError(f'{error}; write {{"type": "function", "function": {{"name": …}}}}') from error

    def decoding(self, default: Decoding) -> Decoding:
        """The requested decoding; what the request does not set comes from `default`."""
        return replace(
            default,
            max_new_tokens=self.max_tokens or self.max_completion_tokens or default.max_new_tokens,
            temperature=default.temperature if self.temperature is None else float(self.temperature),
            seed=random.getrandbits(63) if self.seed is None else self.seed,
        )

    def penalties(self) -> Penalties | None:
        """Those of OpenAI's API; None without any."""
        penalties = Penalties(float(self.frequency_penalty or 0), float(self.presence_penalty or 0))
        return penalties if penalties.frequency or penalties.presence else None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages; `developer` is OpenAI's newer name of `system`."""
        messages = [one.model_dump(exclude_unset=True) for one in self.messages]
        return [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]

    def answered(self, reply: Reply) -> Reply:
        """The reply, without the calls after the first where the request wants at most one."""
        if self.parallel_tool_calls is not False:
            return reply
        return replace(reply, tool_calls=reply.tool_calls[:1], problems=reply.problems[:1])


def serve(model: ChatModel, decoding: Decoding, host: str, port: int) -> None:
    """Serve until Ctrl-C. UserError when the port is in use."""
    check_address(host, port)
    token = server_token(host)
    log.info("serving %s at %s/v1 (models: %s) %s an API key; stop with Ctrl-C",
             model.name, url(host, port), ", ".join(model.sides), "with" if token else "without")  # fmt: skip
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
        errors = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        problems = [f"{name}: {reason.removeprefix('Value error, ')}".lstrip(": ") for name, reason in errors]
        return JSONResponse({"detail": "; ".join(problems)[:MAX_DETAIL]}, 400)

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
            room = model.room(model.prompt_ids(request.conversation(), tools))
        except (FormatError, UserError) as error:
            raise HTTPException(400, str(error)) from error
        if (asked := request.max_tokens or request.max_completion_tokens) and asked > room:
            raise HTTPException(400, f"max_tokens is {asked:,}, but the model has room for {room:,} behind this prompt")
        options = {} if request.top_p is None else {"top_p": request.top_p}
        made = model.stream(request.conversation(), tools, settings, side, request.penalties(), **options)
        events = (event if isinstance(event, str) else request.answered(event) for event in made)
        head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": request.model}
        if request.stream:
            return StreamingResponse(_chunks(events, head), media_type="text/event-stream")
        *_, reply = events
        message = {"role": "assistant", **_fields(reply, head["id"])}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason_of(reply)}
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
        yield chunk({}, finish_reason_of(event), usage=_usage(event))
    yield "data: [DONE]\n\n"


def _fields(reply: Reply, request_id: str) -> dict[str, Any]:
    """Content, reasoning and calls as OpenAI's API has them; calls that cannot be read stay in the content."""
    where = (
        "cut off by the maximum length" if reply.finish_reason == "length" else "its text is in the answer's content"
    )
    for error in reply.parse_errors:
        log.warning("not a call: %s (%s)", error, where)
    message = reply.message([f"{request_id}_tool_call_{at}" for at in range(len(reply.tool_calls))])
    del message["role"]
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return message


def finish_reason_of(reply: Reply) -> str:
    """A cut answer may lack a call, so "length" comes before "tool_calls"."""
    return "tool_calls" if reply.tool_calls and reply.finish_reason == "stop" else reply.finish_reason


def _usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.new_tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens, "total_tokens": total}
