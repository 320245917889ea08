"""Compares the tool calls of a GGUF in llama.cpp with those that evaluate_lora.py got from the run.

python benchmarks/gguf_calls.py experiments/RUN FILE.gguf --dataset data/samples/gennx_heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.errors import one_line_errors


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--dataset", action="append", required=True)
    parser.add_argument("--limit", type=int, default=20, help="answers compared (default: 20)")
    args = parser.parse_args()

    from finetune.evaluation.items import load_items
    from finetune.evaluation.run import make_prompts
    from finetune.export.llama_check import llama_server
    from finetune.export.merged import trained_template
    from finetune.runs.find import find_run
    from formats import check_tokenizer

    run = find_run(args.run)
    tokenizer, fmt = run.load_tokenizer()
    fmt = replace(fmt, template=trained_template(run, fmt), template_kwargs={})
    lines = (args.run / "evaluation" / "finetuned_model_results.jsonl").read_text(encoding="utf-8").split("\n")
    known = {(line["row"], line["turn"]): line for line in map(json.loads, filter(None, lines))}
    prompts = make_prompts(load_items(args.dataset), tokenizer, fmt, longest=None)
    pairs = [(item, ids) for item, ids in zip(prompts.items, prompts.input_ids, strict=True)]
    pairs = [(item, ids) for item, ids in pairs if (item.row, item.turn) in known]
    pairs = pairs[: args.limit]
    ends = set(check_tokenizer(tokenizer, fmt))
    print("| file | answers | same calls | same text | correct calls | correct calls of the run | s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for path in args.gguf:
        started, same_calls, same_text, correct, run_correct = time.monotonic(), 0, 0, 0, 0
        with llama_server(path, context=max(len(ids) for _, ids in pairs) + 300) as server:
            for item, ids in pairs:
                line = known[item.row, item.turn]
                request = {"prompt": ids, "max_tokens": 256, "temperature": 0, "logprobs": 1}
                answer = server.handle_completions(request)["choices"][0]
                tokens = [entry["id"] for entry in answer["logprobs"]["content"]]
                text = tokenizer.decode([token for token in tokens if token not in ends])
                calls = fmt.parse(text, item.tools).tool_calls
                same_calls += calls == line["parsed_calls"]
                same_text += text.strip() == line["text"].strip()
                correct += calls == item.expected_calls
                run_correct += line["parsed_calls"] == item.expected_calls
        seconds = time.monotonic() - started
        print(
            f"| {path.name} | {len(pairs)} | {same_calls} | {same_text} | {correct} | {run_correct} | {seconds:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
