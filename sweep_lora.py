"""Train many runs of train_lora.py in parallel, on this machine or on a Ray cluster, and compare them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.flags.types import (
    FlagParser,
    flags_of,
    folder_name,
    hint,
    nonnegative_float,
    nonnegative_int,
    number_type,
    positive_int,
    text,
)
from finetune.progress import counted, print_text
from finetune.settings import FLAGS
from finetune.sweep import grid
from finetune.sweep.from_largest import largest_points
from formats import FormatError

log = logging.getLogger("sandwich")
EXAMPLES = """Before the --: every flag of train_lora.py with the values to try. After it: the flags of all runs.

examples:
  python sweep_lora.py --rank 4 8 16 32 64 -- --config configs/demo.yaml
  python sweep_lora.py --rank 4 8 16 --lr 1e-4 2e-4 --seeds 3 -- --dataset train.jsonl --eval_fraction 0.05
  python sweep_lora.py --rank 4 8 16 32 64 --from_largest -- --dataset train.jsonl --eval_fraction 0.05
  python sweep_lora.py --sweep my_sweep.yaml --dry_run            what would be run
  python sweep_lora.py --rank 8 64 --address auto -- --config configs/gennx_qlora.yaml        on a Ray cluster
  python sweep_lora.py --lr 1e-5 1e-4 1e-3 --scheduler asha -- --dataset train.jsonl --eval_steps 20 --eval_fraction 0.1
Rerun the same command to resume a sweep; finished runs are not repeated.
"""
ASHA = "asha"
SWEPT_FLAGS = [flag for flag in FLAGS if not flag.action and flag.name not in grid.RESERVED]

# Ray counts in units of 0.0001.
cpu_count = number_type(float, lambda n: n == 0 or 0.0001 <= n < math.inf, "a number >= 0.0001, or 0")
gpu_count = number_type(
    float, lambda n: n == 0 or 0.0001 <= n <= 1 or (1 < n < math.inf and n.is_integer()),
    "0, a number >= 0.0001 and <= 1, or an integer",
)  # fmt: skip
percentage = number_type(float, lambda value: 0 < value < 100, "a number > 0 and < 100")
reduction_factor = number_type(float, lambda value: 1 < value < math.inf, "a number > 1")


def program(word: str) -> list[str]:
    """A program with its first arguments, split as a shell would."""
    try:
        arguments = shlex.split(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a command line, not {word!r} ({error})") from None
    if not arguments:
        raise argparse.ArgumentTypeError("must not be empty")
    return arguments


def build_parser() -> FlagParser:
    """The sweep's own flags, and every flag of train_lora.py that a run may have, with several values."""
    parser = FlagParser(
        description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        usage="sweep_lora.py [--FLAG VALUE ...] [flags of the sweep] -- [flags of every run]",
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument
    add("--sweep", metavar="FILE", help="YAML with train, grid, runs, random, seeds (docs/sweeps.md)")
    add("--seeds", type=positive_int, metavar="N",
        help="repeat each run with N seeds; the chart shows mean and spread")
    add("--from_largest", action="store_true",
        help="of runs that differ only by --rank train the largest, and report the others as its truncations")
    add("--name", type=folder_name, help="name of the sweep's folder; default: from the model, the varied flags and "
        "a hash of all runs")
    add("--experiments_dir", type=Path, default=Path("experiments"), metavar="DIR", help="parent of the sweep's folder")
    add("--dry_run", action="store_true", help="print the runs and check their flags, without running them")
    add("--retries", type=nonnegative_int, default=2, metavar="N",
        help="retries from the last checkpoint after a failure that makes no progress")
    add("--hang_minutes", type=nonnegative_float, default=60.0, metavar="N",
        help="stop and retry a run that neither logs nor prints for N minutes; 0: never")
    add("--force", action="store_true",
        help="continue runs from their checkpoints although package versions differ from those they started with")
    add("--address", type=text, help="a Ray cluster (auto, or host:port); default: Ray on this machine alone")
    add("--gpus_per_run", type=gpu_count, metavar="N",
        help="GPUs per run: 0.5 puts two runs on a GPU, 2 starts torchrun (default: 1 if there are any)")
    add("--cpus_per_run", type=cpu_count, metavar="N", help="CPU cores per run; with fewer, several runs share a "
        "machine, which is faster but takes memory for each (default: 1 with a GPU, else all cores of a machine)")
    add("--transport", choices=("auto", "shared", "ray"), default="auto",
        help="how results come from other machines (default: auto, a shared folder if there is one, else Ray)")
    add("--scratch", metavar="DIR",
        help="working folder on other machines when the sweep's folder is not shared (default: their /tmp)")
    add("--asha_grace", type=percentage, default=10.0, metavar="PERCENT",
        help="with --scheduler asha: percentage of its steps before which no run is stopped")
    add("--asha_reduction", type=reduction_factor, default=3.0, metavar="N",
        help="with --scheduler asha: the best 1/N continue at each rung")
    add("--command", type=program, default=[], metavar="PROGRAM",
        help="run this instead of train_lora.py, with the same flags")
    group = parser.add_argument_group(
        "values to try",
        "every flag of train_lora.py, see its --help; on or off for a switch, a,b for one list, default")
    for flag in SWEPT_FLAGS:
        shown = "asha: stop poor runs early (Ray Tune); or schedules to try"
        group.add_argument(f"--{flag.name}", nargs="*" if flag.is_switch else "+", action="extend", metavar="VALUE",
                           default=argparse.SUPPRESS, help=shown if flag.name == "scheduler" else argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="-- FLAGS", help="flags of every run")
    # fmt: on
    return parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The arguments before the `--`. `scheduler` has no "asha" any more, which is in `asha`."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown or args.words:
        wrong = [*unknown, *args.words][0]
        advice = hint(wrong, [*flags_of(parser), "config"], parser.prog)
        if advice == f"did you mean {wrong}?" or "--config" in advice or "--help" in advice:
            advice = "put flags of every run, such as --config, after a --"
        raise UserError(f"{wrong!r} is not a flag of the sweep; {advice}")
    if not (args.sweep or args.seeds or any(hasattr(args, flag.name) for flag in SWEPT_FLAGS)):
        raise UserError("nothing to vary; give a flag several values, such as --rank 8 16 32, or --seeds or --sweep")
    schedulers = getattr(args, "scheduler", [])
    args.asha = ASHA in schedulers
    if args.asha:
        from finetune.sweep.stopping import rungs

        rungs(args.asha_grace, args.asha_reduction)
        args.scheduler = [name for name in schedulers if name != ASHA]
        if not args.scheduler:
            del args.scheduler
    return args


def make_points(args: argparse.Namespace, arguments_of_every_run: list[str]) -> list[grid.Point]:
    """All runs of the sweep, with every value checked."""
    names = [flag.name for flag in SWEPT_FLAGS if hasattr(args, flag.name)]
    values = {name: grid.grid_values(name, getattr(args, name)) for name in names}
    file = grid.read_file(args.sweep) if args.sweep else {}
    recipe, given = grid.fixed_flags(arguments_of_every_run)
    values = file.get("grid", {}) | values
    random = file.get("random")
    for name in given:
        if name in values or (random and name in random["flags"]):
            raise UserError(f"--{name} after the --: the sweep varies it; keep one of the two")
    points = grid.make_points(
        file.get("train", {}) | recipe | given, values, runs=file.get("runs", []), draws=grid.draw(random),
        seeds=args.seeds or file.get("seeds"),
    )  # fmt: skip
    return largest_points(points) if args.from_largest else points


def check_inputs(points: list[grid.Point]) -> None:
    """UserError for a format, a path to a model, a tools file or the first row of a file that no run could use."""
    from finetune.models.hub import check_path
    from finetune.reading.conversations import load_conversations
    from finetune.reading.sources import parse_spec
    from finetune.reading.tool_schemas import load_tools_file
    from formats import check_format_name

    checked: set[str] = set()
    for point in points:
        settings = point.settings()
        inputs = [settings.format, settings.model, settings.tools, settings.dataset, settings.eval_dataset]
        if repr(inputs) in checked:
            continue
        checked.add(repr(inputs))
        try:
            check_format_name(settings.format)
            check_path(settings.model)
            tools = load_tools_file(settings.tools) if settings.tools else None
            for spec in [*settings.dataset, *(settings.eval_dataset or [])]:
                if parse_spec(spec).path and not load_conversations(spec, limit=1, tools=tools).conversations:
                    raise UserError(f"{spec} has no rows")
        except (UserError, FormatError) as error:
            raise UserError(f"run {point.name}: {error}") from error


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)

    # 1. Decide which runs there are, and check their flags.
    before, after = grid.split_arguments(argv)
    args = parse_arguments(before)
    points = make_points(args, after)
    if not args.command:
        check_inputs(points)
    identity = grid.fingerprint(points, {"command": args.command, "asha": args.asha})
    folder = args.experiments_dir / (args.name or default_name(points, identity))
    if args.dry_run:
        for point in points:
            print_text(f"{folder / point.name}: train_lora.py {shlex.join(point.arguments())}")
        return 0

    # 2. Create the folder, or open it to resume the sweep.
    from rich.console import Console

    from finetune.logs import log_to_file, start_logging
    from finetune.sweep.ray_session import require_ray
    from finetune.sweep.runs import FAILED, INTERRUPTED, RUNNING, SWEEP_LOG, WAITING, now, open_sweep

    require_ray()
    console = Console(stderr=True)
    start_logging(console)
    options = run_options(args)
    sweep = open_sweep(folder, points, identity=identity, argv=argv, settings=vars(options) | {"asha": args.asha})
    log_to_file(folder / SWEEP_LOG)
    log.info("sweep %s: %s, %d of them done", folder, counted(len(points), "run"), len(points) - sweep.count(WAITING))
    try:
        # 3. Train the runs that are not finished.
        if sweep.count(WAITING):
            run_all(sweep, options, args, console)

        # 4. Write the table and the picture, find the best run.
        from finetune.sweep.summary import write_results

        best = write_results(sweep)
        status = INTERRUPTED if sweep.count(INTERRUPTED, WAITING) else FAILED if sweep.count(FAILED) else "finished"
        sweep.save(status=status, ended=now(), best=vars(best) if best else None)
    except BaseException as error:  # Ray cannot be started, or a second Ctrl-C: nothing is running any more
        untouched = sweep.new and all(run.status == WAITING and not run.attempts for run in sweep.runs)
        if untouched and isinstance(error, UserError):
            sweep.discard()
            raise
        for run in sweep.runs:
            run.status = INTERRUPTED if run.status == RUNNING else run.status
        sweep.save(status=INTERRUPTED, ended=now())
        raise
    finally:
        sweep.close()
    for run in sweep.runs:
        if run.status == FAILED:
            attempts = counted(len(run.attempts), "attempt")
            log.warning("failed: %s after %s: %s; full log in %s", run.name, attempts,
                        " | ".join(run.attempts[-1]["lines"][-3:]), sweep.log_path(run))  # fmt: skip
    if best:
        log.info("%s", best.text())
        if best.metric != "eval_loss":
            log.info("(training loss favours large ranks; --eval_fraction or --eval_dataset gives a fair comparison)")
    print_text(folder)
    if status == INTERRUPTED:
        log.warning("interrupted; rerun the same command to resume")
        return 130
    return 1 if status == FAILED else 0


def run_all(sweep: Any, options: Any, args: argparse.Namespace, console: Any) -> None:
    """Start Ray and train every run that is not finished."""
    from finetune.sweep.ray_runner import RayRunner
    from finetune.sweep.ray_session import ray_session
    from finetune.sweep.table import LiveTable

    # Ray prints lost machines to stdout, which is for the sweep's folder.
    with contextlib.redirect_stdout(sys.stderr), ray_session(options) as ray:
        asha = None
        if args.asha:
            from finetune.sweep.stopping import Asha

            metric = "eval_loss" if all(run.point.settings().has_eval for run in sweep.runs) else "loss"
            asha = Asha(sweep.folder, metric=metric, grace=args.asha_grace, reduction=args.asha_reduction)
        RayRunner(ray, sweep, options, LiveTable(console, len(sweep.runs)), asha).run()


def run_options(args: argparse.Namespace) -> Any:
    """The options of the Ray runner."""
    from finetune.sweep.ray_session import SweepOptions

    given = {name: value for name, value in vars(args).items() if name in SweepOptions.__dataclass_fields__}
    return SweepOptions(**given | {
        "address": None if args.address == "local" else args.address,  # Ray's own name for the default
        "scratch": args.scratch and str(Path(args.scratch).absolute()),  # workers have another working folder
        "command": tuple(args.command),
    })  # fmt: skip


def default_name(points: list[grid.Point], identity: str) -> str:
    """`sweep_<model>_<varied flags>_<hash>`: the same runs have the same folder, however they are written."""
    varied = list(dict.fromkeys(name for point in points for name in point.varied))
    model = grid.run_label({"model": points[0].settings().model})
    return "_".join(["sweep", model, *varied[:4], identity])


if __name__ == "__main__":
    sys.exit(main())
