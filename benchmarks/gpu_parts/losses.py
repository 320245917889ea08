"""The losses of all runs in a folder beside each other: what differs between modes that must agree.

python -m benchmarks.gpu_parts.losses RUNS FILE.json
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from finetune.files import write_text_atomic


def losses(run: Path) -> list[float]:
    with (run / "training_log.csv").open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def compare(runs: Path) -> list[dict]:
    """For each run its first and last loss, and the largest relative difference to the first run of its precision."""
    found = {folder.parent.name: losses(folder.parent) for folder in sorted(runs.glob("*/training_log.csv"))}
    rows = []
    for name, values in found.items():
        precision = name.split("_")[0]
        reference = found.get(f"{precision}_shared", values)
        pairs = list(zip(values, reference, strict=False))
        rows.append({
            "run": name, "steps": len(values), "first_loss": values[0] if values else None,
            "last_loss": values[-1] if values else None,
            "largest_difference_to_shared": max((abs(a / b - 1) for a, b in pairs), default=None),
        })  # fmt: skip
    return rows


def main() -> int:
    rows = compare(Path(sys.argv[1]))
    write_text_atomic(Path(sys.argv[2]), json.dumps(rows, indent=1) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
