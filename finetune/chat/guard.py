"""Who may use a local server: checks of Host, Origin, token, body and load in front of an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from finetune.chat.address import is_loopback
from finetune.progress import say

TOKEN_VARIABLE = "SANDWICH_API_TOKEN"  # noqa: S105  (the name of a variable)
MAX_BODY_BYTES = 10_000_000
MAX_REQUESTS = 16  # in progress; fewer than the server has threads, so that one is always free
MAX_BODY_SECONDS = 30.0
MAX_MESSAGES, MAX_TOOLS = 2000, 1000  # of one request
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class Access:
    """The rules of one server.

    host            the address that it listens on; on loopback the Host header must name this machine
    token           required as `Authorization: Bearer TOKEN` unless empty
    tunnel          the page is also reached through another host, whose name is not known
    form_paths      paths that also accept a form, such as a login
    health_path     always answered
    """

    host: str = "127.0.0.1"
    token: str = ""
    tunnel: bool = False
    form_paths: Collection[str] = ()
    health_path: str = ""


def server_token(host: str) -> str:
    """$SANDWICH_API_TOKEN; without one a new token, printed once, for an address that other machines can reach."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and not is_loopback(host):
        token = secrets.token_urlsafe(24)
        say(f"other machines can reach {host}: clients need the API key {token} (choose your own in {TOKEN_VARIABLE})")
    return token


class Guard:
    """ASGI middleware that answers what `access` does not allow, and passes on the rest."""

    def __init__(self, app: Callable[..., Awaitable[None]], access: Access):
        self.app, self.access, self.running = app, access, 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: none of the servers has one
            await send({"type": "websocket.close", "code": 1008})
            return
        access, headers = self.access, _headers(scope)
        if access.health_path and scope["path"] == access.health_path:
            await answer(send, 200, {"status": "ok"})
            return
        if refusal := self._refusal(scope, headers):
            await answer(send, *refusal)
            return
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        if self.running >= MAX_REQUESTS:
            await answer(send, 429, f"{MAX_REQUESTS} requests are in progress; try again later", retry=True)
            return
        self.running += 1
        try:
            try:
                body = await asyncio.wait_for(read_body(receive), MAX_BODY_SECONDS)
            except asyncio.TimeoutError:  # noqa: UP041  (another class before Python 3.11)
                await answer(send, 408, f"the body did not arrive within {MAX_BODY_SECONDS:.0f} s")
                return
            except ClientLeft:
                return
            if body is None:
                await answer(send, 413, _TOO_LARGE)
                return
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.running -= 1

    def _refusal(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, reason) of a request that is not allowed, by its headers alone."""
        access, host = self.access, headers.get("host", "")
        if is_loopback(access.host) and not access.tunnel and not _is_this_machine(host):
            return 403, f"Host {host[:100]!r} is not this machine; open the server at 127.0.0.1 or localhost"
        navigates = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not navigates:
            return 403, "requests from other web sites are refused"
        origin = headers.get("origin")
        if origin is not None and not access.tunnel and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"requests from other web sites ({origin[:100]}) are refused"
        if access.token:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {access.token}".encode()):
                return 401, f"an API key is required: Authorization: Bearer KEY (the server's {TOKEN_VARIABLE})"
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, "Content-Length is not a number"
        if len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return 413, _TOO_LARGE
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = int(length) > 0 or "transfer-encoding" in headers
        is_form = kind == "application/x-www-form-urlencoded" and scope["path"] in access.form_paths
        if has_body and kind != "application/json" and not is_form:
            return 415, "the body must be application/json"
        return None


_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES // 10**6} MB"


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _is_this_machine(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


class ClientLeft(Exception):
    """The connection was closed before the body was complete."""


async def read_body(receive: Receive) -> bytes | None:
    """The complete body; None when it is too large. Raises ClientLeft."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replayed


async def answer(send: Send, status: int, detail: str | dict[str, str], retry: bool = False) -> None:
    """Send a complete JSON response."""
    body = json.dumps({"detail": detail} if isinstance(detail, str) else detail).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    if retry:
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
