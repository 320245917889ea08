"""Serve a GGUF file with llama.cpp's OpenAI-compatible server (package xllamacpp), behind the checks of `guard`."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.address import check_address, url
from finetune.chat.guard import MAX_MESSAGES, MAX_TOOLS, Access, Guard, Receive, Send, answer, read_body, server_token
from finetune.errors import UserError

if TYPE_CHECKING:
    import httpx

PASSED_HEADERS = ("content-type", "cache-control")
log = logging.getLogger("sandwich")


def serve_gguf(path: Path, host: str, port: int) -> int:
    """Serve until Ctrl-C; llama.cpp parses the calls by the template inside the file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; create one with: python export_lora.py RUN --to gguf")
    import httpx
    import uvicorn

    from finetune.export.llama_check import llama_server

    check_address(host, port)
    token, key = server_token(host), secrets.token_urlsafe(24)
    # llama.cpp's own server allows requests from any web site: it listens on a port and with a key known only here.
    with llama_server(path, context=0, api_key=key) as server:
        client = httpx.AsyncClient(
            base_url=server.listening_address,
            headers={"authorization": f"Bearer {key}"},
            timeout=None,  # noqa: S113  (an answer may take any time)
            trust_env=False,
        )
        app = Guard(Proxy(client), Access(host, token, health_path="/health"))
        log.info("llama.cpp serves %s at %s/v1 %s an API key; stop with Ctrl-C",
                 path.name, url(host, port), "with" if token else "without")  # fmt: skip
        # Not uvicorn.run, which would end with status 0 at Ctrl-C.
        uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", lifespan="off")).run()
    return 0


class Proxy:
    """ASGI application that passes /v1/… on to another server and streams its answer back."""

    def __init__(self, client: httpx.AsyncClient):
        self.client = client

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        import httpx

        path, body = scope["path"], await read_body(receive) or b""
        if not path.startswith("/v1/") or ".." in path:
            await answer(send, 404, "not found; the API is under /v1")
            return
        if body and (problem := _problem(body)):
            await answer(send, 400, problem)
            return
        request = self.client.build_request(
            scope["method"], path, content=body, headers={"content-type": "application/json"} if body else {}
        )
        try:
            response = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            await answer(send, 502, f"llama.cpp does not answer ({type(error).__name__})")
            return
        try:
            headers = [(k.encode(), response.headers[k].encode()) for k in PASSED_HEADERS if k in response.headers]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for part in response.aiter_bytes():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()


def _problem(body: bytes) -> str | None:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        return f"the body is not valid JSON ({error})"
    if not isinstance(request, dict):
        return "the body is not an object"
    if request.get("parallel_tool_calls") is False:
        return "parallel_tool_calls: llama.cpp cannot limit an answer to one call"
    if isinstance(request.get("tool_choice"), dict):
        return "tool_choice: llama.cpp cannot force a call of one tool; give it this tool alone, and required"
    for name, limit in (("messages", MAX_MESSAGES), ("tools", MAX_TOOLS)):
        items = request.get(name)
        if isinstance(items, list) and len(items) > limit:
            return f"{name}: must have <= {limit} items"
    return None
