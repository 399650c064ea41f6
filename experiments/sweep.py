"""Runs one experiment at many settings: every point of a sweep that the config file describes, each in its own folder.

``python -m experiments.sweep --config=configs/X.py[:scale] [--sweep=NAME] [--engine=local|print|slurm] [--parallel=N]
[--workdir=DIR] [--arms=a,b] [--config.KEY=VALUE ...] [--slurm=KEY=VALUE,...] [--dry-run]``

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
other scheduler; ``slurm`` submits a job array through submitit (``pip install 'decoder-lab[slurm]'``), waits for it and
cancels it when interrupted. ``--slurm=partition=x,timeout_min=60`` sets submitit's parameters, ``cluster=local`` tries
it without a cluster; a job that is preempted resumes its point.

Ends with a table, and ``sweep.json`` and ``sweep.csv`` in DIR (default ``runs/sweeps/X-SCALE-NAME``) with every point's
changes and means. The exit code is 0 when every point is done, 1 when some are not, 2 for a mistake in the input and
130 for an interrupt.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, registry, sweeps, tables
from experiments.cache import write_json
from experiments.progress import duration
from experiments.settings import Text
from experiments.sweeps import Point, State, literal, look, shown
from lm.errors import UserError

PROG = "python -m experiments.sweep"
RUN = (sys.executable, "-m", "experiments.run")
SCHEMA = 1  # of sweep.json
HEARTBEAT, GRACE, POLL = 10.0, 60.0, 0.1  # seconds
BUSY = "another process is training here"  # two points share a training: the later one waits for it
ASKED = (130, *(-int(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)))
SHARED = ("cluster", "name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")
COLUMNS = 6  # of metrics in the table; sweep.csv has all


class Attempt:
    """One process that works on a point, and the point's state files while it does."""

    def __init__(self, point: Point) -> None:
        """Starts it. Raises `FileExistsError` when another process was quicker."""
        self.point, self.folder, self.start = point, point.folder, time.monotonic()
        self.running = point.folder / "RUNNING"
        with contextlib.suppress(FileNotFoundError):
            if not sweeps.live(sweeps.read_state(self.running)):
                self.running.unlink()
        with self.running.open("x", encoding="utf-8") as f:  # of two sweeps that come at once, one gets it
            json.dump(sweeps.new_record(os.getpid()), f)
        try:
            (self.folder / "FAILED").unlink(missing_ok=True)
            command = [*RUN, *point.args]
            with (self.folder / "log.txt").open("ab") as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                self.offset = log.tell()
                # A session of its own: Ctrl-C reaches it through `stop`, which waits for what it saves.
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.record = sweeps.new_record(self.process.pid)
            write_json(self.running, self.record)
        except BaseException:
            if hasattr(self, "process"):
                self.process.kill()
            self.running.unlink(missing_ok=True)
            raise

    def beat(self) -> None:
        if time.time() - self.record["heartbeat"] >= HEARTBEAT:
            self.record["heartbeat"] = time.time()
            write_json(self.running, self.record)

    def last(self, n: int = 10) -> list[str]:
        """The last lines it has printed."""
        with (self.folder / "log.txt").open("rb") as log:
            log.seek(max(self.offset, log.seek(0, os.SEEK_END) - 10_000))
            lines = log.read().decode(errors="replace").splitlines()
        return [x for x in lines if x.strip()][-n:]

    def settle(self, asked: bool) -> State:
        """Once it has ended: the state it leaves the point in. `asked`: it was told to end."""
        code, lines = self.process.wait(), self.last()
        line = lines[-1] if lines else ""
        results, seconds = sweeps.results_of(self.point) or {}, round(time.monotonic() - self.start, 1)
        whole = results.get("complete") if self.point.whole else set(self.point.arms) <= set(results.get("arms", ()))
        ended = code == 0 and line.startswith("terminated:")  # a training that was told to end, and has saved
        if code == 0 and whole and not ended:
            before = sweeps.read_state(self.folder / "DONE").get("arms", ())
            arms = [*before, *(a for a in self.point.arms if a not in before)]
            write_json(self.folder / "DONE", {"seconds": seconds, "arms": arms})
        elif not (asked or ended or code in ASKED):
            line = line if code else "it ended without complete results"
            sweeps.fail(self.point, code, line, seconds, lines)
        self.running.unlink(missing_ok=True)
        return look(self.point)


class Local:
    """Points as processes on this machine, `parallel` at a time."""

    def __init__(self, todo: Sequence[Point], parallel: int, total: int) -> None:
        self.waiting, self.parallel, self.total = list(todo), parallel, total
        self.later: list[Point] = []  # until another point has ended
        self.attempts: list[Attempt] = []
        self.asked = 0

    def run(self) -> None:
        """Until all points have ended; raises `KeyboardInterrupt` when a signal ends it before."""
        with self._signals():
            try:
                while (self.waiting or self.attempts) and not self.asked:
                    while self.waiting and len(self.attempts) < self.parallel:
                        self._start(self.waiting.pop(0))
                    time.sleep(POLL)
                    for attempt in [a for a in self.attempts if a.process.poll() is not None]:
                        self._end(attempt)
                    for attempt in self.attempts:
                        attempt.beat()
            finally:
                self.stop()
        if self.asked:
            raise KeyboardInterrupt

    def _start(self, point: Point) -> None:
        try:
            self.attempts.append(Attempt(point))
            say(point, self.total, "starts")
        except FileExistsError:
            say(point, self.total, "is taken by another process, left alone")
        except OSError as e:
            sweeps.fail(point, -1, f"{e.filename or RUN[0]}: {e.strerror or e}", 0.0, ())
            tell(point, self.total, look(point))

    def _end(self, attempt: Attempt) -> None:
        self.attempts.remove(attempt)
        state = attempt.settle(asked=False)
        self.waiting, self.later = self.waiting + self.later, []
        if state.name == "failed" and BUSY in state.detail and self.attempts:
            self.later.append(attempt.point)
            say(attempt.point, self.total, "waits for a training that another point has begun")
        else:
            tell(attempt.point, self.total, state)

    def stop(self) -> None:
        """Ends what still runs: time to save first, none after a second signal."""
        running, self.attempts, asked = self.attempts, [], self.asked
        for attempt in running:
            attempt.process.terminate()
        deadline = time.monotonic() + GRACE
        while any(a.process.poll() is None for a in running) and time.monotonic() < deadline:
            if self.asked > max(asked, 1):
                break
            time.sleep(POLL)
        for attempt in running:
            if attempt.process.poll() is None:
                attempt.process.kill()
            tell(attempt.point, self.total, attempt.settle(asked=True))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self.asked += 1

        known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {s: signal.getsignal(s) for s in known if signal.getsignal(s) is not signal.SIG_IGN}  # nohup
        for s in before:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def say(point: Point, total: int, text: str) -> None:
    print(f"[{point.number}/{total}] {point.folder.name}: {text}", file=sys.stderr, flush=True)


def tell(point: Point, total: int, state: State) -> None:
    seconds = "" if state.seconds is None else f" in {duration(state.seconds)}"
    log = f" (log: {point.folder / 'log.txt'})" if state.name == "failed" else ""
    say(point, total, f"{state.name}{seconds}{': ' + state.detail if state.detail else ''}{log}")


class Task:
    """One point as a job on a cluster. submitit calls `checkpoint` when the job is preempted, and starts it again."""

    def __init__(self, point: Point, total: int) -> None:
        self.point, self.total = point, total
        self.local: Local | None = None

    def __call__(self) -> str:
        if look(self.point).name != "done":
            self.local = Local([self.point], 1, self.total)
            with contextlib.suppress(KeyboardInterrupt):
                self.local.run()
        return look(self.point).name

    def checkpoint(self) -> Any:
        import submitit

        if self.local is not None:
            self.local.stop()
        return submitit.helpers.DelayedSubmission(Task(self.point, self.total))


def executor(options: Sequence[str], parallel: int | None, folder: Path, name: str) -> Any:
    """submitit's executor; raises `UserError` when there is none here, or for parameters it does not know."""
    try:
        import submitit
    except ImportError:
        valid = "pip install 'decoder-lab[slurm]', or --engine=local or print"
        raise UserError(f"--engine=slurm: submitit is not installed; valid: {valid}") from None
    settings: dict[str, Any] = {"name": name, "slurm_array_parallelism": parallel}
    for part in filter(None, ",".join(options).split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--slurm: found {part!r}; valid: KEY=VALUE,..., for example partition=x,timeout_min=60")
        settings[option if option in SHARED else f"slurm_{option}"] = Text(value).literal()
    try:
        out = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", "slurm"))
        out.update_parameters(**settings)
    except (NameError, AssertionError, ValueError, RuntimeError) as e:
        raise UserError(f"--slurm: {e}") from None
    return out


def submit(cluster: Any, todo: Sequence[Point], total: int) -> None:
    """Runs the points as one job array, until all have ended; an interrupt cancels those that have not."""
    try:
        with cluster.batch():
            jobs = [(p, cluster.submit(Task(p.bare(), total))) for p in todo]
    except (RuntimeError, OSError) as e:
        raise UserError(f"--engine=slurm: cannot be submitted: {e}") from None
    for point, job in jobs:
        say(point, total, f"submitted as job {job.job_id}")
    try:
        while jobs:
            time.sleep(POLL)
            over = [(p, j) for p, j in jobs if j.done()]
            jobs = [(p, j) for p, j in jobs if not j.done()]
            for point, job in over:
                error = job.exception() if look(point).name in ("new", "interrupted") else None
                if error is not None:
                    lines = str(error).strip().splitlines()
                    sweeps.fail(point, -1, f"job {job.job_id}: {lines[-1] if lines else job.state}", 0.0, lines[-10:])
                tell(point, total, look(point))
    except BaseException:
        for _, job in jobs:
            job.cancel(check=False)
        raise


def collect(every: Sequence[Point], head: Mapping[str, Any], workdir: Path) -> list[dict[str, Any]]:
    """Writes sweep.json and sweep.csv, and gives the points as sweep.json has them."""
    out = []
    for point in every:
        state = look(point)
        result = sweeps.results_of(point) or {}
        entry = {"point": point.number, "folder": point.folder.name, "state": state.name, "seconds": state.seconds}
        out.append({**entry, "detail": state.detail, "overrides": point.changes, "arms": result.get("arms", {})})
    write_json(workdir / "sweep.json", {"schema": SCHEMA, **head, "points": out})
    changed = list(dict.fromkeys(k for e in out for k in e["overrides"]))
    names = list(dict.fromkeys((arm, m) for e in out for arm, values in e["arms"].items() for m in values))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["point", "folder", "state", "seconds", *changed, *(f"{arm} {metric}" for arm, metric in names)])
    for e in out:
        values = {k: v if isinstance(v, str) else literal(v, k) for k, v in e["overrides"].items()}
        row = [e["point"], e["folder"], e["state"], e["seconds"], *(values.get(k, "") for k in changed)]
        table.writerow([*row, *(_mean(e, *name) for name in names)])
    (workdir / ".sweep.csv").write_text(text.getvalue(), encoding="utf-8")
    os.replace(workdir / ".sweep.csv", workdir / "sweep.csv")
    return out


def _mean(entry: Mapping[str, Any], arm: str, metric: str) -> Any:
    value = entry["arms"].get(arm, {}).get(metric)
    return value.get("mean") if isinstance(value, Mapping) else value


def summary(entries: Sequence[Mapping[str, Any]], workdir: Path) -> str:
    """A row per point: changes, state, and each measure's first metric for every arm, the baseline first."""
    arms = dict.fromkeys(arm for e in entries for arm in e["arms"])
    first: dict[str, str] = {}
    for metric in (m for e in entries for values in e["arms"].values() for m in values):
        first.setdefault(metric.rpartition("/")[0], metric)
    names = [(arm, m) for m in first.values() for arm in arms if any(m in e["arms"].get(arm, {}) for e in entries)]
    rows = [("point", "changes", "state", "seconds", *(f"{arm} {m}" for arm, m in names[:COLUMNS]))]
    for e in entries:
        means = (tables.number(_mean(e, *name)) for name in names[:COLUMNS])
        rows.append((str(e["point"]), shown(e["overrides"], 60), e["state"], tables.number(e["seconds"]), *means))
    counts = {s: sum(e["state"] == s for e in entries) for s in dict.fromkeys(e["state"] for e in entries)}
    end = f"{', '.join(f'{n} {s}' for s, n in counts.items())} of {len(entries)} points"
    return f"{cli.aligned(rows)}\n\n{end}\nall numbers  {workdir / 'sweep.csv'}, {workdir / 'sweep.json'}"


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
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the points, write nothing")
    parsed, extra = parser.parse_known_args(rest)
    parser.refuse(extra)
    if parsed.parallel is not None and parsed.parallel < 1:
        raise UserError(f"--parallel: found {parsed.parallel}; valid: 1 or more")
    if parsed.slurm and parsed.engine != "slurm":
        raise UserError(f"--slurm: has no meaning with --engine={parsed.engine}; valid: --engine=slurm")
    return parsed, overrides


def run(argv: Sequence[str]) -> int:
    """Everything from the arguments to the table; raises `UserError` for any mistake in the input."""
    args, overrides = arguments(argv)
    source, settings = registry.find(args.config)
    name, sweep = sweeps.choose(source, args.sweep)
    head = {"file": source.place, "scale": settings.get("scale"), "sweep": name}
    workdir = args.workdir or Path("runs/sweeps") / f"{source.path.stem}-{head['scale']}-{name}"
    theirs = sweeps.read_state(workdir / "sweep.json")
    if workdir.is_file() or (theirs and any(theirs.get(k) != v for k, v in head.items())):
        raise UserError(f"--workdir: {workdir} is a file or holds another sweep; valid: a new folder, or this sweep's")
    changes = sweeps.expand(name, sweep)
    every = sweeps.points(source, settings, args.config, name, changes, overrides, args.arms, workdir, args.dry_run)
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
            print(shlex.join([*RUN, *point.args]))
        return 0
    cluster = executor(args.slurm, args.parallel, workdir / "slurm", name) if args.engine == "slurm" else None
    for point in todo:
        if point.run is not None and not (point.folder / "config.json").exists():
            point.run.start({})  # a folder without it would be foreign to `experiments.run`
    try:
        if cluster is not None and todo:
            submit(cluster, todo, total)
        elif todo:
            Local(todo, args.parallel or 1, total).run()
    finally:
        entries = collect(every, head, workdir)
    print(summary(entries, workdir))
    return 0 if all(e["state"] == "done" for e in entries) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(run, argv)


if __name__ == "__main__":
    import jax

    from experiments import sweep  # by its name: a cluster's jobs look it up

    jax.config.update("jax_platforms", "cpu")  # checking needs no accelerator, and must hold none while points run
    sys.exit(sweep.main())
