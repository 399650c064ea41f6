"""What `experiments.sweep` does with its arguments."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.running.cache import claim_json
from experiments.spec import registry
from experiments.spec.settings import Text, split_overrides
from experiments.sweeps import local, points
from experiments.sweeps import shared as sweeps
from experiments.sweeps.local import Feed, Given, Local, say
from experiments.sweeps.points import look, shown
from experiments.sweeps.search import Objective, Search
from experiments.sweeps.shared import Shared
from experiments.sweeps.slurm import Slurm
from experiments.sweeps.tables import SCHEMA, collect, summary
from lm.errors import UserError
from lm.files import summed

PROG = "python -m experiments.sweep"


def arguments(argv: Sequence[str], doc: str | None = None) -> tuple[argparse.Namespace, list[tuple[str, Text]]]:
    """The parsed arguments and the overrides ``(dotted key, value)`` of all points, in order."""
    rest, overrides = split_overrides(argv)
    parser = cli.Parser(PROG, doc)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:scale], or the config.json of a run")
    parser.add_argument("--file", type=Path, help="the config file of a config.json, where it is not in the checkout")
    parser.add_argument("--sweep", help="the sweep's name; may be left out where the config file has only one")
    parser.add_argument("--engine", choices=("local", "print", "slurm"), default="local", help="default: local")
    parser.add_argument("--parallel", type=int, help="points at a time (default: 1; slurm: no limit)")
    parser.add_argument("--workdir", type=Path, help="folder of the points (default: runs/sweeps/X-SCALE-NAME)")
    parser.add_argument("--arms", help="only these arms, separated by commas")
    parser.add_argument("--slurm", action="append", default=[], help="submitit's parameters, KEY=VALUE,...")
    parser.add_argument("--search", help="optuna[:SAMPLER]: a search_NAME(trial) instead of a sweep")
    parser.add_argument("--trials", type=int, help="of the search, with those of earlier commands")
    parser.add_argument("--minimise", metavar="ARM:METRIC", help="the search's objective: adamw:training/nll")
    parser.add_argument("--maximise", metavar="ARM:METRIC", help="the same, where more is better")
    parser.add_argument("--search-seed", type=int, help="what the search draws from (default: 0)")
    parser.add_argument("--storage", help="the search's storage, a file or a URL of Optuna's (default: DIR/study.log)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the points, write nothing")
    parsed, extra = parser.parse_known_args(rest)
    parser.refuse(extra)
    if parsed.parallel is not None and parsed.parallel < 1:
        raise UserError(f"--parallel: found {parsed.parallel}; valid: 1 or more")
    if parsed.engine == "print":
        cli.refuse_given(parsed, ["parallel"], "with --engine=print", "--engine=local, --engine=slurm")
    if parsed.slurm and parsed.engine != "slurm":
        raise UserError(f"--slurm: has no meaning with --engine={parsed.engine}; valid: --engine=slurm")
    if parsed.search is None:
        flags = ("trials", "minimise", "maximise", "storage", "search_seed")
        cli.refuse_given(parsed, flags, "without --search", "--search=optuna[:SAMPLER]")
    else:
        if parsed.search.partition(":")[0] != "optuna":
            raise UserError(f"--search: found {parsed.search!r}; valid: optuna, or optuna:SAMPLER")
        if parsed.trials is None or parsed.trials < 1:
            raise UserError(f"--trials: found {parsed.trials}; valid: 1 or more, how many points to search")
        if parsed.engine == "print":
            raise UserError("--engine=print: a search needs the results of earlier points; valid: local, slurm")
    return parsed, overrides


def run(argv: Sequence[str], doc: str | None = None) -> int:
    """Everything from the arguments to the table; raises `UserError` for any mistake in the input."""
    args, overrides = arguments(argv, doc)
    source, settings = registry.find(args.config, args.file)
    sweeps.check(settings)
    name, points_or_space = sweeps.choose(source, args.sweep, "search" if args.search else "sweep")
    head = {"file": source.place, "scale": settings.get("scale"), "search" if args.search else "sweep": name}
    label = f"search-{name}" if args.search else name
    workdir = args.workdir or Path("runs/sweeps") / f"{source.path.stem}-{head['scale']}-{label}"
    _check(workdir, head)
    shared = Shared(source, settings, args.config, overrides, args.arms, workdir, args.dry_run, args.file)
    return (_search if args.search else _sweep)(args, shared, head, name, points_or_space)


def _check(workdir: Path, head: dict[str, Any]) -> None:
    """Raises `UserError` where another sweep is."""
    theirs = points.read_state(workdir / "sweep.json")
    if workdir.is_file() or (theirs and any(theirs.get(k) != v for k, v in head.items())):
        raise UserError(f"--workdir: {workdir} is a file or holds another sweep; valid: a new folder, or this sweep's")


def _take(workdir: Path, head: dict[str, Any]) -> None:
    """Makes the folder this sweep's; of several that come at once, one gets it."""
    if not claim_json(workdir / "sweep.json", summed({"schema": SCHEMA, **head, "points": []})):
        _check(workdir, head)


def _sweep(args: argparse.Namespace, shared: Shared, head: dict[str, Any], name: str, sweep: Callable[[], Any]) -> int:
    every = sweeps.points(shared, name, sweeps.expand(name, sweep))
    total, states = len(every), {p.number: look(p) for p in every}
    todo = [p for p in every if states[p.number].name not in ("done", "running")]
    if args.dry_run:
        rows = [("point", "folder", "state", "changes")]
        rows += [(str(p.number), p.folder.name, states[p.number].name, shown(p.changes)) for p in every]
        print(f"{cli.aligned(rows)}\n\ndry run: nothing was started or written")
        return 0
    for point in every:
        if point not in todo:
            say(point, total, states[point.number].detail or "done already")
    if args.engine == "print":
        for point in todo:
            print(shlex.join([*local.RUN, *point.args]))
        return 0
    start = _engine(args, Given(todo, total), shared.workdir, name)
    _take(shared.workdir, head)
    for point in todo:
        point.begin()
    collect(every, head, shared.workdir)
    try:
        start()
    finally:
        entries = collect(every, head, shared.workdir)
    print(summary(entries, shared.workdir))
    return 0 if all(e["state"] == "done" for e in entries) else 1


def _search(
    args: argparse.Namespace, shared: Shared, head: dict[str, Any], name: str, space: Callable[[Any], Any]
) -> int:
    objective = Objective.parse(args.minimise, args.maximise)
    search = Search(name, space, shared, objective, args.search.partition(":")[2] or "tpe", args.search_seed or 0)
    if args.dry_run:
        rows = [("parameter", "drawn from"), *((k, str(v)) for k, v in search.draft.distributions.items())]
        print(f"{cli.aligned(rows)}\n\nfor example {shown(search.example.changes)}")
        print("\ndry run: nothing was started or written")
        return 0
    start = _engine(args, search, shared.workdir, name)
    _take(shared.workdir, head)
    search.begin(args.storage, args.trials)
    collect(search.points(), {**head, **search.found()}, shared.workdir)
    try:
        start()
    finally:
        entries = collect(search.points(), {**head, **search.found()}, shared.workdir)
    best = search.found()["best"]
    print(summary(entries, shared.workdir))
    print(f"best         {'none yet' if best is None else '{value} in {folder}, trial {trial}'.format(**best)}")
    return 0 if entries and all(e["state"] == "done" for e in entries) else 1


def _engine(args: argparse.Namespace, feed: Feed, workdir: Path, name: str) -> Callable[[], None]:
    """What runs the feed's points; raises `UserError` when it is not to be had."""
    if args.engine == "local":
        return Local(feed, args.parallel or 1).run
    slurm = Slurm(feed, args.parallel, args.slurm, workdir / "slurm", name)
    return lambda: slurm.run(one_by_one=args.search is not None)
