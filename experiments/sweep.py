"""Runs one experiment at many settings: every point of a sweep that the config file describes, each in its own folder.

``python -m experiments.sweep --config=configs/X.py[:scale] [--sweep=NAME] [--engine=local|print|slurm] [--parallel=N]
[--workdir=DIR] [--arms=a,b] [--config.KEY=VALUE ...] [--slurm=KEY=VALUE,...] [--dry-run]``
or, for a search, ``--search=optuna[:SAMPLER] --trials=N --minimise=ARM:METRIC`` (or ``--maximise``) ``[--storage=URL]``

A sweep is a function ``sweep_NAME()`` in the config file that yields dicts of dotted keys, as for ``--config.KEY``;
`experiments.sweeps` has combinators for them. All points are checked before anything starts. ``--config.KEY=VALUE``
holds for every point, and may not set what the sweep sets.

The same command again continues: a point's folder ``DIR/HASH-KEYS`` (the hash is of the config file and all settings of
the point) says by its files how far it is. ``DONE``: finished, and skipped from then on. ``RUNNING``: process, host and
heartbeat of who works on it; left alone while that process lives, taken over when it is dead or, on another host,
silent for two minutes. ``FAILED``: the exit code and the last lines; tried again. None of these: new, or interrupted
and resumed by `experiments.run` where it was. ``log.txt`` has all that the point's runs have printed.

Engines: ``local`` runs N processes at a time (default 1; with more than one, measured times disturb each other) and
ends them when it is interrupted; ``print`` writes nothing and prints one shell line per point that is left, for any
other scheduler; ``slurm`` submits a job array through submitit (``pip install 'decoder-lab[slurm]'``), waits for it
and cancels it when interrupted. ``--slurm=partition=x,timeout_min=60`` sets submitit's parameters (without
``timeout_min`` a job has submitit's five minutes), ``tasks_per_node=2`` or ``nodes=2`` makes one training of several
processes of each point, ``cluster=local`` tries it without a cluster. A job that is preempted, requeued or at its time
limit saves, and goes on by itself (`experiments.sweeps.slurm`).

A search (``pip install 'decoder-lab[optuna]'``) asks Optuna for points of ``search_NAME(trial)`` in the config file,
and tells it the mean of a metric of an arm; samplers: tpe (the default), random, qmc. See `experiments.sweeps.search`.

Ends with a table, and ``sweep.json`` and ``sweep.csv`` in DIR (default ``runs/sweeps/X-SCALE-NAME``) with every point's
changes and means; ``python -m experiments.report DIR`` makes tables and plots of them, with confidence intervals. The
exit code is 0 when every point is done, 1 when some are not, 2 for a mistake in the input and 130 for an interrupt.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.spec import registry
from experiments.spec.settings import Text
from experiments.sweeps import local, points
from experiments.sweeps import shared as sweeps
from experiments.sweeps.local import Feed, Given, Local, say
from experiments.sweeps.points import look, shown
from experiments.sweeps.search import Objective, Search
from experiments.sweeps.shared import Shared
from experiments.sweeps.slurm import Slurm
from experiments.sweeps.tables import collect, summary
from lm.errors import UserError

PROG = "python -m experiments.sweep"


def arguments(argv: Sequence[str]) -> tuple[Any, list[tuple[str, Text]]]:
    """The parsed arguments and the overrides ``(dotted key, value)`` of all points, in order."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config."):
            name, equals, value = word.removeprefix("--config.").partition("=")
            overrides.append((name, Text(value if equals else next(words, ""))))
        else:
            rest.append(word)
    parser = cli.Parser(PROG, __doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:scale], or the config.json of a run")
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
    parser.add_argument("--search-seed", type=int, default=0, help="what the search draws from (default: 0)")
    parser.add_argument("--storage", help="the search's storage, a file or a URL of Optuna's (default: DIR/study.log)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the points, write nothing")
    parsed, extra = parser.parse_known_args(rest)
    parser.refuse(extra)
    if parsed.parallel is not None and parsed.parallel < 1:
        raise UserError(f"--parallel: found {parsed.parallel}; valid: 1 or more")
    if parsed.slurm and parsed.engine != "slurm":
        raise UserError(f"--slurm: has no meaning with --engine={parsed.engine}; valid: --engine=slurm")
    if parsed.search is None:
        for flag in ("trials", "minimise", "maximise", "storage"):
            if getattr(parsed, flag) is not None:
                raise UserError(f"--{flag}: has no meaning without --search; valid: --search=optuna[:SAMPLER]")
    else:
        if parsed.search.partition(":")[0] != "optuna":
            raise UserError(f"--search: found {parsed.search!r}; valid: optuna, or optuna:SAMPLER")
        if parsed.trials is None or parsed.trials < 1:
            raise UserError(f"--trials: found {parsed.trials}; valid: 1 or more, how many points to search")
        if parsed.engine == "print":
            raise UserError("--engine=print: a search needs the results of earlier points; valid: local, slurm")
    return parsed, overrides


def run(argv: Sequence[str]) -> int:
    """Everything from the arguments to the table; raises `UserError` for any mistake in the input."""
    args, overrides = arguments(argv)
    source, settings = registry.find(args.config)
    name, points_or_space = sweeps.choose(source, args.sweep, "search" if args.search else "sweep")
    head = {"file": source.place, "scale": settings.get("scale"), "search" if args.search else "sweep": name}
    label = f"search-{name}" if args.search else name
    workdir = args.workdir or Path("runs/sweeps") / f"{source.path.stem}-{head['scale']}-{label}"
    theirs = points.read_state(workdir / "sweep.json")
    if workdir.is_file() or (theirs and any(theirs.get(k) != v for k, v in head.items())):
        raise UserError(f"--workdir: {workdir} is a file or holds another sweep; valid: a new folder, or this sweep's")
    shared = Shared(source, settings, args.config, overrides, args.arms, workdir, args.dry_run)
    return (_search if args.search else _sweep)(args, shared, head, name, points_or_space)


def _sweep(args: Any, shared: Shared, head: dict[str, Any], name: str, sweep: Callable[[], Any]) -> int:
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
    for point in todo:
        point.begin()
    collect(every, head, shared.workdir)
    try:
        start()
    finally:
        entries = collect(every, head, shared.workdir)
    print(summary(entries, shared.workdir))
    return 0 if all(e["state"] == "done" for e in entries) else 1


def _search(args: Any, shared: Shared, head: dict[str, Any], name: str, space: Callable[[Any], Any]) -> int:
    objective = Objective.parse(args.minimise, args.maximise)
    search = Search(name, space, shared, objective, args.search.partition(":")[2] or "tpe", args.search_seed)
    if args.dry_run:
        rows = [("parameter", "drawn from"), *((k, str(v)) for k, v in search.draft.distributions.items())]
        print(f"{cli.aligned(rows)}\n\nfor example {shown(search.example.changes)}")
        print("\ndry run: nothing was started or written")
        return 0
    start = _engine(args, search, shared.workdir, name)
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


def _engine(args: Any, feed: Feed, workdir: Path, name: str) -> Callable[[], None]:
    """What runs the feed's points; raises `UserError` when it is not to be had."""
    if args.engine == "local":
        return Local(feed, args.parallel or 1).run
    slurm = Slurm(feed, args.parallel, args.slurm, workdir / "slurm", name)
    return lambda: slurm.run(one_by_one=args.search is not None)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(run, argv)


if __name__ == "__main__":
    import jax

    from experiments import sweep  # by its name: a cluster's jobs look it up

    jax.config.update("jax_platforms", "cpu")  # checking needs no accelerator, and must hold none while points run
    sys.exit(sweep.main())
