"""Loss curves of many training runs in one picture and one table. `python visualize_loss.py --help` has examples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.charts import curves
from finetune.charts.plots import check_picture_type
from finetune.errors import UserError, one_line_errors

DEFAULT_PICTURE = "loss_comparison.png"
EXAMPLES = """examples:
  python visualize_loss.py experiments/*/training_log.csv
  python visualize_loss.py -o comparison.png -s summary.csv experiments
  python visualize_loss.py --x tokens --log-y experiments/*_r8_* experiments/*_r64_*
  python visualize_loss.py --html comparison.html experiments      (one page to open in a browser, no network)
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw the loss curves of training runs side by side and print a summary table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="*", default=["experiments"], metavar="PATH",
        help="training_log.csv files, experiment folders, folders of them, or patterns (default: experiments)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"picture to write: .png, .svg, .pdf (default: {DEFAULT_PICTURE} unless -s or --html is given)",
    )  # fmt: skip
    parser.add_argument("-s", "--summary", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained interactive page")
    parser.add_argument("--x", choices=list(curves.X_COLUMNS), default="step", help="x axis (default: step)")
    parser.add_argument("--log-y", "--log_y", action="store_true", help="logarithmic loss axis")
    parser.add_argument(
        "--smooth", type=int, metavar="N",
        help="draw the centred mean of N logged points; 0 for none (default: 1/25 of each curve, at least 5)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.smooth is not None and options.smooth < 0:
        parser.error("--smooth must not be negative")
    if not (options.output or options.summary or options.html):
        options.output = Path(DEFAULT_PICTURE)
    return options


def check_outputs(outputs: list[Path], logs: list[Path]) -> None:
    """UserError where an output would replace another one or a run's own records, as `-s */training_log.csv` asks."""
    records = {path.resolve() for log in logs for path in (log, log.with_name(curves.CONFIG))}
    taken: set[Path] = set()
    for path in outputs:
        if path.resolve() in records or path.name in (curves.LOG, curves.CONFIG):
            raise UserError(f"{path} is a run's own record; name another file for the output")
        if path.resolve() in taken:
            raise UserError(f"{path} is named for two outputs; give each a file of its own")
        taken.add(path.resolve())


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logs = curves.find_logs(options.paths)
    outputs = [path for path in (options.output, options.summary, options.html) if path]
    check_outputs(outputs, logs)
    if options.output:
        check_picture_type(options.output)

    from finetune.charts.run_labels import compare_runs
    from finetune.charts.tables import print_table, write_summary

    comparison = compare_runs([curves.read_run(log) for log in logs])
    table = [curves.summarize(run) for run in comparison.runs]
    print_table(table)

    replaced = {path for path in outputs if path.exists()}
    if options.summary:
        write_summary(options.summary, comparison, table)
    if not any(row["final_loss"] is not None for row in table):
        raise UserError("none of these runs has logged a loss yet; nothing to draw")
    if options.output:
        from finetune.charts.plots import draw_curves

        draw_curves(comparison, options.output, x=options.x, log_y=options.log_y, smooth=options.smooth)
    if options.html:
        from finetune.charts.curves_page import write_page

        write_page(comparison, table, options.html, x=options.x, log_y=options.log_y, smooth=options.smooth)
    for path in outputs:
        print(f"{'replaced' if path in replaced else 'wrote'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
