"""One pass over the jobs of a plan: what is missing is measured, kept as points, and written as results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from experiments.reports import results, summary
from experiments.running.cache import Cache, Point, write_json
from experiments.running.environment import code, describe
from experiments.running.job import Job, identities, make
from experiments.running.plan import Plan, Workdir
from experiments.running.progress import Progress, duration
from experiments.running.surgery import applied
from experiments.running.trained import Trainer
from experiments.spec import registry
from experiments.spec.arms import Arm
from lm.config import ModelConfig
from lm.errors import UserError, told
from lm.files import summed
from lm.measures import Subject
from lm.model.language_model import DecoderModel
from lm.sharding import processes

EVERY = 60.0  # seconds between the times that results.json is assembled while points come


class Runner:
    """One pass over the jobs of a plan. The points on disk are the truth; results.json is assembled from them at the
    end, however that comes, and once a minute."""

    def __init__(
        self,
        plan: Plan,
        source: registry.Source,
        workdir: Workdir,
        fresh: bool = False,
        cache: Path | None = None,
    ) -> None:
        """Looks for finished points; nothing is written but tokens of texts, into `cache` (`Trainer`).

        Raises `UserError` for all that can be known to be wrong before parameters are read: texts that cannot be, and
        tokenizers, vocabularies and meshes that do not fit.
        """
        assert plan.base is not None and plan.model is not None
        self.plan, self.source, self.workdir, self.base, self.model = plan, source, workdir, plan.base, plan.model
        self.trainer = Trainer(plan.base, plan.arms, cache)
        read = identities(plan)
        self.environment, self.cache, self.start = describe(), Cache(workdir.path), time.monotonic()
        self.made = {k: self.environment[k] for k in ("jax", "device", "commit", "dirty")} | {"code": code()}
        self.what = {
            j: j.what(self.base.identity, read, self.environment["device"], self._training(j)) for j in make(plan)
        }
        self.points: dict[Job, Point] = {}
        self.waits: dict[Job, float] = {}
        self.written: dict[str, Any] = {}  # what results.json has
        self.operated: tuple[tuple[str, int], ModelConfig, Any] | None = None  # the last arm and seed with surgery
        for job, what in self.what.items():
            chosen = job.arm in plan.chosen
            point = None if fresh and chosen else self.cache.get(what, own=not chosen)
            if point is not None:
                self.points[job] = point
        self._check([job for job in self.what if job.arm in plan.chosen and job not in self.points])

    def _check(self, todo: Sequence[Job]) -> None:
        """What measures say of the models that they will be given, each once."""
        seen = set()
        for job in todo:
            arm = self.plan.arms[job.arm]
            tokenizer = self.trainer.data(arm).tokenizer if job.trains else self.base.tokenizer
            at = (job.label, arm.config, job.trains, None if tokenizer is None else tokenizer.identity)
            if at not in seen:
                seen.add(at)
                try:
                    job.plug.check(Subject(DecoderModel(arm.config), None, tokenizer, job.seed or 0), job.trains)
                except UserError as e:
                    raise UserError(f"arms.{job.arm}: measures.{job.label}: {e}") from None

    def _training(self, job: Job) -> dict[str, Any] | None:
        """What determines the parameters that the job's arm is trained to."""
        if not job.trains:
            return None
        assert job.seed is not None
        return self.trainer.what(self.plan.arms[job.arm], job.seed)

    def all(self) -> None:
        """Measures what is missing, writes results and report, prints the summary (of several processes, the first one
        does; the others take part in the trainings)."""
        todo = self._todo()
        if jax.process_index() != 0:
            for job in todo:
                if job.trains:
                    self.trainer.params(self.plan.arms[job.arm], job.seed or 0, lambda f, text: None, lambda text: None)
            processes.meet()
            return
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
        self._measure(todo)
        self._report()
        processes.meet()

    def _todo(self) -> list[Job]:
        """The missing jobs of the chosen arms, in an order that holds one set of parameters in memory at a time."""
        jobs = list(self.what)
        missing = [i for i, j in enumerate(jobs) if j.arm in self.plan.chosen and j not in self.points]
        todo = [jobs[i] for i in processes.shared(missing)]
        if self.base.random or any(j.trains for j in todo):
            order = {name: i for i, name in enumerate(self.plan.arms)}
            todo.sort(key=lambda j: (j.seed or 0, order[j.arm] if j.trains else 0))
        return todo

    def _measure(self, todo: list[Job]) -> None:
        # The first job of each training waits for it.
        first = {json.dumps(self.what[j].get("training")): j for j in reversed(todo) if j.trains}
        self.waits = {
            j: self.trainer.cost(self.plan.arms[j.arm], j.seed or 0) for j in first.values() if j.seed is not None
        }
        progress = Progress(sum(j.cost for j in todo) + sum(self.waits.values()))
        last = time.monotonic()
        with self._kept_up():
            try:
                for job in todo:
                    self.points[job] = self.measure(job, progress)
                    self.cache.put(self.points[job])
                    if time.monotonic() - last >= EVERY:
                        self.write()
                        last = time.monotonic()
            finally:
                progress.close()

    @contextmanager
    def _kept_up(self) -> Iterator[None]:
        """results.json is written when this begins and ends, also by an exception or a signal that ends the process."""
        self.write()  # a claim that cannot be computed says so before hours of work
        with cli.before_the_end(self.write):
            try:
                yield
            finally:
                self.write()

    def _report(self) -> None:
        from experiments.reports import report  # draws: not for runs that end before

        out = self.written
        written = report.write(out, self.workdir.path)
        print(summary.end(out, self.workdir.path, written))
        print(f"\n{duration(time.monotonic() - self.start)}")

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
        """The model to measure, trained first where it has to be, then operated on where the arm says so."""
        tokenizer, folder = self.base.tokenizer, None
        if job.trains:
            wait = self.waits.get(job, 0.0)
            params, folder = self.trainer.params(
                arm, seed, lambda fraction, text: progress.at(fraction, wait, text), lambda text: progress.say(text)
            )
            progress.end(wait)
            tokenizer = self.trainer.data(arm).tokenizer
        else:
            params = self.base.params(arm, self.model, seed)
        cfg = arm.config
        if job.surgery:
            if self.operated is None or self.operated[0] != (arm.name, seed):
                self.operated = None  # one set at a time
                self.operated = ((arm.name, seed), *applied(job.surgery, cfg, params, tokenizer))
            _, cfg, params = self.operated
        return Subject(DecoderModel(cfg), params, tokenizer, seed, folder)

    def results(self) -> dict[str, Any]:
        """The content of results.json as of now: arms, measures and seeds in the config's order, whatever finished
        first."""
        points: dict[str, dict[str, list[Point]]] = {}
        for job in self.what:
            if job in self.points:
                points.setdefault(job.arm, {}).setdefault(job.label, []).append(self.points[job])
        seconds = {
            "seconds": round(sum(p.seconds for p in self.points.copy().values()), 1),
            "seconds_this_run": round(time.monotonic() - self.start, 1),
        }
        complete = len(self.points) == len(self.what)
        try:
            return results.assemble(
                self.plan.exp, self.source.claims, points, {**self.environment, **seconds}, complete
            )
        except (UserError, MemoryError):
            raise
        except (Exception, SystemExit) as e:
            raise UserError(f"{self.source.path}: claims(results) failed: {type(e).__name__}: {told(e)}") from e

    def write(self) -> None:
        self.written = self.results()
        write_json(self.workdir.path / "results.json", summed(self.written))
