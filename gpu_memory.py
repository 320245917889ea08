"""Memory of a run before it starts, what the GPUs of this machine can do, and a monitor for them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.flags.types import FlagParser, number_type, positive_float, positive_int, text
from finetune.progress import counted, print_text

EXAMPLES = """examples:
  python gpu_memory.py estimate --model Qwen/Qwen2.5-1.5B-Instruct --card 6
  python gpu_memory.py estimate --model_size 7.0 --quantization 4bit --lora_r 8 --batch_size 1 --seq_length 2048
  python gpu_memory.py estimate --model my_model --rank 64 --max_seq_length 8192 --json
  python gpu_memory.py check
  python gpu_memory.py monitor --interval 5 --output gpu_logs.json
  python gpu_memory.py plot gpu_logs.json -o gpu_logs.png
"""
QUANTIZATIONS = {"4bit": True, "nf4": True, "16bit": False, "none": False}

share = number_type(float, lambda value: 0 < value <= 1, "a number > 0 and <= 1")


def billions(word: str) -> float:
    """`7`, `7.0` or `7B`."""
    return positive_float(word.removesuffix("b").removesuffix("B"))


def build_parser() -> FlagParser:
    """The parser of gpu_memory.py, with a subparser for each verb."""
    parser = FlagParser(description=__doc__, epilog=EXAMPLES, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # fmt: off
    verb = verbs.add_parser("estimate", help="memory of a run by part, and what to change so that it fits",
        allow_abbrev=False)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=text, help="Hub id, folder, or smollm2-135m; only its config.json is read")
    what.add_argument("--model_size", type=billions, metavar="B", help="parameters in billions, such as 7.0 or 7B")
    add = verb.add_argument
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--trust_remote_code", action="store_true", help="run code from the model's repository")
    add("--quantization", choices=tuple(QUANTIZATIONS), help="base weights (default: 4bit, on a CPU none)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="compute dtype")
    add("--lora_r", "--rank", dest="rank", type=positive_int, default=16, metavar="R", help="LoRA rank")
    add("--target_modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="module names (default: all-linear)")
    add("--last_layers", type=positive_int, metavar="N", help="adapt only the last N decoder layers")
    add("--batch_size", type=positive_int, default=1, metavar="N", help="rows in one pass")
    add("--grad_accum", type=positive_int, metavar="N", help="passes per step (default: 16 rows per step)")
    add("--seq_length", "--max_seq_length", dest="seq_length", type=positive_int, default=2048, metavar="N",
        help="length of the longest row in tokens")
    add("--tokens_per_pass", type=positive_int, metavar="N",
        help="tokens in one forward pass (default: batch_size x seq_length)")
    add("--trained_share", type=share, default=1.0, metavar="P", help="fraction of the tokens that is trained")
    add("--optim", default="auto", help="Transformers' optimizer name (default: adamw_8bit, adamw_torch on a CPU)")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="default: on a GPU yes, on a CPU no")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device of the run")
    add("--card", type=positive_float, metavar="GB", help="nominal memory of the GPU (default: this machine's first)")
    add("--json", action="store_true", help="print the numbers as JSON")

    verbs.add_parser("check", help="driver, GPUs, free memory, and what they are suited for")

    add = verbs.add_parser("monitor", help="watch the GPUs, with a log and a picture", allow_abbrev=False).add_argument
    add("--interval", type=positive_float, default=5.0, help="seconds between samples")
    add("--output", type=Path, metavar="FILE", help="log to write or append to: .json, .jsonl or .csv")
    add("--samples", type=positive_int, metavar="N", help="stop after N samples (default: at Ctrl-C)")
    add("--plot", type=Path, metavar="PNG", help="picture to draw at the end (default: the log's name, .png)")

    add = verbs.add_parser("plot", help="draw a log of monitor", allow_abbrev=False).add_argument
    add("log", type=Path)
    add("-o", "--output", type=Path, metavar="PNG", help="picture to write (default: the log's name, .png)")
    # fmt: on
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return {"estimate": estimate, "check": check, "monitor": monitor, "plot": plot}[args.verb](args)


def estimate(args: argparse.Namespace) -> int:
    """Print memory by part, the total against the GPU, what to change, and flags for common GPUs."""
    from finetune.memory import sizes, tables
    from finetune.memory.estimate import Workload
    from finetune.memory.plan import MemoryPlan

    if args.model:
        shape = sizes.sizes_of_name(args.model, args.revision, args.trust_remote_code)
    else:
        shape = sizes.sizes_of_billions(args.model_size)
    # Refuse what train_lora.py would refuse.
    several = len(args.target_modules) > 1
    if not all(shape.adapted([one]) and not (several and one == "all-linear") for one in args.target_modules):
        names = ", ".join(sorted({m.name for m in shape.matrices}))
        raise UserError(f"--target_modules {' '.join(args.target_modules)}: this model has {names}")
    if args.last_layers and args.last_layers > shape.layers:
        raise UserError(f"--last_layers {args.last_layers}: the model has {shape.layers} decoder layers")
    on_cpu = args.device == "cpu"
    tokens = max(args.tokens_per_pass or args.batch_size * args.seq_length, args.seq_length)
    workload = Workload(
        tokens=tokens,
        longest=args.seq_length,
        trained=max(1, round(tokens * args.trained_share)),
        rank=args.rank,
        target_modules=tuple(args.target_modules),
        last_layers=args.last_layers,
        dtype=args.dtype,
        load_in_4bit=not on_cpu if args.quantization is None else QUANTIZATIONS[args.quantization],
        gradient_checkpointing=not on_cpu if args.gradient_checkpointing is None else args.gradient_checkpointing,
        optim=("adamw_torch" if on_cpu else "adamw_8bit") if args.optim == "auto" else args.optim,
        device=args.device,
    )
    place, capacity = card_to_fit(args) or ("", None)
    plan = MemoryPlan(shape, workload, capacity)
    step_rows = args.batch_size * args.grad_accum if args.grad_accum else max(16, args.batch_size)
    if args.json:
        print_text(json.dumps(tables.as_json(plan, place, step_rows), indent=2))
        return 0
    model = args.model or f"a model of {args.model_size:g} B"
    tables.print_estimate(tables.wide_console(), plan, model, place, step_rows)
    return 0


def card_to_fit(args: argparse.Namespace) -> tuple[str, float] | None:
    """(name, usable bytes) of --card, else of this machine's first GPU, else None; on a CPU, of the main memory."""
    from finetune.memory.devices import NoDriver, open_driver
    from finetune.memory.plan import usable_bytes

    if args.card:
        return f"a {args.card:g} GB card", usable_bytes(args.card)
    if args.device == "cpu":
        import psutil

        return "this machine's free memory", psutil.virtual_memory().available
    try:
        with open_driver() as driver:
            card = next((c for c in driver.gpus() if c.memory_total_gb), None)
    except (NoDriver, UserError):
        return None
    return (f"{card.name}, {card.memory_total_gb:.1f} GB", 0.98 * card.memory_total_gb * 1e9) if card else None


def check(args: argparse.Namespace) -> int:
    """Print driver, GPUs and a verdict; without a GPU, why there is none."""
    from finetune.memory.checkup import print_checkup
    from finetune.memory.tables import wide_console

    print_checkup(wide_console())
    return 0


def monitor(args: argparse.Namespace) -> int:
    """Take samples until Ctrl-C, SIGTERM or --samples; then draw the picture."""
    import signal

    from finetune.memory.devices import NoDriver, open_driver
    from finetune.memory.tables import wide_console
    from finetune.memory.watch import GpuLog, draw, read_log, watch

    if args.plot and not args.output:
        raise UserError(f"--plot {args.plot}: the picture is drawn from a log; add --output")
    # A shell starts background programs with SIGINT ignored.
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in stops]
    try:
        with open_driver() as driver:
            if not driver.gpus():
                raise NoDriver("the NVIDIA driver finds no GPU")
            log = GpuLog(args.output) if args.output else None
            watch(driver, log, wide_console(), interval=args.interval, samples=args.samples)
    except NoDriver as reason:
        print_text(f"Nothing to watch: {reason}.")
        return 0
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    if log is not None and log.records:
        picture = draw(read_log(log.path), args.plot or log.path.with_suffix(".png"))
        print_text(f"{counted(log.records, 'record')} in {log.path}, drawn in {picture}")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw the picture of a log, also of one left by a killed monitor."""
    from finetune.memory.watch import draw, read_log

    print_text(draw(read_log(args.log), args.output or args.log.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
