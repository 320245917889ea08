"""Several ranks trained at the same time on one GPU: seconds from the first start to the last end.

python -m benchmarks.gpu_parts.together --ranks 8,16 --out FOLDER --json FILE -- FLAGS OF train_lora.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="flags of train_lora.py, after --")
    args = parser.parse_args()
    ranks = args.ranks.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=args.out)  # a second start never meets the runs of the first
    started = time.monotonic()
    runs = [
        subprocess.Popen(
            [sys.executable, "train_lora.py", *args.flags, "--rank", rank, "--experiments_dir", folder,
             "--name", f"rank_{rank}"], cwd=ROOT,
        )
        for rank in ranks
    ]  # fmt: skip
    codes = [run.wait() for run in runs]
    result = {"runs": len(ranks), "seconds": round(time.monotonic() - started, 1), "exit_codes": codes}
    write_text_atomic(args.json, json.dumps(result) + "\n")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
