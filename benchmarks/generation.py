"""What sharing prefixes saves when many prompts are answered: the same rows three ways, in one process, greedy.

one by one      `model.generate` of Transformers, a prompt at a time
padded batch    `model.generate` on batches of prompts of like length, padded on the left
shared prefix   finetune/generation/generate.py, as evaluate_lora.py answers: a common start is computed once, then read

    python benchmarks/generation.py --limit 24 --json generation.json
    python benchmarks/generation.py --adapter experiments/RUN/final_model --limit 24

The answers must be the same ids. Where one is not, the table counts it, and below it stands how far apart the two
likeliest tokens were at the first place that differs: a tie within rounding, or a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.errors import one_line_errors  # noqa: E402
from finetune.files import write_text_atomic  # noqa: E402
from finetune.flag_types import positive_int  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m", help="folder, Hub id or smollm2-135m (default)")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter on top of it; default: the model alone")
    parser.add_argument("--format", default="chatml")
    parser.add_argument("--dataset", action="append", metavar="ROWS", help="default: the English held-out sample rows")
    parser.add_argument("--limit", type=positive_int, default=24, help="only the first N rows (default: 24)")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="of the two batched ways (default: 32)")
    parser.add_argument("--max_new_tokens", type=positive_int, help="default: as evaluate_lora.py takes it")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    from finetune.evaluation.items import load_items
    from finetune.evaluation.run import answer_token_limit, make_prompts
    from finetune.generation.generate import Decoding
    from formats import check_tokenizer, get_format

    model, tokenizer = load(args.model, args.adapter)
    fmt = get_format(args.format, tokenizer)
    items = load_items(args.dataset or [ROOT / "data" / "samples" / "gennx_heldout.jsonl"], limit=args.limit)
    longest = args.max_new_tokens or answer_token_limit(items, tokenizer)
    prompts = make_prompts(items, tokenizer, fmt).input_ids
    decoding = Decoding(tuple(check_tokenizer(tokenizer, fmt)), longest, args.batch_size)
    results = measure(model, prompts, decoding)
    differences = compare(model, prompts, results)
    record = {
        "command": " ".join(["python", "benchmarks/generation.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(model.device),
        },
        "model": args.model, "adapter": args.adapter, "dtype": str(model.dtype).removeprefix("torch."),
        "rows": args.limit, "answers": len(prompts), "prompt_tokens": sum(map(len, prompts)),
        "max_new_tokens": longest, "batch_size": args.batch_size, "ways": results, "differences": differences,
    }  # fmt: skip
    print_table(record)
    if args.json:
        write_text_atomic(args.json, json.dumps(record, indent=1) + "\n")
    return 0


def load(name: str, adapter: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) by Transformers and PEFT alone, so that `generate` is the one everybody has."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.models.bundled import resolve_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def measure(model: Any, prompts: list[list[int]], decoding: Any) -> dict[str, dict[str, Any]]:
    """{way: seconds, processor seconds, tokens computed and made, the answers' ids}, after a short warm-up of each."""
    from finetune.generation.generate import generate

    ways = {
        "one by one": {"decoding": replace(decoding, batch_size=1), "share_prefix": False},
        "padded batch": {"decoding": decoding, "share_prefix": False},
        "shared prefix": {"decoding": decoding, "share_prefix": True},
    }
    results = {}
    for way in ways.values():
        generate(model, prompts[:2], **way | {"decoding": replace(way["decoding"], max_new_tokens=2)})
    for name, way in ways.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        processor = time.process_time()
        report = generate(model, prompts, **way)
        results[name] = {
            "seconds": round(report.seconds, 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "method": report.method + (f" ({report.reason})" if way["share_prefix"] and report.reason else ""),
            "computed_prompt_tokens": report.computed_prompt_tokens,
            "new_tokens": report.new_tokens,
            "cut_off": sum(answer.finish_reason == "length" for answer in report.results),
            "answers": [answer.input_ids for answer in report.results],
        }
        results[name]["times_one_by_one"] = round(results["one by one"]["seconds"] / results[name]["seconds"], 2)
    return results


def compare(model: Any, prompts: list[list[int]], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Notes `equal_answers` in every way's result; returns each answer that is not the one of "one by one".

    `margin` is the difference, in nats, of the log-probabilities of the two tokens that were chosen there, from one
    forward pass over prompt and common start of the answer.
    """
    import torch

    wanted, differences = results["one by one"]["answers"], []
    for name, result in results.items():
        result["equal_answers"] = len(wanted)
        for number, (prompt, right, made) in enumerate(zip(prompts, wanted, result["answers"], strict=True)):
            if right == made:
                continue
            result["equal_answers"] -= 1
            same = next((n for n, (a, b) in enumerate(zip(right, made, strict=False)) if a != b), None)
            shorter = min(len(right), len(made))
            entry = {"way": name, "answer": number, "equal_tokens": shorter if same is None else same, "margin": None}
            if same is not None:  # else one ended where the other went on
                with torch.inference_mode():
                    ids = torch.tensor([prompt + right[:same]], device=model.device)
                    logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
                entry["margin"] = round(float((logits[right[same]] - logits[made[same]]).abs()), 6)
            differences.append(entry)
    return differences


def print_table(record: dict[str, Any]) -> None:
    """One line a way, as Markdown."""
    print(
        f"{record['answers']} answers of {record['rows']} rows, {record['prompt_tokens']:,} prompt tokens, at most "
        f"{record['max_new_tokens']} new ones, {record['dtype']} on {record['machine']['device']}\n"
    )
    print("| way | s | processor s | x one by one | answers/s | prompt tokens computed | new tokens | equal answers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, result in record["ways"].items():
        print(
            f"| {name} | {result['seconds']:.1f} | {result['processor_seconds']:.1f} | "
            f"{result['times_one_by_one']:.2f} | {record['answers'] / result['seconds']:.2f} | "
            f"{result['computed_prompt_tokens']:,} | {result['new_tokens']:,} | "
            f"{result['equal_answers']} of {record['answers']} |"
        )
    for one in record["differences"]:
        where = "one ends where the other goes on" if one["margin"] is None else f"margin {one['margin']:.2g} nats"
        print(f"answer {one['answer']}, {one['way']}: equal for {one['equal_tokens']} tokens, then {where}")


if __name__ == "__main__":
    sys.exit(main())
