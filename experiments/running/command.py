"""What `experiments.run` does with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.reports import summary
from experiments.running import dry
from experiments.running.plan import Workdir, prepare
from experiments.running.runner import Runner
from experiments.spec import registry
from experiments.spec.settings import Text, split_overrides
from lm.errors import Terminated, TrainingStopped, UserError
from lm.sharding import processes

PROG = "python -m experiments.run"


def arguments(argv: Sequence[str], doc: str | None = None) -> tuple[argparse.Namespace, list[tuple[str, Text]]]:
    """The parsed arguments and the overrides."""
    rest, overrides = split_overrides(argv)
    parser = cli.Parser(PROG, doc)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:scale], or the config.json of a run")
    parser.add_argument("--file", type=Path, help="the config file of a config.json, where it is not in the checkout")
    parser.add_argument("--workdir", type=Path, help="run folder (default: runs/NAME-SCALE)")
    parser.add_argument("--arms", help="only these arms, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept from earlier runs")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where several train together")
    parser.add_argument("--processes", type=int, metavar="N", help="how many (1: alone, whatever the scheduler says)")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=processes.HEARTBEAT,
        metavar="SECONDS",
        help="silence after which one counts as dead",
    )
    parsed, unknown = parser.parse_known_args(rest)
    parser.refuse(unknown)
    return parsed, overrides


def run(argv: Sequence[str], doc: str | None = None) -> int:
    """Everything from the arguments to the report; raises `UserError` for any mistake in the input."""
    args, overrides = arguments(argv, doc)
    if args.dry_run:
        processes.check(args.coordinator, args.processes, args.process, args.heartbeat)
    else:
        processes.start(args.coordinator, args.processes, args.process, args.heartbeat)
    source, settings = registry.find(args.config, args.file)
    plan = prepare(settings, overrides, args.arms, absent_is_fine=args.dry_run)
    workdir = Workdir(args.workdir or Path("runs") / f"{plan.exp.name}-{plan.exp.scale}", source.place, plan)
    workdir.check()
    if args.dry_run:
        dry.check(plan, source, workdir, args.processes or 1)
        print(summary.plan(plan, workdir.path))
        return 0
    try:
        runner = Runner(plan, source, workdir, args.fresh)
        with processes.watched():
            runner.all()
    except (UserError, TrainingStopped, Terminated):
        raise
    except Exception:
        processes.unexpected()
        raise
    return 0
