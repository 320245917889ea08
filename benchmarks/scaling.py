"""Cost of a row by rows per step and length of their common prefix, compared with the ideal.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --picture docs/images/scaling.png

Forward and backward of one step of a small Llama-shaped model with random weights and LoRA on all linear layers,
CPU seconds of the process (the minimum of the repeats). The ideal computes the prefix once and every token at its cost
in a row that is computed alone: time(alone) x (prefix + rows x own) / (rows x (prefix + own)).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from formats import IGNORE_INDEX  # noqa: E402

SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 16384,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128], help="rows per step")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of the prefix")
    parser.add_argument("--own", type=int, default=75, help="tokens of a row of its own (default 75)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/scaling.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "load_average_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "shape": SHAPE, "own": args.own, "points": [],
    }  # fmt: skip
    measure = Measure(args.own, args.repeats)
    for prefix in args.prefixes:
        alone = measure.seconds(prefix, 1)
        for rows in args.rows:
            shared = measure.seconds(prefix, rows) / rows
            ideal = alone * (prefix + rows * args.own) / (rows * (prefix + args.own))
            record["points"].append({"prefix": prefix, "rows": rows, "alone": alone, "shared": shared, "ideal": ideal})
            print(f"prefix {prefix:5} rows {rows:4} per row: alone {1e3 * alone:8.1f} ms  shared {1e3 * shared:8.1f} ms"
                  f"  ideal {1e3 * ideal:8.1f} ms  {alone / shared:5.1f} x faster", flush=True)  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(record, Path(args.picture))
    return 0


class Measure:
    """CPU seconds of one step of rows that share a prefix."""

    def __init__(self, own: int, repeats: int):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from finetune.models.lora_linear import fuse_lora_linears
        from finetune.passes.runner import PassRunner

        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForCausalLM(LlamaConfig(**SHAPE)),
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        fuse_lora_linears(model)
        self.runner = PassRunner(model.train(), 1 << 20, share_prefix=True, pad_token_id=0)
        self.own, self.repeats = own, repeats
        self.seconds(64, 2)  # threads and buffers

    def seconds(self, prefix: int, rows: int) -> float:
        import numpy as np

        from finetune.passes.plan import make_row

        rng = np.random.default_rng(0)
        shared = rng.integers(0, SHAPE["vocab_size"], prefix)
        made = []
        for _ in range(rows):
            ids = np.concatenate([shared, rng.integers(0, SHAPE["vocab_size"], self.own)])
            made.append(make_row(ids, np.where(np.arange(len(ids)) >= prefix + self.own // 2, ids, IGNORE_INDEX)))
        times = []
        for _ in range(self.repeats):
            gc.collect()
            start = time.process_time()
            self.runner.run(made, 1.0, lambda loss: loss.backward())
            times.append(time.process_time() - start)
        return min(times)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    prefixes = sorted({point["prefix"] for point in record["points"]})
    for colour, prefix in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), prefixes, strict=False):
        points = [point for point in record["points"] if point["prefix"] == prefix]
        rows = [point["rows"] for point in points]
        for key, style, name in (("alone", ":", "alone"), ("shared", "o-", "shared"), ("ideal", "--", "ideal")):
            axes.plot(rows, [1e3 * point[key] for point in points], style, color=colour,
                      label=f"{name}, prefix {prefix:,}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xticks=rows, xticklabels=[str(n) for n in rows],
             xlabel="rows per step", ylabel="CPU milliseconds per row",
             title=f"Forward and backward of a row, {record['own']} tokens of its own")  # fmt: skip
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(prefixes))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
