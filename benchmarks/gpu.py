"""Everything that a GPU must show, in one command of nine minutes: tests, losses, throughput, memory, generation.

    python benchmarks/gpu.py                          on a machine with an NVIDIA GPU; `make gpu`
    python benchmarks/gpu.py --pack                   before that, where pip has an index: fills the folder .whl
    python benchmarks/gpu.py --rehearse --minutes 90  without a GPU: the same parts with a tiny model on the CPU
    python benchmarks/gpu.py --only tests,throughput_1.5b

Each part runs in a process of its own with its own time limit, most valuable parts first. The record (JSON and
Markdown) is written after each part; a second start with the same --out runs what is missing or failed. A folder .whl
with wheels is installed beside the environment; no network is needed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.kit import install_wheels, pack, test_model  # noqa: E402
from benchmarks.gpu_parts.report import page  # noqa: E402
from benchmarks.gpu_parts.schedule import DONE, Part, load_record, run_parts, write_record  # noqa: E402
from finetune.errors import UserError, one_line_errors  # noqa: E402
from finetune.files import write_text_atomic  # noqa: E402

TRAIN_ROWS, HELD_OUT = "data/samples/gennx_train.jsonl", "data/samples/gennx_heldout.jsonl"
ROWS = "rows.jsonl"  # of a rehearsal
REHEARSAL_LIMIT = 1800  # for each part: a rehearsal is for its lines, on a machine that may be busy
MEMORY_SETTINGS = ("0.5b_4bit_2048", "0.5b_16bit_2048", "1.5b_4bit_512", "1.5b_4bit_2048", "1.5b_16bit_2048",
                   "1.5b_4bit_8192", "8b_4bit_2048", "8b_16bit_2048")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )  # fmt: skip
    today = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER",
                        help=f"record, logs and runs (default: experiments/gpu_{today})")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    parser.add_argument("--only", default="", metavar="PARTS", help="comma-separated names of parts")
    parser.add_argument("--list", action="store_true", help="print the parts with their limits and commands")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny shapes, kernels interpreted")
    parser.add_argument("--pack", action="store_true", help="download what a machine without network needs into .whl")
    return parser


def parts_for_gpu(out: Path, model: str) -> list[Part]:
    """All parts for a CUDA device; `model`: folder or name of the small model."""
    python = sys.executable

    def throughput(name: str, shape: str, ways: str, workloads: str, limit: float, *flags: str) -> Part:
        result, profile = out / f"throughput_{name}.json", out / f"profile_{name}.txt"
        command = [python, "benchmarks/throughput.py", "--device", "cuda", "--model", shape, "--load_in_4bit",
                   "--checkpointing", "--warmup", "2", "--steps", "3", "--ways", ways, "--workload", workloads,
                   "--start_together", "--json", str(result), "--profile", str(profile), *flags]  # fmt: skip
        return Part(f"throughput_{name}", command, limit, result=result, text=profile)

    def train(name: str, *flags: str) -> Part:
        return Part(f"train_{name}", train_command(out, model, name, *flags), 140, group="runs")

    def tests(name: str, expression: str) -> Part:
        result = out / f"tests_{name}.json"
        command = [python, "-m", "benchmarks.gpu_parts.limit_tests", "tests/gpu", "-k", expression, "--limit", "75",
                   "--json", str(result)]  # fmt: skip
        return Part(f"tests_{name}", command, 140, "runs", result, env={"SANDWICH_GPU_MODEL": model})

    memory = [
        Part(f"memory_{case}", [python, "benchmarks/memory.py", "--only", case, "--json", str(out / f"{case}.json")],
             70, group="memory", result=out / f"{case}.json")
        for case in MEMORY_SETTINGS
    ]  # fmt: skip
    together = [
        Part(f"ranks_{len(ranks.split(','))}",
             [python, "-m", "benchmarks.gpu_parts.together", "--ranks", ranks, "--out", str(out / "ranks"), "--json",
              str(out / f"ranks_{len(ranks.split(','))}.json"), "--", *train_flags(model), "--max_steps", "20"],
             60, result=out / f"ranks_{len(ranks.split(','))}.json")
        for ranks in ("16", "8,16", "4,8,16,32")
    ]  # fmt: skip
    return [
        throughput("1.5b", "qwen2.5-1.5b", "packed,ours,stock", "fixed_tools", 120),
        Part("doctor", [python, "train_lora.py", "--doctor"], 60, group="runs"),
        tests("models", "not losses and not resumes"),
        tests("losses", "losses"),
        tests("resume", "resumes"),
        train("4bit_shared", "--load_in_4bit"),
        train("4bit_packed", "--load_in_4bit", "--no-share_prefix"),
        train("4bit_shared_checkpointing", "--load_in_4bit", "--gradient_checkpointing"),
        train("16bit_shared", "--no-load_in_4bit"),
        train("16bit_packed", "--no-load_in_4bit", "--no-share_prefix"),
        train("16bit_shared_checkpointing", "--no-load_in_4bit", "--gradient_checkpointing"),
        throughput("8b", "llama-3.1-8b", "packed,ours,stock", "fixed_tools", 120),
        Part("losses", [python, "-m", "benchmarks.gpu_parts.losses", str(out / "runs"), str(out / "losses.json")], 30,
             group="answers", result=out / "losses.json"),
        Part("generation", [python, "benchmarks/generation.py", "--model", model, "--limit", "24", "--json",
                            str(out / "generation.json")], 60, group="answers", result=out / "generation.json"),
        Part("evaluation", [python, "evaluate_lora.py", str(out / "runs" / "4bit_shared"), "--dataset", HELD_OUT,
                            "--limit", "50"], 60, group="answers"),
        *memory,
        # The limits up to here leave half a minute of nine for the start; what follows takes the time that is left.
        *together,
        throughput("3b", "llama-3.2-3b", "packed,ours,stock", "fixed_tools", 120),
        throughput("1.5b_other", "qwen2.5-1.5b", "packed,ours", "multi_turn,short_qa", 120),
    ]  # fmt: skip


def train_flags(model: str, rows: str = TRAIN_ROWS) -> list[str]:
    return ["--model", model, "--dataset", rows, "--format", "chatml", "--limit", "64", "--batch_size", "8",
            "--grad_accum", "1", "--lr", "2e-3", "--seed", "0"]  # fmt: skip


def train_command(out: Path, model: str, name: str, *flags: str, rows: str = TRAIN_ROWS) -> list[str]:
    """A short run whose folder continues where it exists, so that a second start of the kit is possible."""
    return [sys.executable, "train_lora.py", *train_flags(model, rows), "--max_steps", "12", "--experiments_dir",
            str(out / "runs"), "--name", name, "--resume", "auto", *flags]  # fmt: skip


def parts_for_rehearsal(out: Path, model: str) -> list[Part]:
    """The same kinds of parts with a tiny model: Unsloth's CUDA code through Triton's interpreter where it is there."""
    python, interpreter = sys.executable, [sys.executable, "-m", "tests.interpreted_cuda"]
    throughput, tests = out / "throughput_tiny.json", out / "tests.json"
    rows, short = str(out / ROWS), ["--batch_size", "2", "--limit", "2", "--max_steps", "1"]
    part = functools.partial(Part, limit=REHEARSAL_LIMIT)
    interpreted = [
        part(f"train_{name}", [*interpreter, *train_command(out, model, name, *flags, *short, rows=rows)[1:]])
        for name, flags in (
            ("16bit_shared", ("--no-load_in_4bit",)),
            ("4bit_shared", ("--load_in_4bit",)),
            ("16bit_packed", ("--no-load_in_4bit", "--no-share_prefix")),
        )
    ]
    ranks = [
        part(f"ranks_{count}", [python, "-m", "benchmarks.gpu_parts.together", "--ranks", ranks, "--out",
             str(out / "ranks"), "--json", str(out / f"ranks_{count}.json"), "--", *train_flags(model, rows), *short],
             result=out / f"ranks_{count}.json")
        for count, ranks in ((1, "4"), (2, "4,8"))
    ]  # fmt: skip
    return [
        part("doctor", [python, "train_lora.py", "--doctor"]),
        # Not `packed`: without a GPU Unsloth packs nothing.
        part("throughput_tiny", [python, "benchmarks/throughput.py", "--device", "cpu", "--dtype", "float32", "--model",
             model, "--load_in_4bit", "--checkpointing", "--warmup", "1", "--steps", "1", "--batch_size", "2",
             "--grad_accum", "1", "--ways", "stock,ours", "--start_together", "--workload", "short_qa", "--json",
             str(throughput), "--profile", str(out / "profile_tiny.txt")],
             result=throughput, text=out / "profile_tiny.txt"),
        part("tests", [python, "-m", "benchmarks.gpu_parts.limit_tests", "tests/gpu", "--limit", "75", "--json",
                       str(tests)], result=tests, env={"SANDWICH_GPU_MODEL": model}),
        *interpreted,
        part("losses", [python, "-m", "benchmarks.gpu_parts.losses", str(out / "runs"), str(out / "losses.json")],
             result=out / "losses.json"),
        part("memory_tiny_64", [python, "benchmarks/memory.py", "--only", "tiny_64", "--json",
                                str(out / "tiny_64.json")], result=out / "tiny_64.json"),
        part("generation", [python, "benchmarks/generation.py", "--model", model, "--limit", "2", "--max_new_tokens",
                            "4", "--json", str(out / "generation.json")], result=out / "generation.json"),
        part("evaluation", [python, "evaluate_lora.py", str(out / "runs" / "16bit_shared"), "--dataset", rows,
                            "--limit", "2", "--max_new_tokens", "4"]),
        *ranks,
    ]  # fmt: skip


def write_short_rows(path: Path) -> None:
    """Four rows with one small tool: interpreted kernels take seconds for each hundred tokens."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
        "a": {"type": "integer"}, "b": {"type": "integer"}}}}}  # fmt: skip
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and {number + 1}?"},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": number, "b": number + 1}}}]},
            ],
            "tools": [tool],
        }
        for number in range(4)
    ]  # fmt: skip
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.pack:
        pack(ROOT / ".whl")
        return 0
    end = time.monotonic() + 60 * args.minutes
    date = datetime.now(UTC).date().isoformat()
    name = f"gpu_rehearsal_{date}" if args.rehearse else f"gpu_{date}"
    out = (args.out or ROOT / "experiments" / name).resolve()
    make_parts = parts_for_rehearsal if args.rehearse else parts_for_gpu
    parts = make_parts(out, "MODEL")
    known = [part.name for part in parts]
    chosen = args.only.split(",") if args.only else known
    if unknown := sorted(set(chosen) - set(known)):
        raise UserError(f"--only: no part {', '.join(unknown)}; there are: {', '.join(known)}")
    if args.list:
        for part in parts:
            print(f"{part.name:28} {part.limit:4.0f} s  {' '.join(part.command[1:])}")
        return 0
    if not args.rehearse and not _has_gpu():
        raise UserError("no CUDA device: this kit measures a GPU; without one try --rehearse or --pack")
    out.mkdir(parents=True, exist_ok=True)
    # Inherited by every part.
    os.environ |= {"PYTHONPATH": install_wheels(ROOT / ".whl", out / "site"), "HF_HUB_OFFLINE": "1",
                   "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # fmt: skip
    if args.rehearse:
        write_short_rows(out / ROWS)
    parts = make_parts(out, test_model(out, tiny=args.rehearse))
    path = out / "gpu.json"
    record = load_record(path)
    record |= {
        "command": " ".join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "rehearsal": args.rehearse, "machine": _machine(),
    }  # fmt: skip
    run_parts(
        [part for part in parts if part.name in chosen], record, lambda r: write_record(r, path, page(r)),
        end - time.monotonic(), out / "logs",
    )  # fmt: skip
    open_parts = [name for name in chosen if record["parts"].get(name, {}).get("status") != DONE]
    print(f"{len(chosen) - len(open_parts)} of {len(chosen)} parts done: {path.with_suffix('.md')}")
    if open_parts:
        print(f"not done: {', '.join(open_parts)}; the same command again runs only these")
    return 1 if open_parts else 0


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def _machine() -> dict:
    """Facts of the machine, from a process that ends: this one must not hold the GPU."""
    code = "import json; from benchmarks.throughput import machine; print(json.dumps(machine()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    smi = shutil.which("nvidia-smi")
    driver = subprocess.run([smi], capture_output=True, text=True, check=False).stdout if smi else ""
    try:
        return {**json.loads(done.stdout.splitlines()[-1]), "nvidia_smi": driver}
    except (ValueError, IndexError):
        return {"error": done.stderr[-500:], "nvidia_smi": driver}


if __name__ == "__main__":
    sys.exit(main())
