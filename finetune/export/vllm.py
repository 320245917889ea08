"""The files with which vLLM serves a run: the command, the chat template, and a parser plugin."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import formats
from finetune.errors import UserError
from finetune.export.adapter_files import copy_adapter
from finetune.export.merged import served_format, write_merged
from finetune.export.targets import Job, target
from finetune.export.vllm_rules import check_adapter, loads_parser, max_lora_rank
from finetune.models.adapter import adapter_config, lora_rank
from finetune.models.bundled import resolve_model
from finetune.progress import say
from finetune.runs.find import Run
from formats import Format, check_tokenizer

PLUGIN = Path(__file__).with_name("vllm_plugin.py")
PLUGIN_NAME = "sandwich"


def parser_of(fmt: Format, vocabulary: Container[str]) -> str | None:
    """--tool-call-parser for a format: one of vLLM's own or the plugin; None for a format without calls."""
    if not fmt.has_tools:
        return None
    if fmt.vllm_parser and loads_parser(fmt.vllm_parser, fmt, vocabulary):
        return fmt.vllm_parser
    return PLUGIN_NAME if fmt.read_calls else None


def serve_command(
    *,
    name: str,
    model: str,
    parser: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    rank: int = 0,
    max_length: int | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    overrides: dict[str, Any] | None = None,
) -> list[str]:
    """`vllm serve …`, to be run in the exported folder.

    name            under which requests name the adapter, or the merged model
    parser          value of --tool-call-parser; None: without tools
    overrides       entries of the base's config.json that the run has changed
    model, adapter  Hub id or path; `adapter` None: `model` is a merged one
    """
    for what, text in (("base model", model), ("revision", revision), ("name", name)):
        if str(text or "").startswith("-"):
            raise UserError(f"the {what} {text!r} begins with -, which vLLM would read as a flag; correct it")
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--chat-template", "./chat_template.jinja"]
    # As in training. Left to itself vLLM gives some templates lists of parts, which they refuse or print.
    command += ["--chat-template-content-format", "string"]
    if revision and adapter:
        command += ["--revision", revision]
    if parser:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
        if parser == PLUGIN_NAME:
            # Without "./", which vLLM 0.32 takes for a relative import before it tries the file.
            command += ["--tool-parser-plugin", "sandwich_tool_parser.py"]
    if adapter:
        module = f"{name}={adapter}"
        if set(name) & set("=,"):  # would be split
            module = json.dumps({"name": name, "path": adapter})
        command += ["--enable-lora", "--lora-modules", module, "--max-lora-rank", str(max_lora_rank(rank))]
        command += ["--generation-config", adapter]  # the base's would not stop at the format's end of turn
        if load_in_4bit:
            command += ["--quantization", "bitsandbytes"]
    else:
        command += ["--served-model-name", name]
    if max_length:
        command += ["--max-model-len", str(max_length)]
    if overrides:
        command += ["--hf-overrides", json.dumps(overrides)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


@target("vllm", marker="serve.sh", help="serve.sh with the adapter beside its base (or --mode merged)")
def export_vllm(job: Job) -> None:
    """serve.sh, the chat template, adapter or merged weights, and a parser plugin where vLLM has no parser."""
    tokenizer, fmt = job.run.load_tokenizer()
    if job.mode == "merged":
        write_merged(job.run, job.folder, job.dtype)
    elif job.run.adapter is None:
        raise UserError(f"{job.run.path} has no adapter; use --mode merged")
    else:
        check_adapter(job.run.adapter, adapter_config(job.run.adapter))
    write_serving_files(job, fmt, parser_of(fmt, tokenizer.get_vocab()), check_tokenizer(tokenizer, fmt))


def write_serving_files(job: Job, fmt: Format, parser: str | None, ends: list[int]) -> None:
    """Everything but the merged weights. ends: ids at which an answer stops."""
    run, folder = job.run, job.folder
    (folder / "chat_template.jinja").write_text(served_format(run, fmt).template, encoding="utf-8")
    config = run.experiment.config if run.experiment is not None else {}
    options: dict[str, Any] = {"model": ".", "name": job.name, "parser": parser, "max_length": run.max_length()}
    options["trust_remote_code"] = run.trust_remote_code
    if job.mode != "merged":
        assert run.adapter is not None
        copy_adapter(run.adapter, folder / "adapter")
        if not (stops := folder / "adapter" / "generation_config.json").is_file():  # a checkpoint
            stops.write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
        adapter = adapter_config(run.adapter)
        revision = config.get("base_model_revision") if config else adapter.get("revision")
        base = served_base(run.base_name)
        options |= {
            "model": base,
            "revision": None if Path(base).is_dir() else revision,
            "adapter": "./adapter",
            "rank": lora_rank(adapter),
            "load_in_4bit": bool(config.get("load_in_4bit")),
            "overrides": run.stretched_positions(),
        }
    if parser == PLUGIN_NAME:
        write_plugin(folder, run, fmt)
    script = f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\nexec {shlex.join(serve_command(**options))} "$@"\n'
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
