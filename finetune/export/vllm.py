"""What vLLM needs to serve a run: the command, the chat template, and a parser where vLLM has none for the format."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import formats
from finetune.errors import UserError
from finetune.export.hub import PRIVATE
from finetune.export.merged import served_format
from finetune.runs.find import Run
from formats import Format

PLUGIN = Path(__file__).with_name("vllm_plugin.py")
PLUGIN_NAME = "sandwich"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values --max-lora-rank takes


def parser_of(fmt: Format) -> str | None:
    """--tool-call-parser for a format: one of vLLM's own, our plugin's name, or None for a format without calls."""
    return fmt.vllm_parser or (PLUGIN_NAME if fmt.read_calls and fmt.has_tools else None)


def max_lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds an adapter of this rank."""
    if rank > RANKS[-1]:
        raise UserError(f"vLLM serves adapters up to rank {RANKS[-1]}, this one has {rank}; use --mode merged")
    return next(value for value in RANKS if value >= rank)


def serve_command(
    fmt: Format,
    *,
    name: str,
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    rank: int = 0,
    max_length: int | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """`vllm serve …`, to be run in the exported folder.

    model, adapter  Hub id or path; without an adapter the model is a merged one, answering to `name`
    """
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--chat-template", "./chat_template.jinja"]
    if revision and adapter:
        command += ["--revision", revision]
    if parser := parser_of(fmt):
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
        if parser == PLUGIN_NAME:
            command += ["--tool-parser-plugin", "./sandwich_tool_parser.py"]
    if adapter:
        module = f"{name}={adapter}"
        if set(name) & set("=,"):  # vLLM's other spelling
            module = json.dumps({"name": name, "path": adapter})
        command += ["--enable-lora", "--lora-modules", module, "--max-lora-rank", str(max_lora_rank(rank))]
        if load_in_4bit:
            command += ["--quantization", "bitsandbytes"]
    else:
        command += ["--served-model-name", name]
    if max_length:
        command += ["--max-model-len", str(max_length)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


def export_vllm(
    run: Run, folder: Path, tokenizer: Any, fmt: Format, *, merged: bool, name: str, say: Any = print
) -> None:
    """Write serve.sh, chat_template.jinja, the adapter (or leave the merged weights that lie there) and the plugin."""
    served = served_format(run, fmt)
    (folder / "chat_template.jinja").write_text(served.template, encoding="utf-8")
    options: dict[str, Any] = {"model": ".", "name": name}
    if run.experiment is not None:
        flags = run.experiment.config["flags"]
        options |= {"max_length": flags["max_seq_length"], "trust_remote_code": flags["trust_remote_code"]}
    if not merged:
        if run.adapter is None:
            raise UserError(f"{run.path} has no adapter; use --mode merged")
        shutil.copytree(run.adapter, folder / "adapter", ignore=shutil.ignore_patterns(*PRIVATE))
        config = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        patterns = config.get("rank_pattern") or {}
        options |= {
            "model": config["base_model_name_or_path"],
            "revision": config.get("revision"),
            "adapter": "./adapter",
            "rank": max([config["r"], *patterns.values()]),
        }
        if run.experiment is not None:
            options |= {
                "model": run.experiment.config["base_model"],
                "revision": run.experiment.config.get("base_model_revision"),
                "load_in_4bit": bool(run.experiment.config.get("load_in_4bit")),
            }
        if (known := Path(str(options["model"]))).is_dir():
            options["model"] = str(known.resolve())
    if parser_of(fmt) == PLUGIN_NAME:
        write_plugin(folder, run, fmt)
    script = f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\nexec {shlex.join(serve_command(fmt, **options))} "$@"\n'
    path = folder / "serve.sh"
    path.write_text(script, encoding="utf-8", newline="\n")
    path.chmod(0o755)
    say(f"start it with: sh {path.name} (options of vllm serve may follow)")


def write_plugin(folder: Path, run: Run, fmt: Format) -> None:
    """The plugin, and beside it this project's `formats` package, so that vLLM reads calls with the very same code."""
    name = fmt.name
    if run.experiment is not None and str(own := run.experiment.config["flags"]["format"]).endswith((".yaml", ".yml")):
        name = "sandwich_format.yaml"
        shutil.copy(own, folder / name)
    text = PLUGIN.read_text(encoding="utf-8").replace('FORMAT = "llama3-function"', f"FORMAT = {json.dumps(name)}")
    (folder / "sandwich_tool_parser.py").write_text(text, encoding="utf-8")
    source = Path(formats.__file__).parent
    shutil.copytree(source, folder / "formats", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
