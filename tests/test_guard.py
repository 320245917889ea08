"""Who may use --serve and --web: Host, Origin, token, media type, size and number of requests."""

import asyncio
import json

import pytest

from finetune.chat import address, guard
from finetune.chat.guard import MAX_BODY_BYTES, Access, Guard, server_token

JSON = {"content-type": "application/json"}


async def echo(scope, receive, send):
    """Answers 200 with the length of the body."""
    body = (await receive()).get("body", b"")
    await guard.answer(send, 200, str(len(body)))


def request(method="POST", path="/v1/chat/completions", body=b"{}", app=echo, parts=None, access=None, **headers):
    """(status, parsed answer) of one request through the guard."""
    return asyncio.run(asked(Guard(app, access or Access(health_path="/health")), method, path, body, parts, headers))


async def asked(app, method, path, body, parts, headers):
    parts = [body] if parts is None else parts
    headers = {"host": "127.0.0.1:8000", **(JSON if body else {}), **headers}
    if len(parts) == 1:
        headers.setdefault("content-length", str(len(body)))
    else:
        headers["transfer-encoding"] = "chunked"
    headers = {name: value for name, value in headers.items() if value is not None}
    messages = [{"type": "http.request", "body": p, "more_body": n < len(parts)} for n, p in enumerate(parts, start=1)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else await asyncio.Future()

    async def send(message):
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": path, "headers": raw}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.8.9.1"])
def test_host_of_this_machine_is_allowed(host):
    assert request(host=host)[0] == 200


@pytest.mark.parametrize("host", ["rebound.example:8000", "127.0.0.1.example", "10.0.0.5:8000", "", "[::1", None])
def test_other_host_is_refused(host):
    """DNS rebinding: the browser believes that the attacker's name is this machine."""
    assert request(host=host)[0] == 403


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:3000"}, {"origin": ""},
     {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}],
)  # fmt: skip
def test_cross_site_request_is_refused(headers):
    assert request(**headers)[0] == 403
    assert request("GET", "/v1/models", b"", **headers)[0] == 403


def test_same_site_and_programs_are_allowed():
    assert request(origin="http://127.0.0.1:8000", sec_fetch_site="same-origin")[0] == 200
    assert request("GET", "/", b"", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200  # a link


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; application/json", "multipart/form-data", None, ""])
def test_body_must_be_json(kind):
    """Browsers send text/plain to other sites without asking them first."""
    assert request(**{"content-type": kind})[0] == 415


def test_json_with_a_charset_is_allowed():
    assert request(**{"content-type": "Application/JSON; charset=utf-8"}) == (200, "2")


def test_form_only_at_the_login():
    access, form = Access(form_paths=("/login",)), {"content-type": "application/x-www-form-urlencoded"}
    assert request(path="/login", access=access, **form)[0] == 200
    assert request(path="/ask", access=access, **form)[0] == 415


def test_declared_large_body_is_refused_unread():
    status, detail = request(parts=[b"x"], **{"content-length": str(MAX_BODY_BYTES + 1)})
    assert (status, detail) == (413, "the body is larger than 10 MB")
    assert request(**{"content-length": "9" * 5000})[0] == 413
    assert request(**{"content-length": "-1"})[0] == 400


def test_large_chunked_body_is_refused():
    piece = b"x" * (MAX_BODY_BYTES // 4 + 1)
    assert request(parts=[piece] * 400)[0] == 413
    assert request(parts=[piece] * 3) == (200, str(3 * len(piece)))


def test_slow_body_ends(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY_SECONDS", 0.01)

    async def main():
        async def never():
            return await asyncio.Future()

        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", b"2"), (b"content-type", b"application/json")]
        await Guard(echo, Access())({"type": "http", "method": "POST", "path": "/", "headers": headers}, never, send)
        return sent[0]["status"]

    assert asyncio.run(main()) == 408


def test_half_body_of_a_closed_connection_is_not_answered():
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(await receive())

    async def main():
        messages = [{"type": "http.request", "body": b"{}", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", b"9"), (b"content-type", b"application/json")]
        guarded = Guard(app, Access())
        await guarded({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        return guarded.running

    assert asyncio.run(main()) == 0
    assert not reached and not sent


def test_token_is_required():
    access = Access("0.0.0.0", "s3cret", health_path="/health")
    for given in (None, "s3cret", "Bearer", "Bearer wrong", "Bearer s3crét", "bearer s3cret"):
        assert request(access=access, host="box:8000", authorization=given)[0] == 401
    assert request(access=access, host="box:8000", authorization="Bearer s3cret")[0] == 200


def test_requests_in_progress_are_limited(monkeypatch):
    monkeypatch.setattr(guard, "MAX_REQUESTS", 2)

    async def main():
        released = asyncio.Event()

        async def slow(scope, receive, send):
            await released.wait()
            await echo(scope, receive, send)

        app = Guard(slow, Access(health_path="/health"))
        tasks = [asyncio.create_task(asked(app, "POST", "/v1/x", b"{}", None, {})) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        refused = await asked(app, "POST", "/v1/x", b"{}", None, {})
        sent = []

        async def send(message):
            sent.append(message)

        await app({"type": "http", "method": "GET", "path": "/health", "headers": []}, None, send)
        released.set()
        finished = [status for status, _ in await asyncio.gather(*tasks)]
        return refused[0], sent[0]["status"], finished, app.running

    assert asyncio.run(main()) == (429, 200, [200, 200], 0)


def test_server_token(monkeypatch, capsys):
    monkeypatch.delenv(guard.TOKEN_VARIABLE, raising=False)
    assert server_token("127.0.0.1") == "" == server_token("localhost") == server_token("::1")
    token = server_token("0.0.0.0")
    assert len(token) >= 24 and capsys.readouterr().err.count(token) == 1
    assert server_token("192.168.1.2") != token
    monkeypatch.setenv(guard.TOKEN_VARIABLE, "own")
    capsys.readouterr()
    assert server_token("0.0.0.0") == server_token("127.0.0.1") == "own"
    assert not capsys.readouterr().err


def test_gguf_proxy_passes_on_only_the_api():
    httpx = pytest.importorskip("httpx")
    from finetune.chat.serve_gguf import Proxy

    seen = []

    def upstream(request):
        seen.append((request.url.path, request.headers["authorization"], request.headers.get("origin")))
        return httpx.Response(200, json={"detail": "fine"})

    client = httpx.AsyncClient(
        transport=httpx.MockTransport(upstream), base_url="http://x", headers={"authorization": "Bearer inner"}
    )
    app = Proxy(client)
    assert request(app=app) == (200, "fine")
    assert seen == [("/v1/chat/completions", "Bearer inner", None)]
    for path in ("/props", "/slots", "/v1/../props"):
        assert request(app=app, path=path)[0] == 404
    for name, limit in (("messages", guard.MAX_MESSAGES), ("tools", guard.MAX_TOOLS)):
        assert request(app=app, body=json.dumps({name: [{}] * (limit + 1)}).encode())[0] == 400
    for body in (b"[" * 100_000, b"[]", b'{"parallel_tool_calls": false}', b'{"tool_choice": {}}'):
        assert request(app=app, body=body)[0] == 400
    assert len(seen) == 1


@pytest.mark.parametrize(("host", "shown"), [("::1", "http://[::1]:80"), ("localhost", "http://localhost:80")])
def test_url_of_a_server(host, shown):
    assert address.url(host, 80) == shown
