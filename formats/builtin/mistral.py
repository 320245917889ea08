"""Mistral in its published layouts; which one follows from the tokenizer's own template or its vocabulary."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import replace
from typing import Any

from formats.base import Format, Ollama, Parsed, read_template
from formats.calls import call_error, read_arguments, read_call_list, skip_space
from formats.probing import USER, call_message, own_text
from formats.tokens import added_tokens

VERSIONS = ("v1", "v3", "v3-tekken", "v7", "v7-tekken", "v11", "v13")
CALLS = "[TOOL_CALLS]"
CONTROL_TOKENS = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", CALLS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"),
)
MIN_TEKKEN_VOCABULARY = 100_000  # SentencePiece vocabularies have 32,000 entries
_VALID_ID = re.compile(r"[A-Za-z0-9]{9}")


def parse(text: str, tools: list[dict] | None = None) -> Parsed:
    """Both spellings: one JSON list after `[TOOL_CALLS]`, or `[TOOL_CALLS]name[ARGS]{…}` for every call."""
    before, found, rest = text.partition(CALLS)
    if not found:
        return Parsed(content=text.strip())
    if rest.lstrip().startswith("[") and not rest.lstrip().startswith(("[ARGS]", "[CALL_ID]")):
        parsed = read_call_list(text, CALLS, "")
        if not parsed.errors and parsed.content != before.strip():
            return Parsed(content=text.strip(), errors=["call 1: text after the calls"])
        return parsed
    parsed = Parsed(content=before.strip())
    for piece in rest.split(CALLS):
        name, args, body = piece.partition("[ARGS]")
        try:
            name = name.partition("[CALL_ID]")[0].strip()
            if not args:
                raise ValueError("[ARGS] is missing")
            arguments, end = read_arguments(body, 0, name)
            if skip_space(body, end) < len(body):
                raise ValueError("text after the arguments")
        except ValueError as error:
            parsed.errors.append(call_error(parsed, error))
            parsed.content = f"{parsed.content}{CALLS}{piece}".strip()
        else:
            parsed.tool_calls.append({"name": name, "arguments": arguments})
    return parsed


def prepare(messages: list[dict]) -> list[dict]:
    """Replace call ids that are not nine letters or digits, which Mistral's templates require; deterministic.

    A result takes the id of the call it answers: the one with its old id or name, else the first unanswered one.
    Every call is answered once, even where two have the same id.
    """
    new_ids: dict[str, str] = {}
    unanswered: list[tuple[str, str, str]] = []  # (old id, name, new id) of calls without a result
    prepared = []
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            unanswered, new_calls = [], []
            for number, call in enumerate(calls):
                old, name = str(call.get("id", "")), call["function"]["name"]
                new = old if _VALID_ID.fullmatch(old) else _make_id(f"{index} {number} {name}")
                new_ids[old] = new
                unanswered.append((old, name, new))
                new_calls.append({**call, "id": new})
            message = {**message, "tool_calls": new_calls}
        elif message["role"] == "tool":
            old = str(message.get("tool_call_id", ""))
            answered = next((call for call in unanswered if old and call[0] == old), None)
            if answered is None and (not old or old not in new_ids):
                named = (call for call in unanswered if call[1] == message.get("name"))
                answered = next(named, unanswered[0] if unanswered else None)
            if answered is not None:
                unanswered.remove(answered)
            new = answered[2] if answered is not None else new_ids.get(old, _make_id(f"{index}"))
            message = {**message, "tool_call_id": new}
        prepared.append(message)
    return prepared


def _make_id(seed: str) -> str:
    return hashlib.sha256(seed.encode()).hexdigest()[:9]


def adapt(fmt: Format, tokenizer: Any) -> Format:
    """In the version that the own template writes, else the one the vocabulary allows; with the tokenizer's end."""
    version = _version_of_template(tokenizer) or _version_of_vocabulary(tokenizer)
    return replace(_with_version(fmt, version), end_of_turn=(tokenizer.eos_token or fmt.end_of_turn[0],))


def detect(added: Set[str], template: str) -> str | None:
    return "the tokenizer has Mistral's [INST]" if "[INST]" in added or "[INST]" in template else None


def _with_version(fmt: Format, version: str) -> Format:
    tokens: tuple[str, ...] = ()
    if version != "v1":
        tokens += ("[INST]", "[/INST]", CALLS, "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
    if version not in ("v1", "v3", "v3-tekken"):
        tokens += ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    if version in ("v11", "v13"):
        tokens += ("[ARGS]",)
    ollama = Ollama("mistral", CALLS, parser="ministral" if version == "v13" else None)
    return replace(fmt.with_kwargs(version=version), tokens=tokens, ollama=ollama, has_tools=version != "v1")


def _version_of_template(tokenizer: Any) -> str | None:
    plain = own_text(tokenizer, [{"role": "system", "content": "sq0zk"}, USER]) or ""
    if "[INST]" not in plain:
        return None
    calls = own_text(tokenizer, [USER, call_message()]) or ""
    if CALLS not in calls:
        return "v1"
    if "[ARGS]" in calls:
        return "v11" if "[CALL_ID]" in calls else "v13"
    version = "v7" if "[SYSTEM_PROMPT]" in plain else "v3"
    return version if "[INST] " in plain else f"{version}-tekken"


def _version_of_vocabulary(tokenizer: Any) -> str:
    added = added_tokens(tokenizer)
    if CALLS not in added:
        return "v1"
    if "[ARGS]" in added:
        return "v11" if "[CALL_ID]" in added and "[THINK]" not in added else "v13"
    version = "v7" if "[SYSTEM_PROMPT]" in added else "v3"
    return version if len(tokenizer) < MIN_TEKKEN_VOCABULARY else f"{version}-tekken"


FORMAT = Format(
    "mistral",
    read_template(__file__),
    end_of_turn=("</s>",),
    control_tokens=CONTROL_TOKENS,
    template_kwargs={"version": "v3"},
    read_calls=parse,
    adapt=adapt,
    detect=detect,
    detect_order=50,
    prepare=prepare,
    vllm_parser="mistral",
    ollama=Ollama("mistral", CALLS),
)
VARIANTS = [
    replace(_with_version(FORMAT, version), name=f"mistral-{version}", adapt=None, detect=None) for version in VERSIONS
]
