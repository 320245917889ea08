"""Score a base model and its tuned version on the same held-out rows, with the same decoding."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.files import write_json
from finetune.flags.types import FlagParser, nonnegative_float, positive_int, positive_ints
from finetune.progress import counted, print_text, say
from formats import check_format_name, check_tokenizer

DEFAULT_TOLERANCE = 0.01
EXAMPLES = """examples:
  python evaluate_lora.py experiments/RUN --dataset data/samples/gennx_heldout.jsonl
  python evaluate_lora.py experiments/RUN --dataset test.jsonl --limit 20 --only tuned
  python evaluate_lora.py experiments/RUN/checkpoint-200 --dataset test.jsonl --output evaluation_200
  python evaluate_lora.py Qwen/Qwen2.5-1.5B-Instruct --dataset test.jsonl            a model without an adapter
  python evaluate_lora.py experiments/RUN --suite bfcl:simple_python,multiple,irrelevance --limit 100
  python evaluate_lora.py experiments/RUN --suite when2call:when2call_test_mcq.jsonl --decisions   by likelihood
  python evaluate_lora.py experiments/RUN --ranks 2,4,8 --dataset test.jsonl         would a smaller rank have done?
  python evaluate_lora.py experiments/RUN --suspects 50                              training rows that may be wrong
Rerun the same command to resume a killed evaluation.
"""


def build_parser() -> FlagParser:
    """The parser of evaluate_lora.py."""
    parser = FlagParser(description=__doc__, epilog=EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("model", help="experiment folder, adapter folder, or model (folder or Hub id)")
    add("--dataset", action="append", default=[], metavar="ROWS", help="held-out rows (repeatable)")
    add("--tools", metavar="FILE", help="JSON file with tool schemas for rows without their own")
    add("--suite", help="bfcl:CATEGORY,CATEGORY… (package bfcl-eval), functionchat:FOLDER, acebench:FOLDER or "
        "when2call:FILE")
    add("--decisions", action="store_true", help="generate nothing: choose between the call, another call, asking back "
        "and declining by likelihood")
    add("--only", choices=("base", "tuned", "both"), default="both", help="which model to score")
    add("--ranks", type=positive_ints, metavar="N,N", help="loss, and with --dataset scores, of the adapter cut to "
        "these ranks; without --dataset the run's own evaluation rows count")
    add("--suspects", type=positive_int, metavar="N", help="list the N training rows that the run fits least")
    add("--tolerance", type=nonnegative_float, help="with --ranks: how much worse a smaller rank may be, in nats "
        f"of loss and as a share of the answers (default: {DEFAULT_TOLERANCE})")
    add("--limit", type=positive_int, metavar="N", help="use only the first N rows (of each suite category)")
    add("--format", help="chat format (default: the format of the run)")
    add("--batch_size", type=positive_int, default=64, help="prompts to answer in one batch")
    add("--max_new_tokens", type=positive_int, metavar="N",
        help="maximum length of an answer (default: 1.5 x the longest gold answer, 64 to 1024)")
    add("--temperature", type=nonnegative_float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--seed", type=int, default=0, help="seed of the sampling and the bootstrap")
    add("--output", type=Path, metavar="FOLDER", help="output folder (default: RUN/evaluation, or evaluation/MODEL)")
    add("--share_prefix", action=argparse.BooleanOptionalAction, default=True,
        help="compute shared prompt prefixes once; off: use the model's own generate")
    add("--trust_remote_code", action="store_true",
        help="run code from the base model's repository; only for models that you trust")
    # fmt: on
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)

    # 1. Read the rows and find the run before anything slow is imported, so that mistakes show at once.
    from finetune.evaluation.items import load_items
    from finetune.evaluation.suites import load_suite
    from finetune.reading.tool_schemas import load_tools_file
    from finetune.runs.find import find_run

    tools = load_tools_file(args.tools) if args.tools else None
    items = load_items(args.dataset, limit=args.limit, tools=tools) if args.dataset else []
    if args.suite:
        items += load_suite(args.suite, limit=args.limit)
    if args.format:
        check_format_name(args.format)
    run = find_run(args.model, trust_remote_code=args.trust_remote_code)
    folder = output_folder(args)
    if items:
        say(f"{counted(len(items), 'answer')} to score from {counted(len({(i.source, i.row) for i in items}), 'row')}")

    from finetune.evaluation.folder import exclusive_folder

    with exclusive_folder(folder):
        reports = {report_ranks: args.ranks, decide: args.decisions, list_suspects: args.suspects}
        report = next((report for report, wanted in reports.items() if wanted), evaluate)
        return report(args, run, items, folder)


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    given = {
        "--suspects": args.suspects, "--ranks": args.ranks, "--decisions": args.decisions, "--suite": args.suite,
        "--only": args.only != "both", "--dataset": args.dataset,
    }  # fmt: skip
    excluded = {"--suspects": given.keys() - {"--suspects"}, "--ranks": {"--suite", "--only", "--decisions"}}
    for flag, others in excluded.items():
        if given[flag] and (other := next((one for one in given if one in others and given[one]), None)):
            raise UserError(f"{flag} and {other} exclude each other; omit one of them")
    unused = {"--limit": args.limit, "--tools": args.tools, "--max_new_tokens": args.max_new_tokens}
    if args.suspects and (flag := next((flag for flag, value in unused.items() if value), None)):
        raise UserError(f"--suspects lists rows of the whole training data; omit {flag}")
    if args.tolerance is not None and not args.ranks:
        raise UserError("--tolerance needs --ranks")
    if not args.dataset and not args.suite and not args.ranks and not args.suspects:
        raise UserError("nothing to score; name held-out rows with --dataset, or use --suite bfcl:simple_python")


def evaluate(args: argparse.Namespace, run: Any, items: list[Any], folder: Path) -> int:
    """Answer the items with the models of `run`, score them, and write everything into `folder`."""
    # 2. Load one model, whose adapter is switched on (tuned) or off (base).
    model, tokenizer, fmt = load_model(args, base=args.only == "base")
    sides = sides_of(model, args)

    # 3. Make the prompts and the decoding, the same for both.
    from finetune.evaluation.answer_settings import answer_settings
    from finetune.evaluation.folder import FILE_PREFIXES, adapter_of, archive_incomparable_scores, describe_items
    from finetune.evaluation.metrics import compute_metrics, paired_differences
    from finetune.evaluation.run import run_model

    prompts, decoding = make_prompts_and_decoding(args, items, model, tokenizer, fmt)

    # 4. Generate the answers and score them.
    scored, metrics = {}, {}
    for side in sides:
        settings = answer_settings(run, side, model, fmt, decoding)
        with adapter_of(side, model):
            scored[side], cost = run_model(
                model, tokenizer, fmt, prompts, decoding, folder / f"{FILE_PREFIXES[side]}_results.jsonl", settings,
                name=side, say=say, share_prefix=args.share_prefix,
            )  # fmt: skip
        metrics[side] = {
            **compute_metrics(scored[side], seed=args.seed),
            "not_scored": len(prompts.refused),
            "data": describe_items(prompts.items),
            "settings": {**settings, "batch_size": args.batch_size},
            **keep_speed(cost, folder / f"{FILE_PREFIXES[side]}_metrics.json", settings),
        }
        write_json(folder / f"{FILE_PREFIXES[side]}_metrics.json", metrics[side])

    archive_incomparable_scores(folder, metrics, say)

    # 5. Compare and report.
    from finetune.evaluation.report import one_request, update_model_card, write_report
    from finetune.models.hub import public_name
    from finetune.terminal_tables import print_markdown

    compared = paired_differences(scored["base"], scored["tuned"], seed=args.seed) if len(scored) == 2 else {}
    if compared:
        write_json(folder / "comparison.json", compared)
    rows = len({(item.source, item.row) for item in prompts.items})
    heading = [
        f"{counted(len(prompts.items), 'answer')} of {counted(rows, 'row')} ({source_names(args)}), "
        f"format {fmt.name}, {'greedy' if not args.temperature else f'temperature {args.temperature:g}'}, "
        f"at most {counted(args.max_new_tokens, 'new token')}. Model: {public_name(args.model)}."
    ]
    written = write_report(metrics, compared, heading, folder)
    comparison = (folder / "comparison.md").read_text(encoding="utf-8")
    if run.experiment is not None and len(scored) == 2 and args.output is None and args.dataset and not args.limit:
        card = Path(args.model) / "final_model" / "README.md"
        update_model_card(card, comparison)
    print_markdown(comparison)
    if len(scored) == 2:
        print_text(f"\nOne request, side by side:\n{one_request(scored)}")
    print_text(
        f"\nwritten to {folder}: " + ", ".join(sorted(p.name for p in written)) + ", *_metrics.json, *_results.jsonl"
    )
    return 0


def sides_of(model: Any, args: argparse.Namespace) -> list[str]:
    """Which of "base" and "tuned" to score."""
    has_adapter = hasattr(model, "disable_adapter")
    if args.only == "tuned" and not has_adapter:
        raise UserError(f"{args.model} has no adapter; omit --only to score the model itself")
    return ["base", "tuned"] if has_adapter and args.only == "both" else ["tuned" if has_adapter else "base"]


def source_names(args: argparse.Namespace) -> str:
    """Datasets and suite of the command line, for a heading."""
    from finetune.models.hub import public_name

    suite, _, what = (args.suite or "").partition(":")
    suites = [f"{suite}:{public_name(what)}" if what else suite] if suite else []
    return ", ".join([*map(public_name, args.dataset), *suites])


def decide(args: argparse.Namespace, run: Any, items: list[Any], folder: Path) -> int:
    """Let the models of `run` choose between answers by likelihood and write the report into `folder`."""
    from finetune.evaluation.decisions import report_decisions
    from finetune.models.limits import context_limit
    from finetune.terminal_tables import print_markdown

    model, tokenizer, fmt = load_model(args, base=args.only == "base")
    report = report_decisions(
        run, model, tokenizer, fmt, items, sides_of(model, args), folder, longest=context_limit(model),
        sources=source_names(args), seed=args.seed,
    )  # fmt: skip
    print_markdown(report)
    print_text(f"\nwritten to {folder}: comparison.md, *_metrics.json, *_decisions.jsonl")
    return 0


def load_model(args: argparse.Namespace, *, base: bool = False) -> tuple[Any, Any, Any]:
    """(model, tokenizer, format) of the command line."""
    from finetune.logs import start_logging
    from finetune.runs.find import load_for_inference

    start_logging()
    return load_for_inference(args.model, base=base, format_name=args.format, trust_remote_code=args.trust_remote_code)


def make_prompts_and_decoding(
    args: argparse.Namespace, items: list[Any], model: Any, tokenizer: Any, fmt: Any
) -> tuple[Any, Any]:
    """The prompts of the items that have one, and how they are answered."""
    from finetune.evaluation.run import answer_token_limit, make_prompts
    from finetune.generation.generate import Decoding
    from finetune.models.limits import context_limit

    if args.max_new_tokens is None:
        args.max_new_tokens = answer_token_limit(items, tokenizer)
        say(f"--max_new_tokens {args.max_new_tokens}, from the longest gold answer")
    room = context_limit(model)
    if room and args.max_new_tokens >= room:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens}: {args.model} has room for {room} tokens, prompt and answer"
        )
    prompts = make_prompts(items, tokenizer, fmt, longest=room - args.max_new_tokens if room else None)
    for item, reason in prompts.refused[:5]:
        say(f"not scored: {item.source} row {item.row}, turn {item.turn}: {reason}")
    if not prompts.items:
        raise UserError(f"no row gives a prompt; the first: {prompts.refused[0][1]}")
    return prompts, Decoding(tuple(check_tokenizer(tokenizer, fmt)), args.max_new_tokens, args.batch_size,
                             args.temperature, args.seed)  # fmt: skip


def report_ranks(args: argparse.Namespace, run: Any, items: list[Any], folder: Path) -> int:
    """Measure the adapter cut to --ranks and write the report into `folder`."""
    from finetune.evaluation.answer_settings import answer_settings
    from finetune.evaluation.rank_losses import check_ranks
    from finetune.evaluation.rank_report import measure_ranks, ranks_markdown, write_rank_report
    from finetune.terminal_tables import print_markdown

    check_ranks(run, args.ranks, args.dataset, "--ranks")
    model, tokenizer, fmt = load_model(args)
    prompts, decoding = make_prompts_and_decoding(args, items, model, tokenizer, fmt) if items else (None, None)
    settings = answer_settings(run, "tuned", model, fmt, decoding)
    report = measure_ranks(
        run, model, tokenizer, fmt, args.ranks, datasets=args.dataset, limit=args.limit, prompts=prompts,
        decoding=decoding, settings=settings, folder=folder, share_prefix=args.share_prefix,
        tolerance=DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance, say=say,
    )  # fmt: skip
    written = write_rank_report(report, folder)
    print_markdown(ranks_markdown(report))
    print_text(f"\nwritten to {folder}: " + ", ".join(path.name for path in written))
    return 0


def list_suspects(args: argparse.Namespace, run: Any, items: list[Any], folder: Path) -> int:
    """Write the training rows that the run fits least into `folder`."""
    from finetune.evaluation.suspects import check_suspects, report_suspects
    from finetune.terminal_tables import print_markdown

    check_suspects(run)
    written, table = report_suspects(run, *load_model(args), args.suspects, folder)
    print_markdown(table)
    print_text(f"\nwritten to {folder}: " + ", ".join(path.name for path in written))
    return 0


def output_folder(args: argparse.Namespace) -> Path:
    """The folder for the scores."""
    path = Path(args.model)
    inner = "decisions" if args.decisions else ""
    is_run = any((path / name).is_file() for name in ("experiment_config.json", "adapter_config.json"))
    if args.output or not is_run:
        return args.output or Path("evaluation") / path.name / inner
    from finetune.runs.experiment import refuse_links

    refuse_links(path / "evaluation", owner=path)
    return path / "evaluation" / inner


def keep_speed(cost: dict[str, Any], path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Speed of this run; if it reused all answers, the speed recorded by the run that generated them."""
    if not cost["generated_rows"] and path.is_file():
        # A file that this script did not write is ignored.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            earlier = json.loads(path.read_text(encoding="utf-8"))
            is_same = {k: v for k, v in earlier["settings"].items() if k != "batch_size"} == settings
            if is_same and isinstance(earlier["generation"]["tokens_per_second"], int | float | None):
                cost = earlier["generation"]
    speed = {"tokens_per_second": cost["tokens_per_second"]} if cost["tokens_per_second"] is not None else {}
    return {**speed, "generation": cost}


if __name__ == "__main__":
    sys.exit(main())
