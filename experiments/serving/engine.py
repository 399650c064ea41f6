"""Rows of many requests, answered together: one thread owns the model, and takes whatever waits as its next batch."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experiments.commands.generate import Opened, Stop
from experiments.serving.refusal import Refused
from lm.decoding import Piece, Row
from lm.decoding.scoring import score
from lm.errors import UserError

TOPS = (0, 5, 20)  # alternatives per token that programs are compiled for
STRIDE = 4  # tokens between two pieces of a stream
SCORED = 4  # prompts whose logits are computed at a time
Likely = list[tuple[int, float]]


@dataclass(frozen=True)
class Scored:
    """The prompt's tokens from the second on: log-probabilities (nats), and the likeliest alternatives of each."""

    logprobs: list[float]
    top: list[Likely]


@dataclass(frozen=True)
class Fresh:
    """New text, which never ends within a character, and the tokens that were made meanwhile; `finish` with the last:
    ``stop`` or ``length``."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    top: list[Likely]
    finish: str = ""


@dataclass(frozen=True)
class Failed:
    """The row has no answer, and why; `status` of HTTP: 400 for one that the model cannot take."""

    why: str
    status: int = 500


Event = Scored | Fresh | Failed


@dataclass(eq=False)
class Job:
    """One row: `send` is told what becomes of it, on the engine's thread. `scored`: whether the prompt's tokens are
    scored too; ``row.max_new_tokens`` 0: nothing else is asked. Whoever is not interested any more sets `cancelled`."""

    row: Row
    send: Callable[[Event], None]
    stops: Sequence[str] = ()
    top: int = 0
    scored: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Answer:
    """One row's text as it comes."""

    def __init__(self, job: Job, model: Opened) -> None:
        self.job, self.stop = job, model.stop
        self.cut = Stop(model.tokenizer, job.stops, job.row.prompt)

    def add(self, piece: Piece) -> Fresh:
        before = len(self.cut.ids)
        text = self.cut.add([t for t in piece.tokens if t not in self.stop], bool(piece.finish))
        n = len(piece.tokens)
        if self.cut.met:  # what was read ahead of the stop string is no part of the answer
            n = self.cut.kept - before
        top = [likely[: self.job.top] for likely in piece.top[:n]]
        finish = "stop" if self.cut.met else piece.finish
        return Fresh(text, piece.tokens[:n], piece.logprobs[:n], top, finish)


class Engine:
    """Answers at most `batch` rows at a time; the first waits `wait` seconds for others, and those that arrive while a
    batch runs are the next one. At most `queue` rows wait."""

    def __init__(self, model: Opened, batch: int = 8, wait: float = 0.01, queue: int = 64) -> None:
        self.model, self.batch, self.wait, self.queue = model, batch, wait, queue
        self.generator = model.generator
        self.batches: list[int] = []  # rows of the last batches
        self._jobs: deque[Job] = deque()
        self._more = threading.Condition()
        self._running: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Raises `Refused` with status 429 when there is no room for all of them."""
        with self._more:
            if self._closed:
                raise Refused("the server is ending", status=503, code="ending")
            if len(self._jobs) + len(jobs) > self.queue:
                raise Refused(
                    f"{len(self._jobs)} answers wait already, there is room for {self.queue}; ask again later",
                    status=429,
                    code="queue_full",
                )
            self._jobs.extend(jobs)
            self._more.notify()

    def close(self) -> None:
        """Ends what runs and what waits."""
        with self._more:
            self._closed = True
            for job in (*self._jobs, *self._running):
                job.cancelled.set()
                job.send(Failed("the server is ending", 503))
            self._jobs.clear()
            self._more.notify()
        self._thread.join(timeout=30)

    def _take(self) -> list[Job]:
        with self._more:
            while not self._jobs and not self._closed:
                self._more.wait()
            until = time.monotonic() + self.wait
            while len(self._jobs) < self.batch and not self._closed and (left := until - time.monotonic()) > 0:
                self._more.wait(left)
            taken: list[Job] = []
            while self._jobs and len(taken) < self.batch:
                job = self._jobs.popleft()
                taken += [] if job.cancelled.is_set() else [job]
            self._running = taken
            return taken

    def _run(self) -> None:
        while not self._closed:
            jobs = self._take()
            if jobs:
                self.batches = [*self.batches[-99:], len(jobs)]
                self._together(jobs)

    def _together(self, jobs: Sequence[Job]) -> None:
        try:
            self._score([job for job in jobs if job.scored])
            self._generate([job for job in jobs if job.row.max_new_tokens])
        except Exception as e:  # the next batch may be better
            traceback.print_exc(file=sys.stderr)
            for job in jobs:
                job.send(Failed(f"the model failed: {type(e).__name__}: {' '.join(str(e).split())[:200]}"))

    def _score(self, jobs: Sequence[Job]) -> None:
        model, params = self.generator.model, self.generator.params
        for first in range(0, len(jobs), SCORED):
            some = jobs[first : first + SCORED]
            made = score(model, params, [job.row.prompt for job in some], SCORED, self._top(some))
            for b, job in enumerate(some):
                n = len(job.row.prompt) - 1
                likely = zip(made.ids_BTk[b, :n, : job.top], made.likely_BTk[b, :n, : job.top], strict=True)
                top = [list(zip(ids.tolist(), nats.tolist(), strict=True)) for ids, nats in likely]
                job.send(Scored(made.logprobs_BT[b, :n].tolist(), top))
                if not job.row.max_new_tokens:
                    job.send(Fresh("", [], [], [], "length"))

    def _generate(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        answers = [_Answer(job, self.model) for job in jobs]
        unwanted: set[int] = set()
        rows = [job.row for job in jobs]
        try:
            for piece in self.generator.rows(
                rows, stop=self.model.stop, top=self._top(jobs), stride=STRIDE, unwanted=unwanted
            ):
                fresh = answers[piece.row].add(piece)
                if fresh.finish:
                    unwanted.add(piece.row)
                jobs[piece.row].send(fresh)
                unwanted |= {i for i, job in enumerate(jobs) if job.cancelled.is_set()}
        except UserError as e:  # before the first piece
            if len(jobs) == 1:
                return jobs[0].send(Failed(str(e), 400))
            for job in jobs:  # each fits into the cache, together they do not
                self._generate([job])

    def _top(self, jobs: Sequence[Job]) -> int:
        most = max(job.top for job in jobs) if jobs else 0
        return min(next(n for n in TOPS if n >= most), self.generator.model.vocab_size)
