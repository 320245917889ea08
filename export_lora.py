"""Export a run as merged weights, GGUF, Ollama model, vLLM command or Hub repository, and check the result."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.flag_types import FlagParser
from finetune.progress import say

KINDS = ("merged", "gguf", "ollama", "vllm", "hub")
EXAMPLES = """examples:
  python export_lora.py experiments/RUN --to merged                      16-bit safetensors for any server
  python export_lora.py experiments/RUN --to gguf --quantization q8_0,q4_k_m
  python export_lora.py experiments/RUN --to ollama                      then: ollama create NAME -f Modelfile
  python export_lora.py experiments/RUN --to vllm                        adapter and base; --mode merged: merged weights
  python export_lora.py experiments/RUN --to hub                         what would be uploaded
  HF_TOKEN=... python export_lora.py experiments/RUN --to hub --repo_id ME/NAME
The result is in RUN/exports/KIND, or in --output.
"""


def build_parser() -> FlagParser:
    """The parser of export_lora.py."""
    parser = FlagParser(description=__doc__, epilog=EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("model", help="experiment folder, adapter folder, or model (folder or Hub id)")
    add("--to", required=True, choices=KINDS, help="target to export to")
    add("--output", type=Path, metavar="FOLDER", help="output folder (default: RUN/exports/KIND)")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--name", help="name of the model in files and servers (default: the run's)")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="dtype of merged weights (default: the run's own if it has 16 bits, else bfloat16)")
    add("--quantization", type=quantizations, default=["q8_0"], metavar="KIND,KIND",
        help="gguf: quantizations, such as f16, q8_0, q4_k_m (default: q8_0); ollama uses the last")
    add("--llama_cpp", type=Path, metavar="FOLDER",
        help="checkout of llama.cpp, for convert_hf_to_gguf.py, and built for q4_k_m")
    add("--mode", choices=("lora", "merged"), default="lora", help="vllm: separate adapter, or merged weights")
    add("--repo_id", metavar="OWNER/NAME", help="hub: repository to upload to; without it nothing is uploaded")
    add("--public", action="store_true", help="hub: make the repository public")
    # fmt: on
    return parser


def quantizations(word: str) -> list[str]:
    """Names of quantizations, separated by commas."""
    from finetune.export.gguf import QUANTIZATIONS

    kinds = list(dict.fromkeys(kind.strip().lower() for kind in word.split(",") if kind.strip()))
    if not kinds or set(kinds) - set(QUANTIZATIONS):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(QUANTIZATIONS)}, not {word!r}")
    return kinds


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    # 1. Check the output folder, the programs and the run before anything slow.
    from finetune.export.folders import output_folder, size_of
    from finetune.files import atomic_directory

    target = output_folder(args.model, args.to, args.output, args.overwrite)
    tools = None
    if args.to in ("gguf", "ollama"):
        from finetune.export.gguf import check_tools, find_tools

        tools = find_tools(args.llama_cpp)
        check_tools(tools, args.quantization)

    from rich.console import Console

    from finetune.logs import start_logging

    start_logging(Console(stderr=True))
    from finetune.runs.find import find_run

    run = find_run(args.model)
    name = args.name or Path(args.model).resolve().name
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name {name}: the name becomes a part of file names; use one without slashes")
    if args.to == "hub" and run.experiment is not None:
        name = args.name or run.experiment.folder.name

    # 2. Export into a temporary folder, which replaces the target after every check has passed.
    with atomic_directory(target, replace=True) as folder:
        after = {
            "merged": to_merged, "gguf": to_gguf, "ollama": to_ollama, "vllm": to_vllm, "hub": to_hub
        }[args.to](args, run, folder, name, tools)  # fmt: skip
        size = size_of(folder)
    say(f"{size / 1e6:,.1f} MB in {target}")
    print(target)
    if after:
        after(target)
    return 0


def to_merged(args: argparse.Namespace, run: Any, folder: Path, name: str, tools: Any) -> Any:
    """Safetensors with tokenizer, template and generation config."""
    from finetune.export.merged import export_merged

    export_merged(run, folder, args.dtype, say)


def to_gguf(args: argparse.Namespace, run: Any, folder: Path, name: str, tools: Any) -> Any:
    """Merged weights in a temporary folder, then one GGUF for each quantization."""
    from finetune.export.gguf import make_gguf

    make_gguf(run, folder, name, args.quantization, args.dtype, tools, say)


def to_ollama(args: argparse.Namespace, run: Any, folder: Path, name: str, tools: Any) -> Any:
    """One GGUF and the Modelfile for it."""
    from finetune.export.gguf import make_gguf
    from finetune.export.merged import served_format
    from finetune.export.ollama import check_format, export_ollama, go_template, known_format

    check_format(run)
    tokenizer, fmt = run.load_tokenizer()
    go_template(known_format(served_format(run, fmt), tokenizer))  # refuses before minutes of merging
    made = make_gguf(run, folder, name, args.quantization[-1:], args.dtype, tools, say)
    flags = run.experiment.config["flags"] if run.experiment is not None else {}
    export_ollama(folder, made.paths[-1], made.format, made.tokenizer, flags.get("max_seq_length"))
    command = ["ollama", "create", name.lower(), "-f"]
    return lambda target: say(f"next: {shlex.join([*command, str(target / 'Modelfile')])}")


def to_vllm(args: argparse.Namespace, run: Any, folder: Path, name: str, tools: Any) -> Any:
    """The adapter (or merged weights), the template, a parser where vLLM has none, and serve.sh."""
    from finetune.export.merged import export_merged
    from finetune.export.vllm import export_vllm

    if args.mode == "merged":
        made = export_merged(run, folder, args.dtype, say)
        tokenizer, fmt = made.tokenizer, made.format
    else:
        tokenizer, fmt = run.load_tokenizer()
    export_vllm(run, folder, tokenizer, fmt, merged=args.mode == "merged", name=name, say=say)


def to_hub(args: argparse.Namespace, run: Any, folder: Path, name: str, tools: Any) -> Any:
    """The folder as it would be uploaded; uploaded only with --repo_id and a token in HF_TOKEN."""
    from finetune.export.hub import build_folder, check_secrets, listing
    from finetune.models.hub import hub_token

    build_folder(run, folder, say)
    check_secrets(folder)
    for path, size in listing(folder):
        print(f"{size:>12,}  {path}")
    if not args.repo_id or not hub_token():
        missing = "--repo_id OWNER/NAME" if not args.repo_id else "a token with write access in HF_TOKEN"
        say(f"nothing was uploaded: that needs {missing}")
        return None
    from finetune.runs.saving import push_to_hub

    return lambda target: say(f"uploaded: {push_to_hub(target, args.repo_id, private=not args.public)}")


if __name__ == "__main__":
    sys.exit(main())
