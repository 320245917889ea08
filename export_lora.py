"""Export a run as merged weights, GGUF, Ollama model, vLLM command, smaller adapter or Hub repository, and check it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.export import adapter, gguf, hub, merged, ollama, vllm  # noqa: F401 (each registers its target)
from finetune.export.targets import TARGETS
from finetune.flags.types import FlagParser, nonnegative_float, positive_int
from finetune.progress import print_text, say

EXAMPLES = """examples:
  python export_lora.py experiments/RUN --to merged                      16-bit safetensors for any server
  python export_lora.py experiments/RUN --to gguf --quantization q8_0,q4_k_m
  python export_lora.py experiments/RUN --to ollama                      then: ollama create NAME -f Modelfile
  python export_lora.py experiments/RUN --to vllm                        adapter and base; --mode merged: merged weights
  python export_lora.py experiments/RUN --to adapter --rank 8            its best approximation of rank 8
  python export_lora.py experiments/RUN --to adapter --rank auto --tolerance 0.01
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
    targets = "; ".join(f"{name}: {target.help}" for name, target in TARGETS.items())
    add("--to", required=True, choices=TARGETS, help=targets)
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
    add("--rank", type=rank, metavar="N|auto", help="adapter: cut it to this rank; auto: the smallest power of two "
        "whose loss is within --tolerance of the adapter's")
    add("--tolerance", type=nonnegative_float, default=0.01, metavar="NATS",
        help="adapter: loss that --rank auto may add")
    add("--dataset", action="append", default=[], metavar="ROWS",
        help="adapter: rows by which --rank auto chooses (default: the run's own evaluation rows)")
    add("--repo_id", metavar="OWNER/NAME", help="hub: repository to upload to; without it nothing is uploaded")
    add("--public", action="store_true", help="hub: make the repository public")
    add("--trust_remote_code", action="store_true",
        help="run code from the base model's repository; only for models that you trust")
    # fmt: on
    return parser


def quantizations(word: str) -> list[str]:
    """Names of quantizations, separated by commas."""
    kinds = list(dict.fromkeys(kind.strip().lower() for kind in word.split(",") if kind.strip()))
    if not kinds or set(kinds) - set(gguf.QUANTIZATIONS):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(gguf.QUANTIZATIONS)}, not {word!r}")
    return kinds


def rank(word: str) -> int | str:
    """A rank, or auto."""
    return word if word == adapter.AUTO else positive_int(word)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.rank is not None and args.to != "adapter":
        raise UserError(f"--rank is for --to adapter; export the adapter first, then that folder --to {args.to}")
    if args.dataset and args.rank != adapter.AUTO:
        raise UserError("--dataset is for --rank auto, which chooses the rank by these rows; omit it")

    from finetune.export.targets import Job, output_folder
    from finetune.files import atomic_directory
    from finetune.logs import start_logging
    from finetune.runs.find import find_run

    output = output_folder(args.model, args.to, args.output, args.overwrite)
    if args.to == "gguf":
        gguf.find_tools(args.llama_cpp, args.quantization)  # refused before the model is read
    start_logging()
    run = find_run(args.model, trust_remote_code=args.trust_remote_code)
    name = args.name or Path(args.model).resolve().name
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name {name}: the name becomes a part of file names; omit slashes")

    if args.to != "hub":  # it uploads the adapter alone, also where the base cannot be reached
        run.check_vocabulary()
    with atomic_directory(output, replace=True) as folder:
        job = Job(
            run, folder, name, args.dtype, args.quantization, args.llama_cpp, args.mode, args.repo_id, args.public,
            args.rank, args.tolerance, tuple(args.dataset),
        )  # fmt: skip
        finish = TARGETS[args.to].export(job)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    say(f"{size / 1e6:,.1f} MB in {output}")
    print_text(output)
    if finish:
        finish(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
