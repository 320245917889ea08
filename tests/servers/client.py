"""Requests to an OpenAI chat server, complete or streamed, as content and calls."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 300


@dataclass
class Answer:
    """What a server answered; `error` is its message when it refused the request."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


def as_openai(message: dict[str, Any]) -> dict[str, Any]:
    """A canonical message with the arguments of its calls as JSON text."""
    copy = json.loads(json.dumps(message))
    for call in copy.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return copy


def ask(url: str, case: dict[str, Any], *, stream: bool, max_tokens: int, **options: Any) -> Answer:
    """One greedy request to `url`/v1/chat/completions; `options` are further fields of the request."""
    body = {
        "model": "served", "messages": [as_openai(message) for message in case["messages"]], "tools": case["tools"],
        "temperature": 0, "max_tokens": max_tokens, "stream": stream, **options,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return _streamed(_events(response)) if stream else _complete(json.load(response))
    except urllib.error.HTTPError as error:
        return Answer(error=f"{error.code} {error.read().decode(errors='replace')[:300]}")


def _complete(data: dict[str, Any]) -> Answer:
    choice = data["choices"][0]
    message = choice["message"]
    calls = [_call(call["function"]) for call in message.get("tool_calls") or []]
    return Answer(message.get("content") or "", calls, choice["finish_reason"])


def _events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.decode().strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data:"))


def _streamed(events: Iterator[dict[str, Any]]) -> Answer:
    answer, parts = Answer(), {}
    for event in events:
        if "error" in event:
            return Answer(error=str(event["error"])[:300])
        for choice in event["choices"][:1]:
            delta = choice["delta"]
            answer.content += delta.get("content") or ""
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            for call in delta.get("tool_calls") or []:
                function = parts.setdefault(call["index"], {"name": "", "arguments": ""})
                for key in function:
                    function[key] += call.get("function", {}).get(key) or ""
    answer.calls = [_call(parts[index]) for index in sorted(parts)]
    return answer


def _call(function: dict[str, str]) -> dict[str, Any]:
    """{"name", "arguments"}; arguments that are not JSON stay a string, which equals no call of ours."""
    try:
        return {"name": function["name"], "arguments": json.loads(function["arguments"])}
    except json.JSONDecodeError:
        return {"name": function["name"], "arguments": function["arguments"]}
