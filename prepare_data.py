"""Rows in any of the usual shapes in, checked and split conversations out; and the tools to look at their tokens."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.flag_types import folder_name, positive
from finetune.torchless import leave_torch_out

EXAMPLES = """examples:
  prepare_data.py rows.jsonl more.parquet --output data/processed        normalise, check, split 80/10/10
  prepare_data.py faq.csv --map frage=prompt --map antwort=completion --output data/faq
  prepare_data.py NotoriousH2/instructkr-apigen --output data/apigen --tokenizer MODEL --max_seq_length 9000
  prepare_data.py --sql postgresql://localhost/logs --table query_logs --tools tools.json --output data/logs
  prepare_data.py encode --tokenizer Qwen/Qwen2.5-1.5B-Instruct --format qwen rows.jsonl out.jsonl
  prepare_data.py parse --format qwen texts.jsonl out.jsonl              generated text back to calls
  prepare_data.py show --tokenizer smollm2-135m --format chatml data/processed --rows 3 --html page.html
  prepare_data.py audit --tokenizer smollm2-135m --format chatml data/processed
  prepare_data.py generate --tools tools.json --per-tool 32 --output data/made     rows made from tool schemas
`prepare` may be left out. Each verb has a --help of its own.
"""
PREPARE_EXAMPLES = """A source is a .jsonl, .json, .csv, .tsv or .parquet file (also .gz), a folder of splits, or a Hub
dataset.
Written into --output: train.jsonl, validation.jsonl, test.jsonl, rejected.jsonl, dataset_card.md, two pictures.
examples:
  prepare_data.py rows.jsonl --output data/processed
  prepare_data.py faq.csv --map frage=prompt --map antwort=completion --output data/faq --split 90/5/5 --dedupe
  prepare_data.py --sql sqlite:///logs.db --query "SELECT question, tool, parameters FROM log" --tools tools.json \\
      --output data/logs
"""
ENCODE_EXAMPLES = """Output, one line per row, in order: {"row", "status": "ok|split|refused", "reason",
"sequences": [{"text", "input_ids", "labels"}]}. Needs no torch and no GPU.
example:
  prepare_data.py encode --tokenizer Qwen/Qwen2.5-1.5B-Instruct --format qwen rows.jsonl out.jsonl
"""
PARSE_EXAMPLES = """Input field: text. Output, one line per row, in order: {"content", "tool_calls", "errors"}.
example:
  prepare_data.py parse --format llama3-function texts.jsonl out.jsonl
"""
SHOW_EXAMPLES = """examples:
  prepare_data.py show --tokenizer smollm2-135m --format chatml data/processed --rows 3
  prepare_data.py show --tokenizer MODEL --format auto rows.jsonl --first 120 --rows 1 --html page.html
"""
AUDIT_EXAMPLES = """Exit status 1 when an assertion fails, 0 when all hold.
example:
  prepare_data.py audit --tokenizer smollm2-135m --format chatml data/processed data/processed@validation
"""
GENERATE_EXAMPLES = """Written into --output: train.jsonl and heldout.jsonl (Korean: train_ko.jsonl, heldout_ko.jsonl);
the requests of the two are worded in different ways. The same seed gives the same bytes on every machine.
examples:
  prepare_data.py generate --tools tools.json --per-tool 32 --language en --seed 1 --output data/made
  prepare_data.py generate --tools data/samples/gennx_tool_schemas_tier1.json --seed 7 --output /tmp/samples \\
      --phrasings data/samples/gennx_phrasings_en.json --rows 384 --heldout-rows 100 --name gennx
"""


def build_parser() -> argparse.ArgumentParser:
    """One subparser per verb; each sets `run`, a function of the parsed arguments that returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_prepare(_verb(verbs, "prepare", "normalise, check and split rows (the default verb)", PREPARE_EXAMPLES))
    _add_encode(_verb(verbs, "encode", "rows to text, input_ids and labels, one line per row", ENCODE_EXAMPLES))
    _add_parse(_verb(verbs, "parse", "generated texts to content and calls, one line per row", PARSE_EXAMPLES))
    _add_show(_verb(verbs, "show", "rows with their trained tokens in colour", SHOW_EXAMPLES))
    _add_audit(_verb(verbs, "audit", "what is trained over a whole data set, with assertions", AUDIT_EXAMPLES))
    _add_generate(_verb(verbs, "generate", "make training and held-out rows from tool schemas", GENERATE_EXAMPLES))
    return parser


def _verb(verbs, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return verbs.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=formatter)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--map", action="append", metavar="COLUMN=FIELD", help="read a column as this field; repeatable"
    )
    parser.add_argument("--tools", metavar="FILE", help="JSON file with tool schemas for rows that declare none")


def _add_format(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--tokenizer", required=required, metavar="DIR_OR_ID", help="folder, Hub id or smollm2-135m")
    parser.add_argument(
        "--format", default="auto", metavar="F", help="format name, YAML file, native or auto (default)"
    )
    parser.add_argument("--train_on", default="all", choices=("all", "last"), help="which assistant turns are trained")
    parser.add_argument(
        "--control_tokens",
        default="escape",
        choices=("escape", "error", "allow"),
        help="control tokens inside contents (default: escape)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="let the tokenizer run code of its own (off)")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder or Hub id org/name:config@split")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the splits and the dataset card")
    parser.add_argument("--overwrite", action="store_true", help="replace the splits already in --output")
    _add_reading(parser)
    from_environment = "without a URL: $DATABASE_URL, or PostgreSQL as POSTGRES_HOST, _PORT, _DB, _USER, _PASSWORD say"
    parser.add_argument("--sql", nargs="?", const="", metavar="URL", help=f"read a database too; {from_environment}")
    parser.add_argument("--query", metavar="SELECT", help="the query for --sql")
    parser.add_argument("--table", help="or a whole table (default: query_logs)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of rejecting it")
    parser.add_argument("--dedupe", action="store_true", help="also reject near-duplicates (exact ones always are)")
    parser.add_argument("--split", default="80/10/10", help="shares of train/validation/test (default: 80/10/10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument("--limit", type=positive(int), help="only the first N good rows of each source")
    _add_format(parser, required=False)
    parser.add_argument("--max_seq_length", type=positive(int), help="in tokens; needs --tokenizer")
    parser.add_argument(
        "--overlong",
        default="drop",
        choices=("drop", "trim_turns", "error"),
        help="rows that are longer: reject, remove oldest whole turns, or stop",
    )
    parser.add_argument("--num_proc", type=positive(int), help="processes for tokenising (default: as many as pay)")
    parser.set_defaults(run=_prepare)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="rows.jsonl")
    parser.add_argument("output", metavar="out.jsonl")
    _add_format(parser, required=True)
    _add_reading(parser)
    parser.set_defaults(run=_encode)


def _add_parse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="texts.jsonl")
    parser.add_argument("output", metavar="out.jsonl")
    parser.add_argument("--format", required=True, metavar="F", help="format name or YAML file, or native")
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="only for --format native or auto")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the tokenizer run code of its own (off)")
    parser.set_defaults(run=_parse)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    _add_format(parser, required=True)
    _add_reading(parser)
    parser.add_argument(
        "--first", type=positive(int), default=1, metavar="N", help="begin with the N-th row (default: 1)"
    )
    parser.add_argument("--rows", type=positive(int), default=5, metavar="N", help="how many rows (default: 5)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page instead")
    parser.set_defaults(run=_show)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    _add_format(parser, required=True)
    _add_reading(parser)
    parser.add_argument("--limit", type=positive(int), help="only the first N rows of each source")
    parser.set_defaults(run=_audit)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", metavar="FILE", required=True, help="JSON file with tool schemas")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the two files")
    parser.add_argument("--phrasings", metavar="FILE", help="phrasing file for these tools (default: general wording)")
    parser.add_argument("--per-tool", "--per_tool", type=positive(int), default=32, metavar="N",
                        help="training requests per tool (default: 32)")  # fmt: skip
    parser.add_argument("--rows", type=positive(int), metavar="N", help="training rows in all, instead of --per-tool")
    parser.add_argument("--heldout-rows", "--heldout_rows", type=positive(int), metavar="N",
                        help="held-out rows (default: a third of the training rows)")  # fmt: skip
    parser.add_argument("--language", choices=("en", "ko"), default="en", help="of the general wording (default: en)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--name", type=folder_name, help="beginning of the files' names")
    parser.add_argument("--overwrite", action="store_true", help="replace files already in --output")
    parser.set_defaults(run=_generate)


def _reading(args) -> dict:
    from finetune.reading.shapes import parse_map
    from finetune.reading.tool_schemas import load_tools_file

    return {"column_map": parse_map(args.map), "tools": load_tools_file(args.tools) if args.tools else None}


def _tokenizer_and_format(args) -> tuple:
    from finetune.encoding.token_files import load_format, load_tokenizer
    from formats import check_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    fmt, why = load_format(args.format, tokenizer)
    check_tokenizer(tokenizer, fmt)
    print(f"format {fmt.name} ({why})", file=sys.stderr)
    return tokenizer, fmt


def _prepare(args) -> int:
    from finetune.preparing.preparation import PrepareOptions, prepare
    from finetune.preparing.preparation_report import print_prepared
    from finetune.preparing.writing import WRITTEN, refuse_to_replace, write_prepared
    from finetune.reading.sources import refuse_same_file

    if not args.inputs and args.sql is None:
        raise UserError("nothing to read; name a file, a folder, a Hub id, or --sql")
    if args.max_seq_length and not args.tokenizer:
        raise UserError("--max_seq_length counts tokens; say whose with --tokenizer")
    for name in WRITTEN:
        refuse_same_file(args.inputs, Path(args.output, name))
    refuse_to_replace(args.output, overwrite=args.overwrite)
    names = PrepareOptions.__dataclass_fields__
    options = PrepareOptions(**{name: value for name, value in vars(args).items() if name in names} | _reading(args))
    tokenizer, fmt = _tokenizer_and_format(args) if args.tokenizer else (None, None)
    rows = None
    if args.sql is not None:
        from finetune.reading.sql import read_sql

        rows = read_sql(args.sql, query=args.query, table=args.table)
    result = prepare(args.inputs, options, tokenizer=tokenizer, fmt=fmt, rows=rows)
    write_prepared(result, args.output, options, _command_line(args), overwrite=args.overwrite)
    print_prepared(result, Path(args.output))
    return 0


def _command_line(args) -> str:
    """The command as typed, for the dataset card; a password in a database URL is left out."""
    words = ["prepare_data.py", *args.argv]
    if args.sql:
        from finetune.reading.sql import database_url, shown_url

        shown = shown_url(database_url(args.sql, {}))
        words = [word.replace(args.sql, shown) for word in words]
    return shlex.join(words)


def _encode(args) -> int:
    from finetune.encoding.token_files import encode_file

    tokenizer, fmt = _tokenizer_and_format(args)
    flags = {"train_on": args.train_on, "control_tokens": args.control_tokens}
    counts = encode_file(args.input, args.output, tokenizer, fmt, **_reading(args), **flags)
    print(
        f"{counts.total()} rows: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + f" -> {args.output}"
    )
    return 0


def _parse(args) -> int:
    from finetune.encoding.token_files import load_format, load_tokenizer, parse_file

    if args.format in ("native", "auto") and not args.tokenizer:
        raise UserError(f"--format {args.format} needs --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code) if args.tokenizer else None
    fmt, _ = load_format(args.format, tokenizer)
    counts = parse_file(args.input, args.output, fmt)
    print(f"{counts['read']} texts read, {counts['with errors']} with errors, {counts['calls']} calls -> {args.output}")
    return 0


def _show(args) -> int:
    from finetune.encoding.token_files import encoded_rows
    from finetune.preparing.mask_view import show_html, show_terminal
    from finetune.reading.sources import refuse_same_file

    if args.html:
        refuse_same_file(args.inputs, args.html)
    tokenizer, fmt = _tokenizer_and_format(args)
    flags = {"train_on": args.train_on, "control_tokens": args.control_tokens}
    entries = encoded_rows(args.inputs, tokenizer, fmt, first=args.first, number=args.rows, **_reading(args), **flags)
    if args.html:
        show_html(entries, tokenizer, f"{fmt.name}: {', '.join(args.inputs)}", args.html)
        print(f"written: {args.html}")
    else:
        show_terminal(entries, tokenizer)
    return 0


def _audit(args) -> int:
    from rich.console import Console

    from finetune.preparing.audit import audit, print_audit
    from finetune.reading.conversations import load_conversations

    tokenizer, fmt = _tokenizer_and_format(args)
    loaded = load_conversations(args.inputs, limit=args.limit, strict=False, **_reading(args))
    names = (f"{source}, row {row}" for source, row in loaded.origins)
    rows = zip(names, loaded.conversations, strict=True)
    result = audit(rows, tokenizer, fmt, train_on=args.train_on, control_tokens=args.control_tokens)
    result.add_rejected(loaded.rejected)
    print_audit(result, Console())
    return 0 if result.passed else 1


def _generate(args) -> int:
    from finetune.synthetic.generate import generate_files

    names = ("phrasings", "per_tool", "rows", "heldout_rows", "language", "seed", "name", "overwrite")
    for path, counts in generate_files(args.tools, args.output, **{name: getattr(args, name) for name in names}):
        print(f"{path}: {counts.total()} rows (" + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + ")")
    return 0


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    verbs = next(action for action in parser._actions if action.dest == "verb").choices
    if argv and argv[0] not in verbs and argv[0] not in ("-h", "--help"):
        argv.insert(0, "prepare")
    args = parser.parse_args(argv)
    args.argv = argv
    return args.run(args)


if __name__ == "__main__":
    leave_torch_out()
    sys.exit(main())
