"""What shared prefixes save in generation: the same rows by three methods, in one process, greedy.

one by one      `model.generate` of Transformers, one prompt at a time
padded batch    `model.generate` on batches of prompts of similar length, padded on the left
shared prefix   finetune/generation/generate.py, as in evaluate_lora.py: a common prefix is computed once and cached

    python benchmarks/generation.py --limit 24 --json generation.json
    python benchmarks/generation.py --adapter experiments/RUN/final_model --limit 24

The answers should be the same ids. The table counts those that differ; below it is the difference between the logits
of the two tokens at the first position that differs: a tie within rounding, or an error.
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
from finetune.flags.types import positive_int  # noqa: E402


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
    parser.add_argument("--batch_size", type=positive_int, default=32, help="of the two batched methods (default: 32)")
    parser.add_argument("--max_new_tokens", type=positive_int, help="default: as in evaluate_lora.py")
    parser.add_argument("--json", metavar="FILE", help="write all measurements to this file")
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
    differences = compare_answers(model, prompts, results)
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
    """(model, tokenizer) by Transformers and PEFT alone, so that `generate` is the standard one."""
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
    """{method: seconds, CPU seconds, computed and new tokens, the answers' ids}, after a short warm-up of each."""
    from finetune.generation.generate import generate

    methods = {
        "one by one": {"decoding": replace(decoding, batch_size=1), "share_prefix": False},
        "padded batch": {"decoding": decoding, "share_prefix": False},
        "shared prefix": {"decoding": decoding, "share_prefix": True},
    }
    results = {}
    for method in methods.values():
        generate(model, prompts[:2], **method | {"decoding": replace(method["decoding"], max_new_tokens=2)})
    for name, method in methods.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        cpu_start = time.process_time()
        report = generate(model, prompts, **method)
        results[name] = {
            "seconds": round(report.seconds, 2),
            "processor_seconds": round(time.process_time() - cpu_start, 2),
            "method": report.method + (f" ({report.reason})" if method["share_prefix"] and report.reason else ""),
            "computed_prompt_tokens": report.computed_prompt_tokens,
            "new_tokens": report.new_tokens,
            "cut_off": sum(answer.finish_reason == "length" for answer in report.results),
            "answers": [answer.input_ids for answer in report.results],
        }
        results[name]["times_one_by_one"] = round(results["one by one"]["seconds"] / results[name]["seconds"], 2)
    return results


def compare_answers(model: Any, prompts: list[list[int]], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Record `equal_answers` in every method's result; return each answer that differs from "one by one".

    `margin` is the difference, in nats, between the log-probabilities of the two tokens at the first position that
    differs, from one forward pass over the prompt and the answers' common prefix.
    """
    import torch

    expected, differences = results["one by one"]["answers"], []
    for name, result in results.items():
        result["equal_answers"] = len(expected)
        for number, (prompt, right, actual) in enumerate(zip(prompts, expected, result["answers"], strict=True)):
            if right == actual:
                continue
            result["equal_answers"] -= 1
            same = next((n for n, (a, b) in enumerate(zip(right, actual, strict=False)) if a != b), None)
            shorter = min(len(right), len(actual))
            entry = {"way": name, "answer": number, "equal_tokens": shorter if same is None else same, "margin": None}
            if same is not None:  # else one answer is a prefix of the other
                with torch.inference_mode():
                    ids = torch.tensor([prompt + right[:same]], device=model.device)
                    logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
                entry["margin"] = round(float((logits[right[same]] - logits[actual[same]]).abs()), 6)
            differences.append(entry)
    return differences


def print_table(record: dict[str, Any]) -> None:
    """One line per method, as Markdown."""
    print(
        f"{record['answers']} answers of {record['rows']} rows, {record['prompt_tokens']:,} prompt tokens, at most "
        f"{record['max_new_tokens']} new tokens, {record['dtype']} on {record['machine']['device']}\n"
    )
    print("| method | s | CPU s | x one by one | answers/s | prompt tokens computed | new tokens | equal answers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, result in record["ways"].items():
        print(
            f"| {name} | {result['seconds']:.1f} | {result['processor_seconds']:.1f} | "
            f"{result['times_one_by_one']:.2f} | {record['answers'] / result['seconds']:.2f} | "
            f"{result['computed_prompt_tokens']:,} | {result['new_tokens']:,} | "
            f"{result['equal_answers']} of {record['answers']} |"
        )
    for one in record["differences"]:
        where = "one of them ends" if one["margin"] is None else f"margin {one['margin']:.2g} nats"
        print(f"answer {one['answer']}, {one['way']}: equal for {one['equal_tokens']} tokens, then {where}")


if __name__ == "__main__":
    sys.exit(main())
