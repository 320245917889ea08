"""The files with which vLLM serves a run: the command, the chat template, and a parser plugin."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import formats
from finetune.errors import UserError
from finetune.export.adapter_files import copy_adapter
from finetune.export.merged import served_format, write_merged
from finetune.export.targets import Job, target
from finetune.models.adapter import adapter_config
from finetune.models.bundled import resolve_model
from finetune.progress import say
from finetune.runs.find import Run
from formats import Format

PLUGIN = Path(__file__).with_name("vllm_plugin.py")
PLUGIN_NAME = "sandwich"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # valid values of --max-lora-rank


def parser_of(fmt: Format) -> str | None:
    """--tool-call-parser for a format: one of vLLM's own or the plugin; None for a format without calls."""
    return fmt.vllm_parser or (PLUGIN_NAME if fmt.read_calls and fmt.has_tools else None)


def max_lora_rank(rank: int) -> int:
    """The smallest valid --max-lora-rank for an adapter of this rank."""
    if rank > VLLM_RANKS[-1]:
        raise UserError(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, this one has {rank}; use --mode merged")
    return next(value for value in VLLM_RANKS if value >= rank)


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

    name            under which requests name the adapter, or the merged model
    model, adapter  Hub id or path; `adapter` None: `model` is a merged one
    """
    for what, text in (("base model", model), ("revision", revision), ("name", name)):
        if str(text or "").startswith("-"):
            raise UserError(f"the {what} {text!r} begins with -, which vLLM would read as a flag; correct it")
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--chat-template", "./chat_template.jinja"]
    if revision and adapter:
        command += ["--revision", revision]
    if parser := parser_of(fmt):
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
        if parser == PLUGIN_NAME:
            command += ["--tool-parser-plugin", "./sandwich_tool_parser.py"]
    if adapter:
        module = f"{name}={adapter}"
        if set(name) & set("=,"):  # would be split
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


@target("vllm", marker="serve.sh", help="serve.sh with the adapter beside its base (or --mode merged)")
def export_vllm(job: Job) -> None:
    """serve.sh, the chat template, adapter or merged weights, and a parser plugin where vLLM has no parser."""
    if job.mode == "merged":
        fmt = write_merged(job.run, job.folder, job.dtype).format
    else:
        _, fmt = job.run.load_tokenizer()
    write_serving_files(job, fmt)


def write_serving_files(job: Job, fmt: Format) -> None:
    """Everything but the merged weights."""
    run, folder = job.run, job.folder
    (folder / "chat_template.jinja").write_text(served_format(run, fmt).template, encoding="utf-8")
    config = run.experiment.config if run.experiment is not None else {}
    options: dict[str, Any] = {"model": ".", "name": job.name, "max_length": run.max_length()}
    options["trust_remote_code"] = run.trust_remote_code
    if job.mode != "merged":
        if run.adapter is None:
            raise UserError(f"{run.path} has no adapter; use --mode merged")
        copy_adapter(run.adapter, folder / "adapter")
        adapter = adapter_config(run.adapter)
        base = served_base(run.base_name)
        revision = config.get("base_model_revision") if config else adapter.get("revision")
        options |= {
            "model": base,
            "revision": None if Path(base).is_dir() else revision,
            "adapter": "./adapter",
            "rank": max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()]),
            "load_in_4bit": bool(config.get("load_in_4bit")),
        }
    if parser_of(fmt) == PLUGIN_NAME:
        write_plugin(folder, run, fmt)
    script = f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\nexec {shlex.join(serve_command(fmt, **options))} "$@"\n'
    path = folder / "serve.sh"
    path.write_text(script, encoding="utf-8", newline="\n")
    path.chmod(0o755)
    say(f"start it with: sh {path.name} (arguments are passed on to vllm serve)")


def served_base(name: str) -> str:
    """The base model as `vllm serve` finds it: a folder by its absolute path, else its Hub id.

    Raises UserError for a name that is neither.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    base = Path(resolve_model(name)).expanduser()
    if base.is_dir():
        return str(base.resolve())
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"base model {name} is neither a folder nor a Hub id, so vLLM cannot load it; "
            "put the folder back, or use --mode merged"
        ) from None
    return name


def write_plugin(folder: Path, run: Run, fmt: Format) -> None:
    """The plugin and, beside it, the `formats` package, so that vLLM parses calls with the code used in training."""
    name = fmt.name
    if run.experiment is not None and str(own := run.experiment.config["flags"]["format"]).endswith((".yaml", ".yml")):
        name = "sandwich_format.yaml"
        shutil.copy(own, folder / name)
    text = PLUGIN.read_text(encoding="utf-8").replace('FORMAT = "llama3-function"', f"FORMAT = {json.dumps(name)}")
    (folder / "sandwich_tool_parser.py").write_text(text, encoding="utf-8")
    source = Path(formats.__file__).parent
    shutil.copytree(source, folder / "formats", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
