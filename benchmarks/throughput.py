"""The same optimizer steps by six trainers: Unsloth's (default, without gradient checkpointing, packed), plain PEFT,
ours with and without shared prefixes. Same rows, same trained tokens, same rows per step; each trainer in a process of
its own.

    python benchmarks/throughput.py --workload fixed_tools --steps 2 --json throughput.json
    python benchmarks/throughput.py --ways stock,ours --steps 1
    python benchmarks/throughput.py --device cuda --model qwen2.5-1.5b --load_in_4bit --checkpointing --warmup 2

A model name of MODELS means that model's shape with random weights: enough for time and memory. Seconds are the
median of the measured steps. On a machine where other programs run, compare CPU seconds rather than wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.throughput_parts import rows as throughput_rows  # noqa: E402
from benchmarks.throughput_parts.random_model import cached_model  # noqa: E402
from benchmarks.throughput_parts.trainers import TRAINERS  # noqa: E402
from formats import IGNORE_INDEX  # noqa: E402

# Shapes as published in each model's config.json.
MODELS = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "rope_theta": 5e5, "max_position_embeddings": 131072,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_theta": 5e5, "max_position_embeddings": 131072,
    },
}  # fmt: skip
# Dense bfloat16 FLOP/s from the manufacturers' data sheets (without sparsity).
BF16_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )  # fmt: skip
    listed = "; ".join(f"{name}: {what}" for name, what in throughput_rows.WORKLOADS.items())
    parser.add_argument("--workload", default="all", help=f"comma-separated names, or all. {listed}")
    listed = "; ".join(f"{name}: {what}" for name, what in TRAINERS.items())
    parser.add_argument("--ways", default="all", help=f"comma-separated names, or all. {listed}")
    parser.add_argument("--model", default="smollm2-135m", help=f"folder, Hub id, smollm2-135m or {', '.join(MODELS)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--load_in_4bit", action="store_true", help="4-bit NF4 base in every trainer")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in plain PEFT and in ours")
    parser.add_argument("--optim", default=None, help="default: adamw_8bit on a GPU, adamw_torch on a CPU")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default 3)")
    parser.add_argument("--warmup", type=int, default=0, help="complete steps before them (on a GPU: 2)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--grad_accum", type=int, default=2)
    parser.add_argument("--start_together", action="store_true", help="load all trainers at once, which saves the time "
                        "of imports; they take turns from their first step on")  # fmt: skip
    parser.add_argument("--our_flags", default="", help="more flags of train_lora.py for ours, as one argument")
    parser.add_argument("--profile", metavar="FILE", help="operations of one more step of `ours`, longest first")
    parser.add_argument("--json", metavar="FILE", help="write all measurements to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    workloads = selected(args.workload, list(throughput_rows.WORKLOADS), "--workload")
    trainers = selected(args.ways, list(TRAINERS), "--ways")
    device, dtype = _device(args.device, args.dtype)
    folder = _model_folder(args.model, dtype)
    record = {
        "command": " ".join(["python", "benchmarks/throughput.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": args.model, "dtype": dtype, "load_in_4bit": args.load_in_4bit, "checkpointing": args.checkpointing,
        "rows_per_step": args.batch_size * args.grad_accum, "micro_batch": args.batch_size,
        "load_average_before": _load(), "results": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for workload in workloads:
            steps = _rows(folder, workload, args)
            steps_file = Path(temporary) / f"{workload}.json"
            throughput_rows.save(steps_file, steps)
            task = {
                "steps_file": str(steps_file), "model": folder, "device": device, "dtype": dtype,
                "load_in_4bit": args.load_in_4bit, "checkpointing": args.checkpointing, "steps": args.steps,
                "warmup": args.warmup, "batch_size": args.batch_size, "grad_accum": args.grad_accum,
                "profile": args.profile, "turn": str(Path(temporary) / "turn.lock"), "lr": 2e-4, "seed": 0,
                "optim": args.optim or ("adamw_8bit" if device == "cuda" else "adamw_torch"),
                "max_seq_length": max(len(ids) for step in steps for ids, _ in step),
                "our_flags": args.our_flags.split(), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())),
            }  # fmt: skip
            results = record["results"][workload] = {}
            started = [_start(trainer, task, Path(temporary)) for trainer in trainers if args.start_together]
            for number, trainer in enumerate(trainers):
                print(f"{workload}: {trainer} …", file=sys.stderr, flush=True)
                load = _load()
                process = started[number] if started else _start(trainer, task, Path(temporary))
                results[trainer] = _result(process, trainer, Path(temporary)) | {"load_average": [load, _load()]}
                compare_with_stock(results)
                _share_of_peak(results, folder)
                if args.json:  # after every trainer, so that an interrupted run keeps its results
                    Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
            print_table(workload, results, steps)
    return int(any("error" in result for results in record["results"].values() for result in results.values()))


def selected(value: str, known: list[str], flag: str) -> list[str]:
    """The names in a comma-separated flag; SystemExit for an unknown one."""
    names = known if value == "all" else value.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"error: {flag}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _device(device: str, dtype: str) -> tuple[str, str]:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: torch finds no CUDA device; run: python train_lora.py --doctor")
    if dtype == "auto":
        fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    return device, dtype


def _model_folder(name: str, dtype: str) -> str:
    """A folder that every trainer loads."""
    from finetune.models.bundled import resolve_model

    return str(cached_model(MODELS[name], dtype)) if name in MODELS else resolve_model(name)


def _rows(folder: str, workload: str, args) -> list:
    from transformers import AutoTokenizer

    from formats import get_format

    tokenizer = AutoTokenizer.from_pretrained(folder)
    fmt = get_format("chatml", tokenizer=tokenizer)
    return throughput_rows.steps_of(workload, tokenizer, fmt, args.steps, args.batch_size * args.grad_accum)


def _start(trainer: str, task: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """The process of one trainer; what it prints goes into `<trainer>.log`."""
    path = folder / f"{trainer}.task"
    path.write_text(json.dumps(task | {"way": trainer}), encoding="utf-8")
    path.with_suffix(".result").unlink(missing_ok=True)
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "benchmarks.throughput_parts.trainers", str(path)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)


def _result(process: subprocess.Popen[str], trainer: str, folder: Path) -> dict[str, Any]:
    """What the trainer measured, once its process has ended, or why it could not."""
    process.wait()
    result, log = folder / f"{trainer}.result", folder / f"{trainer}.log"
    printed = log.read_text(encoding="utf-8", errors="replace")
    if not result.is_file():
        last = (printed.strip().splitlines() or ["no output"])[-1]
        return {"error": f"process ended with code {process.returncode}: {last}"}
    answer = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        print(printed[-3000:], file=sys.stderr)
    return answer


def compare_with_stock(results: dict[str, dict[str, Any]]) -> None:
    """Add the speedup over `stock`, and a note where the first loss differs: not the same work."""
    stock = results.get("stock", {})
    for result in results.values():
        if "error" in result or "error" in stock or not stock:
            continue
        result["times_stock"] = stock["seconds_per_step"] / result["seconds_per_step"]
        result["times_stock_cpu"] = stock["cpu_seconds_per_step"] / result["cpu_seconds_per_step"]
        if abs(result["first_loss"] / stock["first_loss"] - 1) > 0.02:
            result["note"] = f"its first loss is {result['first_loss']:.4f}, not {stock['first_loss']:.4f}"


def _share_of_peak(results: dict[str, dict[str, Any]], folder: str) -> None:
    """Add the FLOP/s that the rows' tokens need, as a share of the GPU's bfloat16 peak.

    2 x weights per token forward and 2 backward (frozen weights get no gradient), 2 more where activations are
    recomputed; without attention. `useful_share_of_bf16_peak` counts shared tokens once per row, so that sharing can
    raise it above the peak; `share_of_bf16_peak` counts computed tokens.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer
    for result in results.values():
        peak = next((flops for name, flops in BF16_PEAK_FLOPS.items() if name in result.get("device", "")), None)
        if peak and "seconds_per_step" in result:
            per_token = (6 if result["gradient_checkpointing"] else 4) * weights
            result["useful_share_of_bf16_peak"] = per_token * result["tokens_per_second"] / peak
            computed = result.get("computed_tokens_per_step", result["tokens_per_step"])
            result["share_of_bf16_peak"] = per_token * computed / result["seconds_per_step"] / peak


def print_table(workload: str, results: dict[str, dict[str, Any]], steps: list) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [row for step in steps for row in step]
    trained = sum(sum(label != IGNORE_INDEX for label in labels[1:]) for _, labels in rows)
    table = Table(title=f"{workload}: {throughput_rows.WORKLOADS[workload]}\n{len(rows)} rows in {len(steps)} steps, "
                        f"{sum(len(ids) for ids, _ in rows):,} tokens, {trained:,} of them trained")  # fmt: skip
    names = [
        "trainer",
        "s/step",
        "CPU s/step",
        "rows/s",
        "tokens/s",
        "x stock",
        "x stock (CPU s)",
        "peak GB",
        "final loss",
    ]
    gpu = any("share_of_bf16_peak" in result for result in results.values())
    for name in [*names, *(["of bf16 peak"] if gpu else [])]:
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for trainer, result in results.items():
        if "error" in result:
            table.add_row(TRAINERS[trainer], result["error"])
            continue
        cells = [result[k] for k in ("seconds_per_step", "cpu_seconds_per_step", "rows_per_second")]
        texts = [f"{cell:.2f}" for cell in cells] + [f"{result['tokens_per_second']:,.0f}"]
        texts += [f"{result[k]:.2f}" if k in result else "" for k in ("times_stock", "times_stock_cpu")]
        texts += [f"{result['peak_memory_gb']:.2f}", f"{result['final_loss']:.4f}"]
        texts += [f"{result['share_of_bf16_peak']:.0%}"] if "share_of_bf16_peak" in result else []
        name = TRAINERS[trainer] + (f"\n({result['note']})" if "note" in result else "")
        table.add_row(name, *texts)
    Console(width=150).print(table)


def machine() -> dict[str, Any]:
    """Processor, cores, GPU and versions, for a record."""
    import torch

    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {}
    from importlib.metadata import PackageNotFoundError, version

    for package in ("torch", "transformers", "peft", "trl", "unsloth"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"processor": name, "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version(), **versions}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    sys.exit(main())
