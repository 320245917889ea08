"""Draw the loss curves of training runs side by side and print a summary table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.charts import curves
from finetune.charts.plots import check_picture_type
from finetune.errors import UserError, one_line_errors
from finetune.flags.types import FlagParser, nonnegative_int
from finetune.progress import print_text

DEFAULT_PICTURE = "loss_comparison.png"
EXAMPLES = """examples:
  python visualize_loss.py experiments/*/training_log.csv
  python visualize_loss.py -o comparison.png -s summary.csv experiments
  python visualize_loss.py --x tokens --log_y experiments/*_r8_* experiments/*_r64_*
  python visualize_loss.py --html comparison.html experiments      (one page to open in a browser, no network)
"""


def loss_range(word: str) -> tuple[float, float]:
    """`0.2,1.5` -> (0.2, 1.5)."""
    try:
        low, high = map(float, word.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not -curves.MAX_LOSS < low < high < curves.MAX_LOSS:
        raise argparse.ArgumentTypeError(f"must be two numbers LOW,HIGH with LOW < HIGH, not {word!r}")
    return low, high


def build_parser() -> FlagParser:
    """The parser of visualize_loss.py."""
    parser = FlagParser(description=__doc__, epilog=EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("paths", nargs="*", default=["experiments"], metavar="PATH", help="training_log.csv files, experiment folders, "
        "their parent folders, or patterns (default: experiments); also trainer_state.json, LLaMA-Factory's "
        "trainer_log.jsonl, and CSV exports of TensorBoard and Weights & Biases")
    add("-o", "--output", type=Path, metavar="FILE", help=f"write a picture: .png, .svg or .pdf (default: "
        f"{DEFAULT_PICTURE} unless -s or --html is given)")
    add("-s", "--summary", type=Path, metavar="FILE", help="write the table as CSV")
    add("--html", type=Path, metavar="FILE", help="write one self-contained interactive page")
    add("--x", choices=list(curves.X_COLUMNS), default="step", help="x axis")
    add("--log_y", action="store_true", help="logarithmic loss axis")
    add("--y_range", type=loss_range, metavar="LOW,HIGH", help="loss at the bottom and top of the picture "
        "(default: as much as separates the runs; a steep start or a spike may be above it)")
    add("--seed_bands", action=argparse.BooleanOptionalAction, default=True, help="draw runs that differ only by "
        "their seed as one mean curve in a band of one standard deviation")
    add("--smooth", type=nonnegative_int, metavar="N", help="draw the centered mean of N logged points; 0: no "
        "smoothing (default: 1/25 of each curve, at least 5)")
    # fmt: on
    return parser


def check_outputs(outputs: list[Path], logs: list[Path]) -> None:
    """UserError when an output would overwrite another one or a run's own files, as `-s */training_log.csv` does."""
    run_files = {path.resolve() for log in logs for path in (log, log.with_name(curves.CONFIG))}
    taken: set[Path] = set()
    for path in outputs:
        if path.resolve() in run_files or path.name in (curves.LOG, curves.CONFIG):
            raise UserError(f"{path} belongs to a run and would be overwritten; choose another output file")
        if path.resolve() in taken:
            raise UserError(f"{path} is given for two outputs; choose different files")
        taken.add(path.resolve())


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not (args.output or args.summary or args.html):
        args.output = Path(DEFAULT_PICTURE)
    logs = curves.find_logs(args.paths)
    outputs = [path for path in (args.output, args.summary, args.html) if path]
    check_outputs(outputs, logs)
    if args.output:
        check_picture_type(args.output)

    from finetune.charts.other_logs import read_runs
    from finetune.charts.run_labels import compare_runs
    from finetune.charts.tables import print_table, write_summary

    comparison = compare_runs(read_runs(logs))
    table = [curves.summarize(run) for run in comparison.runs]
    print_table(table)

    replaced = {path for path in outputs if path.exists()}
    if args.summary:
        write_summary(args.summary, comparison, table)
    if not any(row["final_loss"] is not None for row in table):
        raise UserError("none of these runs has logged a loss yet; nothing to draw")
    if args.output:
        from finetune.charts.plots import draw_curves

        draw_curves(
            comparison, args.output, x=args.x, log_y=args.log_y, smooth=args.smooth, repeats=args.seed_bands,
            y_range=args.y_range,
        )  # fmt: skip
    if args.html:
        from finetune.charts.curves_page import write_page

        write_page(comparison, table, args.html, x=args.x, log_y=args.log_y, smooth=args.smooth)
    for path in outputs:
        print_text(f"{'replaced' if path in replaced else 'wrote'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
