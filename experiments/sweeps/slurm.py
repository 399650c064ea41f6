"""The Slurm engine: points as jobs that submitit submits, and what a job does when Slurm takes its node away.

A job runs the same process per point as the local engine, beside the same state files. It ends early in two ways, and
goes on by itself after both, under its own number:

- SIGUSR2, which submitit asks Slurm to send before the time limit (``--slurm=signal_delay_s=90``), and which Slurm also
  sends before a preemption where ``PreemptParameters=send_user_signal`` is set: submitit calls `Task.checkpoint`;
- SIGTERM from ``scontrol requeue``, or from a preemption that leaves a ``GraceTime``.

In both the run is told to save and to end before the job is requeued; a job killed without a warning is requeued by
Slurm and goes on from the last checkpoint. What has become of a job is read from the point's own files and from
``squeue``, so that a cluster needs no accounting database.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps import local, points
from experiments.sweeps.local import BUSY, Feed, Given, Local, deaf, say, tell
from experiments.sweeps.points import Point, look
from lm.errors import UserError, shown

SHARED = ("cluster", "name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")
REQUEUES = 100  # times that a job may reach its time limit and go on; submitit's own default is 3
POLL, ASK, WAIT = 1.0, 5.0, 20.0  # seconds: between looks at files, at squeue, and at a training that another job has
LIVES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED", "SIGNALING", "RESIZING")


class Task:
    """One point as a job. submitit calls `checkpoint` when the job is preempted, and starts it again."""

    def __init__(self, point: Point, total: int) -> None:
        self.point, self.total = point, total
        self.local: Local | None = None

    def __call__(self) -> str:
        """The state that the point is in at the end. Of a job's several tasks the first one keeps the state files, the
        others are processes of the same run."""
        if look(self.point).name == "done":
            return "done"
        if rank := int(os.environ.get("SLURM_PROCID", "0")):
            return self._follow(rank)
        while True:
            self.local = Local(Given([self.point], self.total), 1)
            with contextlib.suppress(KeyboardInterrupt):
                self.local.run()
            state = look(self.point)
            if not (state.name == "failed" and BUSY in state.detail):
                break
            time.sleep(WAIT)  # another job trains what this point needs as well
        if state.name == "interrupted":
            requeue()
            raise SystemExit(1)  # without a result: the job is not over
        return state.name

    def _follow(self, rank: int) -> str:
        with (self.point.folder / f"log-{rank}.txt").open("ab") as log:
            command = [*local.RUN, *self.point.args]
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            with deaf():
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            return f"exit code {process.wait()}"

    def checkpoint(self) -> Any:
        import submitit

        if self.local is not None:
            self.local.stop()
        return submitit.helpers.DelayedSubmission(Task(self.point, self.total))


def requeue() -> None:
    """Has Slurm start this job again, unless it is being cancelled, or requeued already."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    if asked.stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)


class Slurm:
    """The points of `feed` as jobs: one array of all of them, or, where later points depend on how earlier ones ended
    (`one_by_one`), `parallel` at a time."""

    def __init__(self, feed: Feed, parallel: int | None, options: Sequence[str], folder: Path, name: str) -> None:
        """Raises `UserError` when there is no Slurm here, or for parameters that submitit does not know."""
        self.feed, self.parallel, self.folder = feed, parallel, folder
        self.executor, self.cluster = executor(options, parallel, folder, name)
        self.jobs: list[tuple[Point, Any]] = []
        self.missing: set[str] = set()  # jobs that squeue did not know
        self.asked = 0.0

    def run(self, one_by_one: bool = False) -> None:
        """Until all points have ended; an interrupt cancels the jobs that have not."""
        try:
            self._submit(one_by_one)
            while self.jobs:
                time.sleep(POLL)
                self._look()
                self._submit(one_by_one)
        except BaseException:
            for _, job in self.jobs:
                job.cancel(check=False)
            raise

    def _submit(self, one_by_one: bool) -> None:
        room = max(self.parallel or 1, 1) - len(self.jobs) if one_by_one else None
        todo: list[Point] = []
        while (room is None or len(todo) < room) and (point := self.feed.next()) is not None:
            todo.append(point)
        if not todo:
            return
        try:
            with self.executor.batch():
                new = [(p, self.executor.submit(Task(p.bare(), self.feed.total))) for p in todo]
        except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
            lines = [x for x in str(e).splitlines() if x.strip()]
            raise UserError(f"--engine=slurm: cannot be submitted: {lines[-1] if lines else e}") from None
        for point, job in new:
            say(point, self.feed.total, f"submitted as job {job.job_id}")
        self.jobs += new
        self.asked = time.monotonic()

    def _look(self) -> None:
        gone = self._gone()
        for point, job in list(self.jobs):
            if not (job.paths.result_pickle.exists() or str(job.job_id) in gone):
                continue
            self.jobs.remove((point, job))
            points.release(point, str(job.job_id))
            if look(point).name in ("new", "interrupted"):
                lines = _lines(job)
                last = lines[-1] if lines else "it left no word"
                points.fail(point, -1, f"job {job.job_id} ended before its point: {last}", 0.0, lines)
            tell(point, self.feed.total, look(point))
            self.feed.ended(point, look(point))

    def _gone(self) -> set[str]:
        """Jobs that have ended without a result: twice in a row squeue does not know them."""
        if self.cluster != "slurm":
            return {str(j.job_id) for _, j in self.jobs if j.done()}
        if time.monotonic() - self.asked < ASK:
            return set()
        self.asked = time.monotonic()
        command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            return set()  # the controller may be away for a while: nothing is known
        rows = [line.split() for line in answer.stdout.splitlines() if line.strip()]
        there = {row[0] for row in rows if row[-1] in LIVES}
        missing = {str(j.job_id) for _, j in self.jobs} - there
        gone, self.missing = missing & self.missing, missing
        return gone


def _lines(job: Any) -> list[str]:
    """The last lines that a job has printed."""
    for path in (job.paths.stderr, job.paths.stdout):
        with contextlib.suppress(OSError):
            lines = [x for x in path.read_text(errors="replace").splitlines() if x.strip()]
            if lines:
                return lines[-10:]
    return []


def executor(options: Sequence[str], parallel: int | None, folder: Path, name: str) -> tuple[Any, str]:
    """submitit's executor and the cluster's kind; raises `UserError` when there is none here, or for parameters that it
    does not know."""
    from experiments.spec.settings import Text

    try:
        import submitit
    except ImportError:
        valid = "pip install 'decoder-lab[slurm]', or --engine=local or print"
        raise UserError(f"--engine=slurm: submitit is not installed; valid: {valid}") from None
    settings: dict[str, Any] = {"name": name, "slurm_array_parallelism": parallel}
    settings["slurm_additional_parameters"] = {"requeue": True}  # also where the cluster's default is not to
    for part in filter(None, ",".join(options).split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(
                f"--slurm: found {shown(part)}; valid: KEY=VALUE,..., for example partition=x,timeout_min=60"
            )
        settings[option if option in SHARED else f"slurm_{option}"] = Text(value).literal()
    cluster = str(settings.pop("cluster", "slurm"))
    try:
        out = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
        out.update_parameters(**settings)
    except (NameError, AssertionError, ValueError, RuntimeError, TypeError) as e:
        raise UserError(f"--slurm: {' '.join(str(e).split())}") from None
    return out, cluster
