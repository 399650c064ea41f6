"""Where the time of a run went (goodput), and the log of its metrics."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lm.files import write_json, write_text
from lm.trackers.base import Session, Tracker
from lm.train.folder import GOODPUT, METRICS, SAMPLES

Tell = Callable[[str], None]
KINDS = ("init", "compile", "step", "data", "eval", "save", "idle")


class Ledger:
    """Seconds by kind of work; what no kind claims is idle. Kinds do not nest."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - begin

    def summary(self) -> dict[str, float]:
        """Seconds by kind with the total, and ``goodput``, the share of training steps."""
        total = time.perf_counter() - self.start
        done = {k: v for k, v in self.seconds.items() if k != "idle"}
        done["idle"] = max(total - sum(done.values()), 0.0)
        return {**{k: round(v, 3) for k, v in done.items()}, "total": round(total, 3), "goodput": done["step"] / total}

    def write(self, folder: Path) -> None:
        """Adds the summary to ``goodput.json``, which has an entry for every session of the run in `folder`."""
        path = folder / GOODPUT
        sessions = json.loads(path.read_text()) if path.is_file() else []
        write_json(path, [*sessions, self.summary()])


class Log:
    """``metrics.jsonl``: one object per line, in the order of steps; ``samples.jsonl`` likewise; and trackers."""

    def __init__(
        self, folder: Path, after: int | None, trackers: Sequence[Tracker], about: Mapping[str, Any], tell: Tell = print
    ) -> None:
        """Keeps the lines of steps up to `after` (None = none): a resumed run's log is that of an unbroken one."""
        self.tell, self.sessions = tell, list[Session]()
        self.metrics, self.texts = (_continued(folder / name, after) for name in (METRICS, SAMPLES))
        for tracker in trackers:
            with self._safely(None):
                self.sessions.append(tracker.open(folder, about, after))

    def write(self, step: int, **values: Any) -> None:
        """One line: `step` and `values` (numbers)."""
        self.metrics.add(step, values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for session in list(self.sessions):
            with self._safely(session):
                session.numbers(step, numbers)

    def sample(self, step: int, prompt: str, text: str, **values: Any) -> None:
        """What the model writes behind `prompt` with the parameters of that step."""
        self.texts.add(step, {"prompt": prompt, "text": text, **values})
        for session in list(self.sessions):
            with self._safely(session):
                session.text(step, f"samples/{prompt}", text)

    @contextlib.contextmanager
    def _safely(self, session: Session | None) -> Iterator[None]:
        """Whatever a foreign library raises ends its part, and not the training."""
        try:
            yield
        except Exception as e:
            self.sessions = [other for other in self.sessions if other is not session]
            self.tell(f"train.tracker: fails ({type(e).__name__}: {e}); the training goes on without it")

    def close(self) -> None:
        self.metrics.close()
        self.texts.close()
        for session in list(self.sessions):
            with self._safely(session):
                session.close()


class _Lines:
    """A file of JSON lines that is made when its first line comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        if self.file is None:
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _continued(path: Path, after: int | None) -> _Lines:
    """The file with the lines of steps up to `after` alone."""
    if path.is_file() or path.name == METRICS:
        before = [] if after is None else [line for line in read(path) if line["step"] <= after]
        write_text(path, "".join(json.dumps(line) + "\n" for line in before))
    return _Lines(path)


class NoLog:
    """What the other processes of a run write: nothing."""

    def write(self, step: int, **values: Any) -> None: ...

    def sample(self, step: int, prompt: str, text: str, **values: Any) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return out
