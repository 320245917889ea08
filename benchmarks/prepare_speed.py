"""Seconds to prepare rows: read, normalize, render, tokenize and mask, then the same from the cache.

python benchmarks/prepare_speed.py --tokenizer smollm2-135m --format chatml --rows 15000 --tokens 1000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WORDS = """node beam load section material support plate story wind seismic combination envelope result report axial
shear moment deflection column girder slab wall foundation analysis static dynamic modal spectrum unit length force
""".split()  # noqa: SIM905  a list of quoted words is harder to read


def make_rows(number: int, words: int, seed: int) -> list[dict]:
    """Conversations with 8 tools and about three user turns, two of them with a call and its result."""
    rng = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(length))

    def tool(index: int) -> dict:
        properties = {
            f"value_{i}": {"type": rng.choice(["string", "number"]), "description": text(4)} for i in range(3)
        }
        function = {
            "name": f"tool_{index}",
            "description": text(8),
            "parameters": {"type": "object", "properties": properties},
        }
        return {"type": "function", "function": function}

    sets = [[tool(index) for index in range(8)] for _ in range(20)]
    rows = []
    for _ in range(number):
        messages = [{"role": "system", "content": text(12)}]
        for turn in range(3):
            messages.append({"role": "user", "content": text(words // 9)})
            if turn < 2:
                arguments = {"value_0": text(4), "value_1": rng.random(), "value_2": rng.randrange(1000)}
                call = {
                    "type": "function",
                    "function": {"name": f"tool_{rng.randrange(8)}", "arguments": json.dumps(arguments)},
                }
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "content": json.dumps({"ok": True, "note": text(words // 12)})})
            messages.append({"role": "assistant", "content": text(words // 9)})
        rows.append({"messages": messages, "tools": json.dumps(rng.choice(sets))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--format", default="chatml")
    parser.add_argument("--rows", type=int, default=15000)
    parser.add_argument("--tokens", type=int, default=1000, help="approximate tokens per row")
    parser.add_argument("--num_proc", type=int)
    args = parser.parse_args()

    from finetune.encoding.encode import encode_conversations
    from finetune.encoding.token_files import load_format, load_tokenizer
    from finetune.files import write_jsonl
    from finetune.packages import hide_torch
    from finetune.reading.conversations import load_conversations

    hide_torch()
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(
            Path(folder) / "rows.jsonl", make_rows(args.rows, max(60, (args.tokens - 620) * 3 // 5), seed=0)
        )
        started = time.perf_counter()
        tokenizer = load_tokenizer(args.tokenizer)
        fmt, _ = load_format(args.format, tokenizer)
        loaded_tokenizer = time.perf_counter() - started
        table = []
        for run in ("first time", "from cache"):
            started = time.perf_counter()
            loaded = load_conversations(path, cache_dir=Path(folder) / "rows")
            read = time.perf_counter() - started
            started = time.perf_counter()
            encoded = encode_conversations(
                loaded.conversations,
                tokenizer,
                fmt,
                cache_dir=Path(folder) / "tokens",
                num_proc=args.num_proc,
                fingerprint=loaded.fingerprint,
            )
            table.append((run, read, time.perf_counter() - started))
        report = encoded.report
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        print(
            f"{report['kept']:,} rows, {report['tokens']:,} tokens "
            f"({report['tokens'] / report['kept']:.0f} per row), {report['trained_tokens']:,} trained"
        )
        print(f"tokenizer loaded in {loaded_tokenizer:.1f} s")
        print("| run | read and normalize, s | render, tokenize, mask, s | together, s |\n| --- | --- | --- | --- |")
        for run, read, encode in table:
            print(f"| {run} | {read:.1f} | {encode:.1f} | {read + encode:.1f} |")


if __name__ == "__main__":
    main()
