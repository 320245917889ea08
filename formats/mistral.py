"""Mistral in its published layouts; which one follows from the tokenizer's own template or its vocabulary."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

from formats.base import Format, Parsed, read_template
from formats.calls import read_arguments, read_call_list, skip_space
from formats.probing import USER, own_text
from formats.tokens import added_tokens

TEMPLATE = read_template("mistral")
END_OF_TURN = ("</s>",)
CONTROL_TOKENS = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"),
)
VERSIONS = ("v1", "v3", "v3-tekken", "v7", "v7-tekken", "v11", "v13")
_MARK = "[TOOL_CALLS]"
_NINE = re.compile(r"[A-Za-z0-9]{9}")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """Both spellings: one JSON list behind `[TOOL_CALLS]`, or `[TOOL_CALLS]name[ARGS]{…}` for every call."""
    before, found, rest = text.partition(_MARK)
    if not found:
        return Parsed(content=text.strip())
    if rest.lstrip().startswith("[") and not rest.lstrip().startswith(("[ARGS]", "[CALL_ID]")):
        parsed = read_call_list(text, _MARK, "")
        if not parsed.errors and parsed.content != before.strip():
            return Parsed(content=text.strip(), errors=["call 1: text behind the calls"])
        return parsed
    parsed = Parsed(content=before.strip())
    for number, piece in enumerate(rest.split(_MARK), 1):
        name, args, body = piece.partition("[ARGS]")
        try:
            name = name.partition("[CALL_ID]")[0].strip()
            if not args:
                raise ValueError("[ARGS] is missing")
            value, end = read_arguments(body, 0, name)
            if skip_space(body, end) < len(body):
                raise ValueError("text behind the arguments")
        except ValueError as error:
            parsed.errors.append(f"call {number}: {error}")
            parsed.content = f"{parsed.content}{_MARK}{piece}".strip()
            continue
        parsed.tool_calls.append({"name": name, "arguments": value})
    return parsed


def prepare(messages: list[dict]) -> list[dict]:
    """Ids of nine letters or digits, which this template demands; others are replaced, the same each time.

    Results take the id of the call they answer, by its old id or name where they give one, else in order; every call
    is answered once, even where two have the same id.
    """
    new_ids: dict[str, str] = {}
    waiting: list[tuple[str, str, str]] = []  # (old id, name, new id) of calls without a result
    out = []
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            waiting, made = [], []
            for number, call in enumerate(calls):
                old, name = str(call.get("id", "")), call["function"]["name"]
                new = old if _NINE.fullmatch(old) else _nine(f"{index} {number} {name}")
                new_ids[old] = new
                waiting.append((old, name, new))
                made.append({**call, "id": new})
            message = {**message, "tool_calls": made}
        elif message["role"] == "tool":
            old = str(message.get("tool_call_id", ""))
            answered = next((call for call in waiting if old and call[0] == old), None)
            if answered is None and (not old or old not in new_ids):
                named = (call for call in waiting if call[1] == message.get("name"))
                answered = next(named, waiting[0] if waiting else None)
            if answered is not None:
                waiting.remove(answered)
            new = answered[2] if answered is not None else new_ids.get(old, _nine(f"{index}"))
            message = {**message, "tool_call_id": new}
        out.append(message)
    return out


def _nine(seed: str) -> str:
    return hashlib.sha256(seed.encode()).hexdigest()[:9]


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """The version that the own template writes, else the one the vocabulary allows; the tokenizer's end token."""
    end = tokenizer.eos_token or END_OF_TURN[0]
    return replace(
        _versioned(fmt, _version_of_template(tokenizer) or _version_of_vocabulary(tokenizer)), end_of_turn=(end,)
    )


def _versioned(fmt: Format, version: str) -> Format:
    tokens = () if version == "v1" else ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
    if version not in ("v1", "v3", "v3-tekken"):
        tokens += ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    if version in ("v11", "v13"):
        tokens += ("[ARGS]",)
    return replace(fmt.with_kwargs(version=version), tokens=tokens)


def _version_of_template(tokenizer: Any) -> str | None:
    call = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    plain = own_text(tokenizer, [{"role": "system", "content": "sq0zk"}, USER]) or ""
    if "[INST]" not in plain:
        return None
    calls = own_text(tokenizer, [USER, answer]) or ""
    if _MARK not in calls:
        return "v1"
    if "[ARGS]" in calls:
        return "v11" if "[CALL_ID]" in calls else "v13"
    version = "v7" if "[SYSTEM_PROMPT]" in plain else "v3"
    return version if "[INST] " in plain else f"{version}-tekken"


def _version_of_vocabulary(tokenizer: Any) -> str:
    have = added_tokens(tokenizer)
    if _MARK not in have:
        return "v1"
    if "[ARGS]" in have:
        return "v11" if "[CALL_ID]" in have and "[THINK]" not in have else "v13"
    version = "v7" if "[SYSTEM_PROMPT]" in have else "v3"
    return version if len(tokenizer) < 100_000 else f"{version}-tekken"


FORMAT = Format(
    "mistral",
    TEMPLATE,
    END_OF_TURN,
    CONTROL_TOKENS,
    (),
    {"version": "v3"},
    parse,
    adapt,
    vllm_parser="mistral",
    prepare=prepare,
)
FORMATS = [replace(_versioned(FORMAT, version), name=f"mistral-{version}", adapt=None) for version in VERSIONS]
