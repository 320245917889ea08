"""Many runs of train_lora.py side by side, on this machine or on a Ray cluster, and one chart of them all."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
from math import inf
from pathlib import Path
from typing import Any

from finetune.errors import UserError, one_line_errors
from finetune.flag_types import folder_name, not_negative, positive, text
from finetune.settings import FLAGS, underscored
from finetune.sweep import grid

log = logging.getLogger("sandwich")
EXAMPLES = """Before the --: every flag of train_lora.py with the values to try. After it: the flags of all runs.

examples:
  python sweep_lora.py --rank 4 8 16 32 64 -- --config configs/demo.yaml
  python sweep_lora.py --rank 4 8 16 --lr 1e-4 2e-4 --seeds 3 -- --dataset train.jsonl --eval_fraction 0.05
  python sweep_lora.py --sweep my_sweep.yaml --dry_run            what would be run
  python sweep_lora.py --rank 8 64 --address auto -- --config configs/gennx_qlora.yaml        on a Ray cluster
  python sweep_lora.py --lr 1e-5 1e-4 1e-3 --scheduler asha -- --dataset train.jsonl --eval_steps 20 --eval_fraction 0.1
The same command again goes on with what is missing, and repeats nothing that has finished.
"""
ASHA = "asha"


def build_parser() -> argparse.ArgumentParser:
    """The sweep's own flags, and behind them every flag of train_lora.py that a run may have, with several values."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="sweep_lora.py [--FLAG VALUE ...] [flags of the sweep] -- [flags of every run]",
    )  # fmt: skip
    add = parser.add_argument
    add("--sweep", metavar="FILE", help="YAML with train, grid, runs, random, seeds (docs/sweeps.md)")
    add(
        "--seeds", type=positive(int), metavar="N", help="repeat each run with N seeds; the chart shows mean and spread"
    )
    add("--name", help="name of the sweep's folder; default: from the model, what varies and a hash of all runs")
    add("--experiments_dir", type=Path, default=Path("experiments"), metavar="DIR",
        help="where the sweep's folder is made (default: experiments)")  # fmt: skip
    add("--dry_run", action="store_true", help="print the runs, check their flags, run nothing")
    add("--retries", type=not_negative(int), default=2, metavar="N",
        help="tries after a failure that gets no further, from the last checkpoint (default: 2)")  # fmt: skip
    add("--hang_minutes", type=not_negative(float), default=60.0, metavar="N",
        help="end and try again a run that neither logs nor prints for N minutes; 0: never (default: 60)")  # fmt: skip
    add("--address", type=text, help="a Ray cluster (auto, or host:port); default: Ray on this machine alone")
    add("--gpus_per_run", type=_gpus, metavar="N",
        help="GPUs of a run: 0.5 puts two on a card, 2 starts torchrun (default: 1 where there are any)")  # fmt: skip
    add("--cpus_per_run", type=_part, metavar="N",
        help="CPU cores of a run; fewer put several side by side, faster but each with its own memory "
             "(default: 1 beside a GPU, else all cores of a machine)")  # fmt: skip
    add("--transport", choices=("auto", "shared", "ray"), default="auto",
        help="how results come from other machines (default: auto: through a shared folder, else Ray)")  # fmt: skip
    add(
        "--scratch", metavar="DIR", help="where other machines work when the folder is not shared (default: their /tmp)"
    )
    add("--asha_grace", type=_percent, default=10.0, metavar="PERCENT",
        help="with --scheduler asha: no run is stopped before this share of its steps (default: 10)")  # fmt: skip
    add("--asha_reduction", type=_reduction, default=3.0, metavar="N",
        help="with --scheduler asha: the best 1/N go on at each rung (default: 3)")  # fmt: skip
    add("--command", type=_program, default=[], metavar="PROGRAM",
        help="run this instead of train_lora.py, with the same flags behind it")  # fmt: skip
    group = parser.add_argument_group(
        "values to try",
        "every flag of train_lora.py, see its --help; on or off for a switch, a,b for one list, default",
    )
    for flag in FLAGS:
        if flag.name == "scheduler":
            group.add_argument("--scheduler", nargs="+", action="extend", default=argparse.SUPPRESS, metavar="VALUE",
                               help="asha: stop hopeless runs early (Ray Tune); or schedules to try")  # fmt: skip
        elif not flag.action and flag.name not in grid.RESERVED:
            group.add_argument(f"--{flag.name}", nargs="*" if flag.is_switch else "+", action="extend",
                               default=argparse.SUPPRESS, metavar="VALUE", help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="-- FLAGS", help="flags that every run is given")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    before, after = grid.split_arguments(argv)
    args, unknown = build_parser().parse_known_args([underscored(word) for word in before])
    if unknown or args.words:
        word = [*unknown, *args.words][0]
        raise UserError(f"{word!r} is no flag of the sweep; flags of every run, such as --config, stand behind a --")

    # 1. Which runs. Every value is checked before anything is started.
    schedulers = getattr(args, "scheduler", [])
    asha = ASHA in schedulers
    if asha:
        from finetune.sweep.stopping import rungs

        rungs(args.asha_grace, args.asha_reduction)
        args.scheduler = [name for name in schedulers if name != ASHA]
        if not args.scheduler:
            del args.scheduler
    given = [flag.name for flag in FLAGS if not flag.action and flag.name not in grid.RESERVED]
    values = {name: grid.grid_values(name, getattr(args, name)) for name in given if hasattr(args, name)}
    file = grid.read_file(args.sweep) if args.sweep else {}
    recipe, given = grid.fixed_flags(after)
    values = file.get("grid", {}) | values
    random = file.get("random") or {"flags": {}}
    for name in given:
        if name in values or name in random["flags"]:
            raise UserError(f"--{name} after the --: the sweep varies it; keep one of the two")
    points = grid.make_points(
        file.get("train", {}) | recipe | given, values, runs=file.get("runs", []), draws=grid.draw(file.get("random")),
        seeds=args.seeds or file.get("seeds"),
    )  # fmt: skip
    try:
        folder_name("default" if args.name is None else args.name)
    except ValueError:
        raise UserError(f"--name {args.name!r}: give a {folder_name.__name__}; --experiments_dir says where") from None
    identity = grid.fingerprint(points, {"command": args.command, "asha": asha})
    folder = args.experiments_dir / (args.name or default_name(points, identity))
    if args.dry_run:
        for point in points:
            print(f"{folder / point.name}: train_lora.py {shlex.join(point.arguments())}")
        return 0

    # 2. The folder: a new one, or the same sweep again.
    from rich.console import Console

    from finetune.logs import log_to_file, start_logging
    from finetune.sweep.ray_session import require_ray
    from finetune.sweep.runs import FAILED, INTERRUPTED, RUNNING, SWEEP_LOG, WAITING, now, open_sweep

    require_ray()
    console = Console(stderr=True)
    start_logging(console)
    options = run_options(args)
    sweep = open_sweep(folder, points, identity=identity, argv=argv, settings=vars(options) | {"asha": asha})
    log_to_file(folder / SWEEP_LOG)
    log.info("sweep %s: %d runs, %d of them done", folder, len(points), len(points) - sweep.count(WAITING))
    try:
        # 3. Run what is missing.
        if sweep.count(WAITING):
            run_all(sweep, options, args if asha else None, console)

        # 4. Table, picture, best run.
        from finetune.sweep.summary import write_results

        best = write_results(sweep)
        status = INTERRUPTED if sweep.count(INTERRUPTED, WAITING) else FAILED if sweep.count(FAILED) else "finished"
        sweep.save(status=status, ended=now(), best=vars(best) if best else None)
    except BaseException as error:  # Ray that cannot be started, a second Ctrl-C: nobody runs this any more
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
            log.warning("failed: %s after %d tries: %s; all of it in %s", run.name, len(run.attempts),
                        " | ".join(run.attempts[-1]["lines"][-3:]), sweep.log_path(run))  # fmt: skip
    if best:
        log.info("%s", best.text())
        if best.metric != "eval_loss":
            log.info("(training loss favours large ranks; --eval_fraction or --eval_dataset gives a fair comparison)")
    print(folder)
    if status == INTERRUPTED:
        log.warning("interrupted; the same command again goes on")
        return 130
    return 1 if status == FAILED else 0


def run_all(sweep: Any, options: Any, asha_flags: argparse.Namespace | None, console: Any) -> None:
    """Start Ray, run every run that is not done."""
    from finetune.sweep.ray_runner import RayRunner
    from finetune.sweep.ray_session import ray_session
    from finetune.sweep.table import LiveTable

    # stdout is for the sweep's folder alone; Ray prints there that a machine is gone.
    with contextlib.redirect_stdout(sys.stderr), ray_session(options) as ray:
        asha = None
        if asha_flags is not None:
            from finetune.sweep.stopping import Asha

            flags = [run.point.settings() for run in sweep.runs]
            metric = "eval_loss" if all(one.eval_dataset or one.eval_fraction for one in flags) else "loss"
            asha = Asha(sweep.folder, metric=metric, grace=asha_flags.asha_grace, reduction=asha_flags.asha_reduction)
        RayRunner(ray, sweep, options, LiveTable(console, len(sweep.runs)), asha).run()


def run_options(args: argparse.Namespace) -> Any:
    from finetune.sweep.ray_session import SweepOptions

    return SweepOptions(
        address=None if args.address == "local" else args.address,  # Ray's own word for what is done without a flag
        gpus_per_run=args.gpus_per_run, cpus_per_run=args.cpus_per_run, transport=args.transport,
        scratch=args.scratch and str(Path(args.scratch).absolute()),  # a worker's own folder is a copy of Ray's
        retries=args.retries, command=tuple(args.command), hang_minutes=args.hang_minutes,
    )  # fmt: skip


def default_name(points: list[grid.Point], identity: str) -> str:
    """`sweep_<model>_<what varies>_<hash>`: the same runs have the same folder, however they were written down."""
    varied = list(dict.fromkeys(name for point in points for name in point.varied))
    model = grid.run_label({"model": points[0].settings().model})
    return "_".join(["sweep", model, *varied[:4], identity])


def _program(word: str) -> list[str]:
    words = shlex.split(word)
    if not words:
        raise ValueError
    return words


_program.__name__ = "command line"


def _part(word: str) -> float:
    value = not_negative(float)(word)
    if 0 < value < 0.0001:
        raise argparse.ArgumentTypeError(f"{word}: Ray counts ten-thousandths, and nothing below")
    return value


_part.__name__ = "non-negative number"


def _gpus(word: str) -> float:
    value = _part(word)
    if value > 1 and not value.is_integer():
        raise argparse.ArgumentTypeError(f"{word}: above 1 it must be a whole number")
    return value


_gpus.__name__ = "non-negative number"


def _percent(word: str) -> float:
    value = float(word)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 100")
    return value


_percent.__name__ = "percentage"


def _reduction(word: str) -> float:
    value = float(word)
    if not 1 < value < inf:
        raise argparse.ArgumentTypeError(f"{word} is not a number above 1")
    return value


_reduction.__name__ = "number above 1"


if __name__ == "__main__":
    sys.exit(main())
