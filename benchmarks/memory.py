"""Predicted and measured memory: runs of train_lora.py of a few steps, each in a process of its own.

Models of several shapes with random weights, and the bundled 135M model; rows of a given length that share nothing. The
measured peak is resident memory on a CPU, and what PyTorch's allocator reserved on a GPU. The tests of the estimator
read the JSON file of records.

  python benchmarks/memory.py                                   all cases for this machine, as a table
  python benchmarks/memory.py --only 135m_512 135m_4x512        some of them
  python benchmarks/memory.py --json benchmarks/results/memory_cpu.json     add to or replace in a file of records
  python benchmarks/memory.py --show benchmarks/results/memory_cpu.json     the table of a file by today's estimator
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import MODELS  # noqa: E402
from benchmarks.throughput_parts.random_model import cached_model  # noqa: E402
from finetune.errors import one_line_errors  # noqa: E402
from finetune.files import write_text_atomic  # noqa: E402
from finetune.memory.estimate import Workload  # noqa: E402
from finetune.memory.sizes import Matrix, Sizes  # noqa: E402

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run. model: "smollm2-135m" or the config of a random one; `rows` rows per step of up to `tokens` words, of
    which `trained` are the answer; flags: of train_lora.py; recipe: runs this config file, with its own rows."""

    model: Any
    tokens: int = 0
    trained: int = 48
    rows: int = 1
    steps: int = 4
    flags: tuple[str, ...] = ()
    dtype: str = "float32"
    recipe: str | None = None


# Relative row length of each step: blocks of changing sizes fragment an allocator.
LENGTH_FRACTIONS = (0.7, 1.0, 0.85, 0.95)


def shape(kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int = 49_152,
          **more: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": True,
        "max_position_embeddings": 16_384, **more,
    }  # fmt: skip


CKPT = "--gradient_checkpointing"
SMALL = "smollm2-135m"
CPU_CASES = {
    "tiny_64": Case(shape("llama", 64, 128, 2, 4, 2), 64),
    "135m_512": Case(SMALL, 512),
    "135m_1024": Case(SMALL, 1024),
    "135m_4x512": Case(SMALL, 512, rows=4),
    "135m_2048": Case(SMALL, 2048),
    "135m_2048_trained": Case(SMALL, 2048, trained=1400),
    "135m_2048_checkpoint": Case(SMALL, 2048, flags=(CKPT,)),
    "135m_512_checkpoint": Case(SMALL, 512, flags=(CKPT,)),
    "135m_1024_checkpoint": Case(SMALL, 1024, flags=(CKPT,)),
    "135m_4096_checkpoint": Case(SMALL, 4096, flags=(CKPT,)),
    "135m_1024_r64": Case(SMALL, 1024, flags=("--rank", "64")),
    "135m_1024_last8": Case(SMALL, 1024, flags=("--last_layers", "8")),
    "135m_512_4bit": Case(SMALL, 512, flags=("--load_in_4bit",)),
    "135m_1024_4bit": Case(SMALL, 1024, flags=("--load_in_4bit",)),
    "wide_qwen2_1024": Case(shape("qwen2", 1024, 4096, 8, 16, 4), 1024),
    "deep_qwen3_1024": Case(shape("qwen3", 384, 1024, 40, 6, 2, head_dim=64), 1024),
    "deep_qwen3_1024_checkpoint": Case(shape("qwen3", 384, 1024, 40, 6, 2, head_dim=64), 1024, flags=(CKPT,)),
    "large_vocabulary_1024": Case(shape("llama", 512, 1536, 8, 8, 8, vocab=151_936), 1024, trained=600),
}
# The same in bfloat16, for a CPU with bfloat16 hardware, and the demo: fifty steps, shared prefixes.
CPU_CASES |= {
    f"{name}_bf16": dataclasses.replace(CPU_CASES[name], dtype="bfloat16")
    for name in (
        "135m_512", "135m_1024", "135m_4x512", "135m_2048", "135m_2048_trained", "135m_1024_checkpoint",
        "135m_1024_r64", "135m_512_4bit", "135m_1024_4bit", "wide_qwen2_1024", "deep_qwen3_1024",
        "large_vocabulary_1024",
    )
} | {"demo_bf16": Case(SMALL, dtype="bfloat16", recipe="configs/demo.yaml")}  # fmt: skip
# Published sizes; random weights take as much memory as trained ones.
B05 = shape("qwen2", 896, 4864, 24, 14, 2, vocab=151_936)
CUDA_CASES = {
    f"{name}_{bits}_{tokens}": Case(
        config, tokens, flags=(f"--{'' if bits == '4bit' else 'no-'}load_in_4bit",), dtype="bfloat16"
    )
    for name, config in (("0.5b", B05), ("1.5b", MODELS["qwen2.5-1.5b"]), ("8b", MODELS["llama-3.1-8b"]))
    for bits in ("4bit", "16bit")
    for tokens in (512, 2048, 8192)
}


def make_rows(case: Case, path: Path) -> Path:
    """Rows of this case's lengths with random words, step by step."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    rows = []
    for share in LENGTH_FRACTIONS[: case.steps]:
        for _ in range(case.rows):
            asked = words(max(1, round(share * case.tokens) - case.trained - 12))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": words(case.trained)}]
            rows.append({"messages": messages})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(name: str, case: Case) -> dict[str, Any]:
    """Train a few steps; returns the record of the run, or its last line when it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = case.model
        if isinstance(model, dict):
            model = str(cached_model(model, case.dtype))
        flags = ["--config", case.recipe] if case.recipe else [
            "--dataset", str(make_rows(case, folder / "rows.jsonl")), "--format", "chatml",
            "--batch_size", str(case.rows), "--grad_accum", "1", "--max_steps", str(case.steps), "--save_steps", "0",
            "--tokens_per_pass", str(2 * case.rows * case.tokens),
        ]  # fmt: skip
        command = [
            sys.executable, "train_lora.py", "--model", model, "--dtype", case.dtype, *flags,
            "--experiments_dir", str(folder / "runs"), "--name", "run", *case.flags,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode != 0:
            return {"case": name, "failed": done.stderr.strip().splitlines()[-1][:200]}
        config = json.loads((folder / "runs" / "run" / "experiment_config.json").read_text(encoding="utf-8"))
        from finetune.memory.sizes import sizes_of_name

        sizes = dataclasses.asdict(sizes_of_name(model))
    return {"case": name, "device": config["device"], **config["memory"], "sizes": sizes}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: measured, predicted by the current estimator, and the difference."""
    from finetune.memory.estimate import estimate, measurable_bytes

    lines = ["| case | parameters | tokens in a pass | measured GB | predicted GB | difference |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for record in records:
        if "failed" in record:
            lines.append(f"| {record['case']} | | | failed: {record['failed']} | | |")
            continue
        plan, sizes = plan_of(record), sizes_of(record)
        predicted = measurable_bytes(estimate(sizes, plan), plan.device) / 1e9
        lines.append(
            f"| {record['case']} | {sizes.parameters / 1e6:.0f} M | {plan.tokens:,} | {record['measured_gb']:.2f} | "
            f"{predicted:.2f} | {predicted / record['measured_gb'] - 1:+.0%} |"
        )
    return "\n".join(lines)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names of cases; default: all of this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the table of a file")
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    import torch

    from finetune.progress import progress_bar

    cases = CUDA_CASES if torch.cuda.is_available() else CPU_CASES
    chosen = {name: cases[name] for name in args.only} if args.only else cases
    records = []
    with progress_bar("runs", len(chosen)) as advance:
        for name, case in chosen.items():
            records.append(run(name, case))
            if args.json:
                known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
                kept = [r for r in known if r["case"] != name]
                write_text_atomic(args.json, json.dumps([*kept, records[-1]], indent=1) + "\n")
            advance(1)
    print(table(records))
    return int(any("failed" in record for record in records))


def plan_of(record: dict[str, Any]) -> Workload:
    """The plan in a `memory` entry of experiment_config.json or in a record of benchmarks/memory.py."""
    return Workload(**{**record["plan"], "target_modules": tuple(record["plan"]["target_modules"])})


def sizes_of(record: dict[str, Any]) -> Sizes:
    """The model's sizes in a record of benchmarks/memory.py."""
    return Sizes(**{**record["sizes"], "matrices": tuple(Matrix(**m) for m in record["sizes"]["matrices"])})


if __name__ == "__main__":
    sys.exit(main())
