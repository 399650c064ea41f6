"""Runs one experiment: every arm, measure and seed, then a table, the verdicts and a report.

``python -m experiments.run --config=configs/X.py[:scale] [--workdir=DIR] [--arms=a,b] [--config.KEY=VALUE ...]``

``--config=RUN_FOLDER/config.json`` repeats a run. Any key of the config can be set: ``--config.seeds=(0,1)``,
``--config.model.pattern=lm_infinite``, ``--config.measures.nll.tokens=4096`` or
``--config.arms.window.model.pattern.window=512``. Finished points are kept: an interrupted run goes on where it was.

On several hosts the same command runs on each of them, in a folder that all see, and they train together; a Slurm step
and a TPU pod are found by themselves, elsewhere ``--coordinator=HOST:PORT --processes=N --process=I`` says who is who.
Process 0 measures, prints and writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from experiments.reports import results, summary
from experiments.running.cache import Cache, Point, write_json
from experiments.running.environment import code, describe
from experiments.running.job import Job, identities, make
from experiments.running.plan import Plan, Workdir, prepare
from experiments.running.progress import Progress, duration
from experiments.running.surgery import applied
from experiments.running.trained import Trainer
from experiments.spec import registry
from experiments.spec.arms import Arm
from experiments.spec.settings import Text
from lm.errors import Terminated, TrainingStopped, UserError
from lm.measures import Subject
from lm.sharding import processes

PROG = "python -m experiments.run"


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, Text]]]:
    """All other arguments, and the overrides ``(dotted key, value)`` of ``--config.KEY=VALUE`` in order."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config."):
            name, equals, value = word.removeprefix("--config.").partition("=")
            overrides.append((name, Text(value if equals else next(words, ""))))
        else:
            rest.append(word)
    return rest, overrides


def arguments(argv: Sequence[str]) -> tuple[Any, list[tuple[str, Text]]]:
    """The parsed arguments and the overrides."""
    rest, overrides = split_overrides(argv)
    parser = cli.Parser(PROG, __doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:scale], or the config.json of a run")
    parser.add_argument("--workdir", type=Path, help="run folder (default: runs/NAME-SCALE)")
    parser.add_argument("--arms", help="only these arms, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept from earlier runs")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, load and write nothing"
    )
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


def run(argv: Sequence[str]) -> int:
    """Everything from the arguments to the report; raises `UserError` for any mistake in the input."""
    args, overrides = arguments(argv)
    if not args.dry_run:
        processes.start(args.coordinator, args.processes, args.process, args.heartbeat)
    source, settings = registry.find(args.config)
    plan = prepare(settings, overrides, args.arms, absent_is_fine=args.dry_run)
    workdir = Workdir(args.workdir or Path("runs") / f"{plan.exp.name}-{plan.exp.scale}", source.place, plan)
    workdir.check()
    if args.dry_run:
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


class Runner:
    """One pass over the jobs of a plan; results.json is valid after every point."""

    def __init__(self, plan: Plan, source: registry.Source, workdir: Workdir, fresh: bool = False) -> None:
        """Looks for finished points; nothing is written. Raises `UserError` for texts that cannot be read."""
        assert plan.base is not None and plan.model is not None
        self.plan, self.source, self.workdir, self.base, self.model = plan, source, workdir, plan.base, plan.model
        self.trainer = Trainer(plan.base)
        read = identities(plan)
        self.environment, self.cache, self.start = describe(), Cache(workdir.path), time.monotonic()
        self.made = {k: self.environment[k] for k in ("jax", "device", "commit", "dirty")} | {"code": code()}
        self.what = {
            j: j.what(self.base.identity, read, self.environment["device"], self._training(j)) for j in make(plan)
        }
        self.points: dict[Job, Point] = {}
        for job, what in self.what.items():
            chosen = job.arm in plan.chosen
            point = None if fresh and chosen else self.cache.get(what, own=not chosen)
            if point is not None:
                self.points[job] = point

    def _training(self, job: Job) -> dict[str, Any] | None:
        """What determines the parameters that the job's arm is trained to."""
        if not job.trains:
            return None
        assert job.seed is not None
        return self.trainer.what(self.plan.arms[job.arm], job.seed)

    def all(self) -> dict[str, Any]:
        """Measures what is missing, writes results and report, prints the summary; gives results.json's content
        (of several processes, the first one does; the others take part in the trainings)."""
        jobs = list(self.what)
        missing = [i for i, j in enumerate(jobs) if j.arm in self.plan.chosen and j not in self.points]
        todo = [jobs[i] for i in processes.shared(missing)]
        if self.base.random or any(j.trains for j in todo):  # one set of parameters is in memory at a time
            order = {name: i for i, name in enumerate(self.plan.arms)}
            todo.sort(key=lambda j: (j.seed or 0, order[j.arm] if j.trains else 0))
        if jax.process_index() != 0:
            for job in todo:
                if job.trains:
                    self.trainer.params(self.plan.arms[job.arm], job.seed or 0, lambda f, text: None, lambda text: None)
            processes.meet()
            return {}
        n = sum(j.arm in self.plan.chosen for j in self.what)
        if any(not j.trains for j in todo):
            self.base.load()
        self.workdir.start(self.environment)
        for point in self.points.values():
            self.cache.adopt(point)
        print(summary.head(self.plan, n, n - len(todo), self.workdir.path), flush=True)
        old = sum(p.made.get("code") != self.made["code"] for p in self.points.values())
        if old:
            print(f"note: {old} kept points were measured by another version of lm/; --fresh measures them again")
        self.write()
        # The first job of each training waits for it.
        first = {json.dumps(self.what[j].get("training")): j for j in reversed(todo) if j.trains}
        self.waits = {
            j: self.trainer.cost(self.plan.arms[j.arm], j.seed or 0) for j in first.values() if j.seed is not None
        }
        progress = Progress(sum(j.cost for j in todo) + sum(self.waits.values()))
        try:
            for job in todo:
                self.points[job] = self.measure(job, progress)
                self.cache.put(self.points[job])
                self.write()
        finally:
            progress.close()
        out = self.write()
        from experiments import report

        written = report.write(out, self.workdir.path)
        print(summary.end(out, self.workdir.path, written))
        print(f"\n{duration(time.monotonic() - self.start)}")
        processes.meet()
        return out

    def measure(self, job: Job, progress: Progress) -> Point:
        arm = self.plan.arms[job.arm]
        seed = self.plan.exp.seeds[0] if job.seed is None else job.seed
        progress.begin(job.name)
        subject = self._subject(job, arm, seed, progress)
        start = time.monotonic()
        done = job.plug.run(subject, lambda fraction, text: progress.at(fraction, job.cost, text))
        progress.end(job.cost)
        samples = {name: [float(x) for x in values] for name, values in done.samples.items()}
        seconds = round(time.monotonic() - start, 3)
        curves, notes = results.clean(done.curves), results.clean(done.notes)
        return Point(self.what[job], samples, curves, notes, seconds, self.made)

    def _subject(self, job: Job, arm: Arm, seed: int, progress: Progress) -> Subject:
        """The model to measure, trained first where it has to be."""
        if not job.trains:
            cfg, params = applied(arm.surgery, arm.config, self.base.params(arm, self.model, seed))
            return Subject(cfg, params, self.base.tokenizer, seed)
        wait = self.waits.get(job, 0.0)
        params, folder = self.trainer.params(
            arm, seed, lambda fraction, text: progress.at(fraction, wait, text), lambda text: progress.say(text)
        )
        progress.end(wait)
        cfg, params = applied(arm.surgery, arm.config, params)
        return Subject(cfg, params, self.trainer.data(arm).tokenizer, seed, folder)

    def write(self) -> dict[str, Any]:
        """results.json as of now: arms, measures and seeds in the config's order, whatever finished first."""
        points: dict[str, dict[str, list[Point]]] = {}
        for job in self.what:
            if job in self.points:
                points.setdefault(job.arm, {}).setdefault(job.label, []).append(self.points[job])
        seconds = {
            "seconds": round(sum(p.seconds for p in self.points.values()), 1),
            "seconds_this_run": round(time.monotonic() - self.start, 1),
        }
        complete = len(self.points) == len(self.what)
        out = results.assemble(self.plan.exp, self.source.claims, points, {**self.environment, **seconds}, complete)
        write_json(self.workdir.path / "results.json", out)
        return out


def main(argv: Sequence[str] | None = None) -> int:
    return processes.leave(cli.main(run, argv))


if __name__ == "__main__":
    cli.enter(lambda: main(sys.argv[1:]))
