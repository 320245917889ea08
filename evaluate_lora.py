"""Is it better? Scores a base model against its tuned self on the same held-out rows, with the same decoding."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.files import write_text_atomic
from finetune.flag_types import not_negative, positive

EXAMPLES = """examples:
  python evaluate_lora.py experiments/RUN --dataset data/samples/gennx_heldout.jsonl
  python evaluate_lora.py experiments/RUN --dataset test.jsonl --limit 20 --only tuned
  python evaluate_lora.py experiments/RUN/checkpoint-200 --dataset test.jsonl --output evaluation_200
  python evaluate_lora.py Qwen/Qwen2.5-1.5B-Instruct --dataset test.jsonl            a model without an adapter
  python evaluate_lora.py experiments/RUN --suite bfcl:simple_python,multiple,irrelevance --limit 100
A killed evaluation goes on where it stopped: give the same command again.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="experiment folder, adapter folder, or model (folder or Hub id)")
    parser.add_argument("--dataset", action="append", default=[], metavar="ROWS", help="held-out rows (repeatable)")
    parser.add_argument("--suite", help="bfcl:CATEGORY,CATEGORY… (package bfcl-eval)")
    parser.add_argument("--only", choices=("base", "tuned", "both"), default="both", help="which model (default: both)")
    parser.add_argument(
        "--limit", type=positive(int), metavar="N", help="only the first N rows (of each suite category)"
    )
    parser.add_argument("--format", help="chat format; default: the one the run was trained with")
    parser.add_argument(
        "--batch_size", type=positive(int), default=64, help="prompts answered side by side (default: 64)"
    )
    parser.add_argument("--max_new_tokens", type=positive(int), metavar="N",
                        help="longest answer (default: 1.5 x the longest gold answer, 64 to 1024)")  # fmt: skip
    parser.add_argument("--temperature", type=not_negative(float), default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/evaluation, or evaluation/MODEL")
    parser.add_argument("--no-share_prefix", dest="share_prefix", action="store_false",
                        help="answer with the model's own generate, for comparison")  # fmt: skip
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.dataset and not args.suite:
        raise UserError("nothing to score: name held-out rows with --dataset, or --suite bfcl:simple_python")

    # 1. What is asked: rows become items before anything slow is imported, so that a bad row shows at once.
    from finetune.evaluation import bfcl
    from finetune.evaluation.items import load_items

    items = load_items(args.dataset, limit=args.limit) if args.dataset else []
    if args.suite:
        items += bfcl.load_items(bfcl.parse_suite(args.suite), limit=args.limit)
    from finetune.runs.find import find_run

    run = find_run(args.model)  # a folder that is none shows now
    folder = output_folder(args)
    say(f"{len(items)} answers to score from {len({(i.source, i.row) for i in items})} rows")

    from finetune.evaluation.folder import exclusive_folder

    with exclusive_folder(folder):
        return evaluate(args, run, items, folder)


def evaluate(args: argparse.Namespace, run: Any, items: list[Any], folder: Path) -> int:
    """Answer the items with the models of `run`, score them, and write everything into `folder`."""
    # 2. Who answers: one model, with its adapter on (tuned) or off (base).
    from finetune.logs import start_logging

    start_logging(_console())
    from finetune.runs.find import load_for_inference

    model, tokenizer, fmt = load_for_inference(args.model, base=args.only == "base")
    from formats import check_tokenizer, get_format

    if args.format:
        fmt = get_format(args.format, tokenizer)
    has_adapter = hasattr(model, "disable_adapter")
    if args.only == "tuned" and not has_adapter:
        raise UserError(f"{args.model} has no adapter; leave --only away to score the model itself")
    sides = ["base", "tuned"] if has_adapter and args.only == "both" else ["tuned" if has_adapter else "base"]

    # 3. The same prompts and decoding for both.
    from finetune.evaluation.answer_settings import answer_settings
    from finetune.evaluation.folder import FILE_PREFIXES, archive_incomparable_scores, describe_items
    from finetune.evaluation.metrics import compute_metrics, paired_differences
    from finetune.evaluation.run import answer_token_limit, make_prompts, run_model
    from finetune.generation.generate import Decoding

    if args.max_new_tokens is None:
        args.max_new_tokens = answer_token_limit(items, tokenizer)
        say(f"--max_new_tokens {args.max_new_tokens}, from the longest gold answer")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and args.max_new_tokens >= room:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: {args.model} holds {room} tokens, prompt and answer")
    prompts = make_prompts(items, tokenizer, fmt, longest=room - args.max_new_tokens if room else None)
    for item, reason in prompts.refused[:5]:
        say(f"not scored: {item.source} row {item.row}, turn {item.turn}: {reason}")
    if not prompts.items:
        raise UserError(f"no prompt can be made of these rows; the first: {prompts.refused[0][1]}")
    decoding = Decoding(tuple(check_tokenizer(tokenizer, fmt)), args.max_new_tokens, args.batch_size,
                        args.temperature, args.seed)  # fmt: skip

    # 4. Answer and score.
    scored, metrics = {}, {}
    for side in sides:
        settings = answer_settings(run, side, model, fmt, decoding)
        with model.disable_adapter() if side == "base" and has_adapter else contextlib.nullcontext():
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

    # 5. Side by side.
    from finetune.evaluation.report import update_model_card, write_report
    from finetune.models.hub import public_name

    compared = paired_differences(scored["base"], scored["tuned"], seed=args.seed) if len(scored) == 2 else {}
    if compared:
        write_json(folder / "comparison.json", compared)
    rows = len({(item.source, item.row) for item in prompts.items})
    sources = ", ".join([*map(public_name, args.dataset), *([args.suite] if args.suite else [])])
    heading = [
        f"{len(prompts.items)} answers of {rows} rows ({sources}), "
        f"format {fmt.name}, {'greedy' if not args.temperature else f'temperature {args.temperature:g}'}, "
        f"at most {args.max_new_tokens} new tokens. Model: {public_name(args.model)}."
    ]
    written = write_report(metrics, compared, heading, folder)
    if scored.keys() == {"base", "tuned"} and args.output is None and args.dataset and not args.limit:
        card = Path(args.model) / "final_model" / "README.md"
        update_model_card(card, (folder / "comparison.md").read_text(encoding="utf-8"))
    show(metrics, compared)
    print(f"\nin {folder}: " + ", ".join(sorted(p.name for p in written)) + ", *_metrics.json, *_results.jsonl")
    return 0


def output_folder(args: argparse.Namespace) -> Path:
    """Where the scores go."""
    path = Path(args.model)
    trained = any((path / name).is_file() for name in ("experiment_config.json", "adapter_config.json"))
    return args.output or (path / "evaluation" if trained else Path("evaluation") / path.name)


def keep_speed(cost: dict[str, Any], path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Speed of this run; when every answer was already there, the speed noted by the run that made them."""
    if not cost["generated_rows"] and path.is_file():
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):  # a file that others wrote
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if {k: v for k, v in earlier["settings"].items() if k != "batch_size"} == settings:
                cost = earlier["generation"]
    speed = {"tokens_per_second": cost["tokens_per_second"]} if cost["tokens_per_second"] is not None else {}
    return {**speed, "generation": cost}


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written aside and renamed."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """A word to the person who waits; results go to stdout, this does not."""
    print(text, file=sys.stderr, flush=True)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def show(metrics: dict[str, dict[str, Any]], compared: dict[str, dict[str, Any]]) -> None:
    """The table of scores on stdout."""
    from rich.console import Console
    from rich.table import Table

    from finetune.evaluation.metrics import metric_names

    table = Table("metric", *({"base": "base", "tuned": "tuned"}[side] for side in metrics))
    if compared:
        table.add_column("difference", justify="right")
        table.add_column("95% interval", justify="right")
    for name in metric_names(metrics):
        values = [m.get(name) for m in metrics.values()]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        if compared:
            cells.append(f"{values[1] - values[0]:+.3f}" if None not in values else "")
            bounds = compared.get(name, {}).get("interval_95")
            cells.append(f"{bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else "")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
