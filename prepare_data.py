"""Rows in any of the usual shapes in, checked and split conversations out; and the tools to look at their tokens."""

from __future__ import annotations

import argparse
import sys

from finetune.errors import one_line_errors

EXAMPLES = """examples:
  prepare_data.py rows.jsonl more.parquet --output data/processed        normalise, check, split 80/10/10
  prepare_data.py encode --tokenizer Qwen/Qwen2.5-1.5B-Instruct --format qwen rows.jsonl out.jsonl
  prepare_data.py parse --format qwen texts.jsonl out.jsonl              generated text back to calls
  prepare_data.py show --tokenizer smollm2-135m --format chatml rows.jsonl --rows 3
  prepare_data.py audit --tokenizer smollm2-135m --format chatml rows.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """One subparser per verb; each sets `run`, a function of the parsed arguments that returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_prepare(verbs)
    return parser


def _add_prepare(verbs) -> None:
    parser = verbs.add_parser("prepare", help="normalise, check and split rows (the default verb)")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder or Hub id org/name:config@split")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the splits and the dataset card")
    parser.set_defaults(run=lambda args: 0)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    verbs = parser._subparsers._group_actions[0].choices
    if argv and argv[0] not in verbs and argv[0] not in ("-h", "--help"):
        argv.insert(0, "prepare")
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
