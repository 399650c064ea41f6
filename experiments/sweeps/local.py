"""The local engine: points as processes of this machine, some at a time, and the files that say how far each one is."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from experiments.running.cache import write_json
from experiments.running.progress import duration
from experiments.sweeps import points
from experiments.sweeps.points import Point, State, look

RUN = (sys.executable, "-m", "experiments.run")
HEARTBEAT, GRACE, POLL = 10.0, 60.0, 0.1  # seconds
BUSY = "another process is training here"  # two points share a training: the later one waits for it
ASKED = (130, 143, *(-int(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)))


class Feed(Protocol):
    """Where an engine's points come from, and who is told how they ended."""

    total: int

    def next(self) -> Point | None:
        """The next point; None when there is none any more."""

    def ended(self, point: Point, state: State) -> None: ...


class Given:
    """A feed of points that are known beforehand."""

    def __init__(self, todo: Sequence[Point], total: int) -> None:
        self.waiting, self.total = list(todo), total

    def next(self) -> Point | None:
        return self.waiting.pop(0) if self.waiting else None

    def ended(self, point: Point, state: State) -> None:
        pass


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """What is started here never receives SIGUSR1 and SIGUSR2: a scheduler sends its warning to every process of a job,
    and would kill the run that is about to be told to save. Here they come a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Attempt:
    """One process that works on a point, and the point's state files while it does."""

    def __init__(self, point: Point) -> None:
        """Starts it. Raises `FileExistsError` when another process was quicker."""
        self.point, self.folder, self.start = point, point.folder, time.monotonic()
        self.running = point.folder / "RUNNING"
        with contextlib.suppress(FileNotFoundError):
            if not points.live(points.read_state(self.running)):
                self.running.unlink()
        with self.running.open("x", encoding="utf-8") as f:  # of two sweeps that come at once, one gets it
            json.dump(points.new_record(os.getpid()), f)
        process: subprocess.Popen[bytes] | None = None
        try:
            (self.folder / "FAILED").unlink(missing_ok=True)
            command = [*RUN, *point.args]
            with (self.folder / "log.txt").open("ab") as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                self.offset = log.tell()
                # A session of its own: Ctrl-C reaches it through `stop`, which waits for what it saves.
                with deaf():
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
            self.process = process
            self.record = points.new_record(self.process.pid)
            write_json(self.running, self.record)
        except BaseException:
            if process is not None:
                process.kill()
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
        results, seconds = points.results_of(self.point) or {}, round(time.monotonic() - self.start, 1)
        whole = results.get("complete") if self.point.whole else set(self.point.arms) <= set(results.get("arms", ()))
        ended = code == 0 and line.startswith("terminated:")  # a training that was told to end, and has saved
        if code == 0 and whole and not ended:
            before = points.read_state(self.folder / "DONE").get("arms", ())
            arms = [*before, *(a for a in self.point.arms if a not in before)]
            write_json(self.folder / "DONE", {"seconds": seconds, "arms": arms})
        elif not (asked or ended or code in ASKED):
            line = line if code else "it ended without complete results"
            points.fail(self.point, code, line, seconds, lines)
        self.running.unlink(missing_ok=True)
        return look(self.point)


class Local:
    """The points of `feed` as processes on this machine, `parallel` at a time."""

    def __init__(self, feed: Feed, parallel: int) -> None:
        self.feed, self.parallel = feed, parallel
        self.again: list[Point] = []  # that another point's training had kept from theirs
        self.later: list[Point] = []  # until another point has ended
        self.attempts: list[Attempt] = []
        self.asked = 0

    def run(self) -> None:
        """Until all points have ended; raises `KeyboardInterrupt` when a signal ends it before."""
        with self._signals():
            try:
                while not self.asked:
                    while len(self.attempts) < self.parallel and (point := self._next()) is not None:
                        self._start(point)
                    if not self.attempts:
                        break
                    time.sleep(POLL)
                    for attempt in [a for a in self.attempts if a.process.poll() is not None]:
                        self._end(attempt)
                    for attempt in self.attempts:
                        attempt.beat()
            finally:
                self.stop()
        if self.asked:
            raise KeyboardInterrupt

    def _next(self) -> Point | None:
        return self.again.pop(0) if self.again else self.feed.next()

    def _start(self, point: Point) -> None:
        try:
            self.attempts.append(Attempt(point))
            say(point, self.feed.total, "starts")
        except FileExistsError:
            say(point, self.feed.total, "is taken by another process, left alone")
            self.feed.ended(point, look(point))
        except OSError as e:
            points.fail(point, -1, f"{e.filename or RUN[0]}: {e.strerror or e}", 0.0, ())
            self._tell(point, look(point))

    def _end(self, attempt: Attempt) -> None:
        self.attempts.remove(attempt)
        state = attempt.settle(asked=False)
        self.again, self.later = self.again + self.later, []
        if state.name == "failed" and BUSY in state.detail and self.attempts:
            self.later.append(attempt.point)
            say(attempt.point, self.feed.total, "waits for a training that another point has begun")
        else:
            self._tell(attempt.point, state)

    def _tell(self, point: Point, state: State) -> None:
        tell(point, self.feed.total, state)
        self.feed.ended(point, state)

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
            self._tell(attempt.point, attempt.settle(asked=True))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
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
