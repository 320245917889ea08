"""Prepare rows for training: normalise, check, split, and look at their tokens."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.flags.types import FlagParser, folder_name, positive_int
from finetune.packages import hide_torch
from finetune.progress import counted, print_text, say

EXAMPLES = """examples:
  prepare_data.py rows.jsonl more.parquet --output data/processed        normalise, check, split 80/10/10
  prepare_data.py faq.csv --map frage=prompt --map antwort=completion --output data/faq
  prepare_data.py NotoriousH2/instructkr-apigen --output data/apigen --tokenizer MODEL --max_seq_length 9000
  prepare_data.py --sql postgresql://localhost/logs --table query_logs --tools tools.json --output data/logs
  prepare_data.py encode --tokenizer Qwen/Qwen2.5-1.5B-Instruct --format qwen rows.jsonl out.jsonl
  prepare_data.py parse --format qwen texts.jsonl out.jsonl              generated text back to calls
  prepare_data.py show --tokenizer smollm2-135m --format chatml data/processed --rows 3 --html page.html
  prepare_data.py audit --tokenizer smollm2-135m --format chatml data/processed
  prepare_data.py generate --tools tools.json --per_tool 32 --output data/generated     rows from tool schemas
`prepare` is the default verb. Each verb has its own --help.
Fields of --map: messages, tools, system, prompt, context, history, completion, answers, correct_answer,
ground_truth, tool, parameters, reasoning, chat, text, turns; COLUMN.KEY reads a part of a column that is an object.
"""
PREPARE_EXAMPLES = """A source is a .jsonl, .json, .csv, .tsv, .parquet or .arrow file (also .gz), a folder of
splits, or a Hub dataset.
Files in --output: train.jsonl, validation.jsonl, test.jsonl, rejected.jsonl, dataset_card.md, two pictures.
examples:
  prepare_data.py rows.jsonl --output data/processed
  prepare_data.py faq.csv --map frage=prompt --map antwort=completion --output data/faq --split 90/5/5 --dedupe
  prepare_data.py --sql sqlite:///logs.db --query "SELECT question, tool, parameters FROM log" --tools tools.json \\
      --output data/logs
"""
ENCODE_EXAMPLES = """Output, one line per row, in order: {"row", "status": "ok|split|refused", "reason",
"sequences": [{"text", "input_ids", "labels"}]}. Needs neither torch nor a GPU.
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
GENERATE_EXAMPLES = """Files in --output: train.jsonl and heldout.jsonl (Korean: train_ko.jsonl, heldout_ko.jsonl);
their requests are worded differently. The same seed gives the same bytes on every machine.
examples:
  prepare_data.py generate --tools tools.json --per_tool 32 --language en --seed 1 --output data/generated
  prepare_data.py generate --tools data/samples/gennx_tool_schemas_tier1.json --seed 7 --output /tmp/samples \\
      --phrasings data/samples/gennx_phrasings_en.json --rows 384 --heldout_rows 100 --name gennx
"""
VERBS = ("prepare", "encode", "parse", "show", "audit", "generate")


# fmt: off
def build_parser() -> FlagParser:
    """The parser of prepare_data.py. Each verb sets `run`, a function from the arguments to an exit status."""
    parser = FlagParser(prog="prepare_data.py", description=__doc__, epilog=EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add_verb(run: Callable[[argparse.Namespace], int], summary: str, epilog: str) -> FlagParser:
        verb = verbs.add_parser(run.__name__, help=summary, description=summary, epilog=epilog)
        verb.set_defaults(run=run)
        return verb

    verb = add_verb(prepare, "normalise, check and split rows (the default verb)", PREPARE_EXAMPLES)
    add = verb.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file, folder or Hub id org/name:config@split")
    add("--output", metavar="DIR", required=True, help="folder for the splits and the dataset card")
    add("--overwrite", action="store_true", help="replace the splits already in --output")
    add_reading_flags(verb)
    add("--sql", nargs="?", const="", metavar="URL", help="also read a database; without a URL: $DATABASE_URL, or "
        "PostgreSQL by POSTGRES_HOST, _PORT, _DB, _USER, _PASSWORD")
    add("--query", metavar="SELECT", help="the query for --sql")
    add("--table", help="a complete table instead of --query (default: query_logs)")
    add("--where", action="append", metavar="COLUMN=VALUE", help="only rows with this value; repeatable")
    add("--include_rejected", action="store_true", help="keep rows whose answer is marked as a bad one (label: false)")
    add("--strict", action="store_true", help="stop at the first bad row instead of rejecting it")
    add("--dedupe", action="store_true", help="also reject near-duplicates (exact ones always are)")
    add("--split", help="ratio of train/validation/test (default: 80/10/10); each must get a row")
    add("--seed", type=int, default=0, help="seed of the split")
    add("--limit", type=positive_int, help="use only the first N good rows of each source")
    add_format_flags(verb, required=False)
    add("--max_seq_length", type=positive_int, help="maximum length of a row in tokens; needs --tokenizer")
    add("--overlong", default="drop", choices=("drop", "trim_turns", "error"),
        help="longer rows: reject them, remove their oldest turns, or stop")
    add("--num_proc", type=positive_int, help="tokenizer processes (default: as many as are useful)")

    verb = add_verb(encode, "rows to text, input_ids and labels, one line per row", ENCODE_EXAMPLES)
    verb.add_argument("input", metavar="rows.jsonl")
    verb.add_argument("output", metavar="out.jsonl")
    verb.add_argument("--overwrite", action="store_true", help="replace out.jsonl even if this verb did not write it")
    add_format_flags(verb)
    add_reading_flags(verb)

    add = add_verb(parse, "generated texts to content and calls, one line per row", PARSE_EXAMPLES).add_argument
    add("input", metavar="texts.jsonl")
    add("output", metavar="out.jsonl")
    add("--overwrite", action="store_true", help="replace out.jsonl even if this verb did not write it")
    add("--format", required=True, metavar="F", help="format name or YAML file, or native")
    add("--tokenizer", metavar="DIR_OR_ID", help="only for --format native or auto")
    add("--trust_remote_code", action="store_true", help="run code from the tokenizer's repository")

    verb = add_verb(show, "rows with their trained tokens in color", SHOW_EXAMPLES)
    verb.add_argument("inputs", nargs="+", metavar="INPUT")
    add_format_flags(verb)
    add_reading_flags(verb)
    verb.add_argument("--first", type=positive_int, default=1, metavar="N", help="start with the N-th row")
    verb.add_argument("--rows", type=positive_int, default=5, metavar="N", help="number of rows")
    verb.add_argument("--html", metavar="FILE", help="write one self-contained page instead")

    verb = add_verb(audit, "statistics and assertions on the trained tokens of a dataset", AUDIT_EXAMPLES)
    verb.add_argument("inputs", nargs="+", metavar="INPUT")
    add_format_flags(verb)
    add_reading_flags(verb)
    verb.add_argument("--limit", type=positive_int, help="use only the first N rows of each source")

    add = add_verb(generate, "training and held-out rows from tool schemas", GENERATE_EXAMPLES).add_argument
    add("--tools", metavar="FILE", required=True, help="JSON file with tool schemas")
    add("--output", metavar="DIR", required=True, help="folder for the two files")
    add("--phrasings", metavar="FILE", help="phrasing file for these tools (default: generic wording)")
    add("--per_tool", type=number_or_file, default=32, metavar="N_OR_FILE", help="training requests per tool, or "
        'a JSON file of tiers: {"TIER": {"rows": N, "tools": [NAME, …]}, …}')
    add("--rows", type=positive_int, metavar="N", help="training rows in total, instead of --per_tool")
    add("--heldout_rows", type=positive_int, metavar="N", help="held-out rows (default: a third of the training rows)")
    add("--language", choices=("en", "ko"), default="en", help="language of the generic wording")
    add("--reasons", action="store_true", help="write beside each call why it is made (for --format tool-reasoning)")
    add("--seed", type=int, default=0, help="the same seed gives the same bytes")
    add("--name", type=folder_name, help="prefix of the file names")
    add("--overwrite", action="store_true", help="replace files already in --output")
    return parser


def number_or_file(word: str) -> int | str:
    """A number of at least 1, or the name of a .json or .yaml file."""
    return word if word.endswith((".json", ".yaml", ".yml")) else positive_int(word)


def add_reading_flags(parser: FlagParser) -> None:
    """Flags of all verbs that read rows."""
    add = parser.add_argument
    add("--map", action="append", metavar="COLUMN=FIELD", help="read a column as this field; repeatable")
    add("--tools", metavar="FILE", help="JSON file with tool schemas for rows without their own")


def add_format_flags(parser: FlagParser, *, required: bool = True) -> None:
    """Flags of all verbs that encode rows; `required` is whether they need a tokenizer."""
    add = parser.add_argument
    add("--tokenizer", required=required, metavar="DIR_OR_ID", help="folder, Hub id or smollm2-135m")
    add("--format", default="auto", metavar="F", help="format name, YAML file, native or auto")
    add("--train_on", default="all", choices=("all", "last"), help="assistant turns to train on")
    add("--control_tokens", default="escape", choices=("escape", "error", "allow"),
        help="control tokens inside message contents: escape them, stop, or keep them")
    add("--reasoning", default="keep", choices=("keep", "drop", "refuse"),
        help="reasoning of answers: keep (omitted with a warning where the template has no place for it), drop, or "
        "refuse rows whose reasoning would be omitted")
    add("--train_reasoning", default="on", choices=("on", "off"),
        help="train the reasoning of answers, or only what follows it")
    add("--allow_unreadable_calls", action="store_true", help="keep rows with calls that the format cannot read back")
    add("--trust_remote_code", action="store_true", help="run code from the tokenizer's repository")
# fmt: on


def reading_options(args: argparse.Namespace) -> dict:
    """Options of the functions that read rows."""
    from finetune.reading.shapes import parse_map
    from finetune.reading.tool_schemas import load_tools_file

    return {"column_map": parse_map(args.map), "tools": load_tools_file(args.tools) if args.tools else None}


def load_tokenizer_and_format(args: argparse.Namespace) -> tuple:
    """The tokenizer and the format that fits it."""
    from finetune.encoding.token_files import load_format, load_tokenizer
    from formats import check_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    fmt, why = load_format(args.format, tokenizer)
    check_tokenizer(tokenizer, fmt)
    say(f"format {fmt.name} ({why})")
    return tokenizer, fmt


def prepare(args: argparse.Namespace) -> int:
    """Write splits, rejected rows and the dataset card."""
    from finetune.encoding.options import EncodingOptions
    from finetune.models.loading import known_positions
    from finetune.preparing import preparation
    from finetune.preparing.preparation_report import print_prepared
    from finetune.preparing.writing import WRITTEN, refuse_to_replace, write_prepared, write_rejected
    from finetune.reading.row_filter import parse_where
    from finetune.reading.sources import refuse_same_file

    if not args.inputs and args.sql is None:
        raise UserError("nothing to read; name a file, a folder, a Hub id, or --sql")
    if args.max_seq_length and not args.tokenizer:
        raise UserError("--max_seq_length counts tokens; add --tokenizer")
    for name in WRITTEN:
        refuse_same_file(args.inputs, Path(args.output, name))
    refuse_to_replace(args.output, overwrite=args.overwrite)
    names = preparation.PrepareOptions.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and (name != "split" or value)}
    given |= reading_options(args) | {"where": parse_where(args.where), "encoding": EncodingOptions.of(args)}
    options = preparation.PrepareOptions(**given)
    tokenizer, fmt = load_tokenizer_and_format(args) if args.tokenizer else (None, None)
    if args.tokenizer:
        options.model_positions = known_positions(args.tokenizer, args.trust_remote_code)
    rows = None
    if args.sql is not None:
        from finetune.reading.sql import read_sql

        rows = read_sql(args.sql, query=args.query, table=args.table)
    try:
        result = preparation.prepare(args.inputs, options, tokenizer=tokenizer, fmt=fmt, rows=rows)
    except preparation.NoRowsLeftError as error:
        if error.rejected:
            raise UserError(f"{error}; all reasons: {write_rejected(error.rejected, args.output)}") from error
        raise
    if args.split and result.empty_splits:
        raise UserError(
            f"--split {args.split}: {' and '.join(result.empty_splits)} would get no row; add rows, give a larger "
            "share, or omit --split"
        )
    write_prepared(result, args.output, options, command_line(args), overwrite=args.overwrite)
    print_prepared(result, Path(args.output))
    return 0


def command_line(args: argparse.Namespace) -> str:
    """The command for the dataset card: as typed, without a URL's password, a query and this machine's folders."""
    arguments = ["prepare_data.py", *args.argv]
    if args.query:
        hidden = {args.query: "…", f"--query={args.query}": "--query=…"}
        arguments = [hidden.get(argument, argument) for argument in arguments]
    if args.sql:
        from finetune.reading.sql import database_url, shown_url

        shown = shown_url(database_url(args.sql, {}))
        arguments = [argument.replace(args.sql, shown) for argument in arguments]
    return shlex.join(map(_without_folders, arguments))


def _without_folders(argument: str) -> str:
    from finetune.models.hub import is_local_path, public_name

    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = value.rsplit("*", 1)[0]
    if any(map(str.isspace, value)) and not is_local_path(path):  # text, such as a system message
        return argument
    return f"{flag}{equals}{public_name(value) if value else ''}"


def encode(args: argparse.Namespace) -> int:
    """Write texts, input_ids and labels."""
    from finetune.encoding.options import EncodingOptions
    from finetune.encoding.token_files import encode_file
    from finetune.models.loading import known_positions
    from finetune.preparing.checks import refusal

    tokenizer, fmt = load_tokenizer_and_format(args)
    counts = encode_file(
        args.input, args.output, tokenizer, fmt, EncodingOptions.of(args), check=refusal, overwrite=args.overwrite,
        positions=known_positions(args.tokenizer, args.trust_remote_code), **reading_options(args),
    )  # fmt: skip
    statuses = ", ".join(f"{n} {status}" for status, n in counts.items())
    print_text(f"{counted(counts.total(), 'row')}: {statuses} -> {args.output}")
    return 0


def parse(args: argparse.Namespace) -> int:
    """Write contents and calls of generated texts."""
    from finetune.encoding.token_files import load_format, load_tokenizer, parse_file

    if args.format in ("auto", "native", "native-tools") and not args.tokenizer:
        raise UserError(f"--format {args.format} needs --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code) if args.tokenizer else None
    fmt, _ = load_format(args.format, tokenizer)
    counts = parse_file(args.input, args.output, fmt, overwrite=args.overwrite)
    texts, calls = counted(counts["read"], "text"), counted(counts["calls"], "call")
    print_text(f"{texts} read, {counts['with errors']} with errors, {calls} -> {args.output}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Show rows with their trained tokens."""
    from finetune.encoding.options import EncodingOptions
    from finetune.encoding.token_files import encoded_rows
    from finetune.preparing.checks import refusal
    from finetune.preparing.mask_view import show_html, show_terminal
    from finetune.reading.sources import refuse_same_file

    if args.html:
        refuse_same_file(args.inputs, args.html)
    tokenizer, fmt = load_tokenizer_and_format(args)
    entries = encoded_rows(
        args.inputs, tokenizer, fmt, EncodingOptions.of(args), first=args.first, number=args.rows, check=refusal,
        **reading_options(args),
    )  # fmt: skip
    if args.html:
        show_html(entries, tokenizer, f"{fmt.name}: {', '.join(args.inputs)}", args.html)
        print_text(f"written: {args.html}")
    else:
        show_terminal(entries, tokenizer)
    return 0


def audit(args: argparse.Namespace) -> int:
    """Print statistics and assertions; 1 when an assertion fails."""
    from rich.console import Console

    from finetune.encoding.options import EncodingOptions
    from finetune.models.loading import known_positions
    from finetune.preparing import audit as audits
    from finetune.reading.conversations import load_conversations

    tokenizer, fmt = load_tokenizer_and_format(args)
    loaded = load_conversations(args.inputs, limit=args.limit, strict=False, **reading_options(args))
    names = (f"{source}, row {row}" for source, row in loaded.origins)
    rows = zip(names, loaded.conversations, strict=True)
    positions = known_positions(args.tokenizer, args.trust_remote_code)
    result = audits.audit(rows, tokenizer, fmt, EncodingOptions.of(args), positions=positions)
    result.add_rejected(loaded.rejected)
    audits.print_audit(result, Console())
    return 0 if result.passed else 1


def generate(args: argparse.Namespace) -> int:
    """Write rows made from tool schemas."""
    from finetune.synthetic.generate import generate_files

    names = ("phrasings", "per_tool", "rows", "heldout_rows", "language", "reasons", "seed", "name", "overwrite")
    if args.reasons and args.phrasings:
        raise UserError("--reasons is for the generic wording; write `reasoning` into the file of --phrasings")
    for path, counts in generate_files(args.tools, args.output, **{name: getattr(args, name) for name in names}):
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        print_text(f"{path}: {counted(counts.total(), 'row')} ({kinds})")
    return 0


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in (*VERBS, "-h", "--help"):
        argv.insert(0, "prepare")
    args = build_parser().parse_args(argv)
    args.argv = argv
    return args.run(args)


if __name__ == "__main__":
    hide_torch()
    sys.exit(main())
