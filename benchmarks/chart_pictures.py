"""The pictures of docs/charts.md, from generated logs: how the chart looks, not what LoRA does.

python benchmarks/chart_pictures.py            writes docs/images/runs_2.png … runs_100.png and runs_seeds.png
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.charts.curves import read_run  # noqa: E402
from finetune.charts.plots import draw_curves  # noqa: E402
from finetune.charts.run_labels import compare_runs  # noqa: E402

HEADER = "step,epoch,loss,eval_loss,learning_rate,grad_norm,tokens_seen,trained_tokens,seconds,peak_memory_gb"
RANKS, RATES = (4, 8, 16, 32, 64), (1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3)
WIDTH = 1200


def write_run(folder: Path, rank: int, lr: float, seed: int, *, steps: int = 300, spike: bool = False) -> None:
    """A log whose loss falls faster with the rank and, up to a point, with the learning rate."""
    noise = random.Random(f"{rank} {lr} {seed}")
    speed = 0.6 + 0.25 * math.log2(rank) - 0.35 * abs(math.log10(lr) + 3.6)
    floor = 0.9 - 0.09 * math.log2(rank) + 0.12 * abs(math.log10(lr) + 3.6) + noise.gauss(0, 0.015)
    lines = [HEADER]
    for step in range(1, steps + 1):
        loss = floor + (2.4 - floor) * math.exp(-speed * 6 * step / steps)
        logged = 9.5 if spike and step in (1, 2) else loss * (1 + noise.gauss(0, 0.06))
        evaluated = f"{loss * 1.06:.5f}" if step % 60 == 0 else ""
        lines.append(f"{step},{3 * step / steps:.4f},{logged:.5f},{evaluated},0.0002,0.8,{step * 4000},,{step * 2},3.0")
    folder.mkdir(parents=True)
    (folder / "training_log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"model": "example-1b", "rank": rank, "alpha": 2 * rank, "lr": lr, "epochs": 3, "batch_size": 4}
    config = {"flags": {**flags, "seed": seed}, "status": "finished"}
    (folder / "experiment_config.json").write_text(json.dumps(config), encoding="utf-8")


def runs_of(count: int) -> list[tuple[int, float, int]]:
    """(rank, lr, seed) of each run: ranks alone up to five, then with every learning rate, then with more seeds."""
    if count <= 5:
        return [(rank, 2e-4, 1) for rank in (8, 64)] if count == 2 else [(rank, 2e-4, 1) for rank in RANKS]
    every = [(rank, lr, seed) for seed in range(1, 5) for lr in RATES for rank in RANKS]
    return every[:count]


def draw(name: str, runs: list[tuple[int, float, int]], spike: bool = False) -> None:
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        for index, (rank, lr, seed) in enumerate(runs):
            write_run(Path(temporary) / f"run_{index}", rank, lr, seed, spike=spike)
        logs = sorted(Path(temporary).glob("*/training_log.csv"))
        picture = Path(temporary) / "picture.png"
        draw_curves(compare_runs([read_run(log) for log in logs]), picture, repeats=True)
        image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    image = image.resize((WIDTH, image.height * WIDTH // image.width), Image.Resampling.LANCZOS)
    target = ROOT / "docs" / "images" / f"{name}.png"
    image.quantize(96).save(target, optimize=True)
    print(target.relative_to(ROOT), f"{target.stat().st_size / 1000:.0f} kB")


def main() -> int:
    for count in (2, 5, 30, 100):
        draw(f"runs_{count}", runs_of(count), spike=count == 5)
    draw("runs_seeds", [(rank, 2e-4, seed) for rank in (4, 16, 64) for seed in range(1, 5)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
