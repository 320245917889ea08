"""Export a run as merged weights, GGUF, Ollama model, vLLM command or Hub repository, and check the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.export import gguf, hub, merged, ollama, vllm  # noqa: F401 (each registers its target)
from finetune.export.targets import TARGETS

EXAMPLES = """examples:
  python export_lora.py experiments/RUN --to merged                      16-bit safetensors for any server
  python export_lora.py experiments/RUN --to gguf --quantization q8_0,q4_k_m
  python export_lora.py experiments/RUN --to ollama                      then: ollama create NAME -f Modelfile
  python export_lora.py experiments/RUN --to vllm                        adapter beside its base; --mode merged for one
  python export_lora.py experiments/RUN --to hub                         what would be uploaded
  HF_TOKEN=... python export_lora.py experiments/RUN --to hub --repo_id ME/NAME
Everything lands in RUN/exports/KIND; --output names another folder.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="experiment folder, adapter folder, or model (folder or Hub id)")
    described = "; ".join(f"{name}: {target.help}" for name, target in TARGETS.items())
    parser.add_argument("--to", required=True, choices=TARGETS, help=described)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/exports/KIND")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--name", help="name of the model in files and servers (default: the run's)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
                        help="of merged weights (default: the run's own if it has 16 bits, else bfloat16)")  # fmt: skip
    parser.add_argument("--quantization", type=_quantizations, default=["q8_0"], metavar="KIND,KIND",
                        help="of gguf: f16, q8_0, q4_k_m … (default: q8_0); ollama takes the last")  # fmt: skip
    parser.add_argument("--llama_cpp", type=Path, metavar="FOLDER",
                        help="a checkout of llama.cpp: convert_hf_to_gguf.py, and a build for q4_k_m")  # fmt: skip
    parser.add_argument("--mode", choices=("lora", "merged"), default="lora", help="of vllm (default: lora)")
    parser.add_argument("--repo_id", metavar="OWNER/NAME", help="of hub: where to upload; without it nothing leaves")
    parser.add_argument("--public", action="store_true", help="of hub: a repository that everybody can read")
    return parser


def _quantizations(text: str) -> list[str]:
    kinds = list(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
    if not kinds or set(kinds) - set(gguf.QUANTIZATIONS):
        raise argparse.ArgumentTypeError(f"{text!r}: must be among {', '.join(gguf.QUANTIZATIONS)}")
    return kinds


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    from rich.console import Console

    from finetune.export.targets import Job, output_folder, print_progress
    from finetune.files import atomic_directory
    from finetune.logs import start_logging
    from finetune.runs.find import find_run

    output = output_folder(args.model, args.to, args.output, args.overwrite)
    start_logging(Console(stderr=True))
    run = find_run(args.model)
    name = args.name or Path(args.model).resolve().name
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name {name}: the name becomes a part of file names; omit slashes")

    with atomic_directory(output, replace=True) as folder:
        job = Job(
            run, folder, name, args.dtype, args.quantization, args.llama_cpp, args.mode, args.repo_id, args.public
        )
        finish = TARGETS[args.to].export(job)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print_progress(f"{size / 1e6:,.1f} MB in {output}")
    print(output)
    if finish:
        finish(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
