"""Where the time of a run went (goodput), and the log of its metrics."""

from __future__ import annotations

import contextlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm.errors import UserError
from lm.files import write_json, write_text
from lm.trackers.base import Session, Tracker
from lm.train.folder import GOODPUT, METRICS, SAMPLES

Tell = Callable[[str], None]
KINDS = ("init", "compile", "step", "data", "eval", "save", "idle")
FIRST = "0" * 8  # what the first line of a log stands behind
# A line ends in its own sum behind that of the line before: a line that is changed is found, and one that is lost.
_SUM = re.compile(r'(\{.*), "sum": "([0-9a-f]{8}) ([0-9a-f]{8})"\}')


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
        self,
        folder: Path,
        after: int | None,
        trackers: Sequence[Tracker],
        about: Mapping[str, Any],
        tell: Tell = print,
        mark: str | None = None,
    ) -> None:
        """Keeps the lines of steps up to `after` (None = none): a resumed run's log is that of an unbroken one.

        `mark`: that of the log when the state was saved that is gone on from (None: not known). Lines that are lost or
        damaged are told, and the others kept.
        """
        self.tell, self.sessions = tell, list[Session]()
        self.metrics = _continued(folder / METRICS, after, tell, mark)
        self.texts = _continued(folder / SAMPLES, after, tell, None)
        for tracker in trackers:
            with self._safely(None):
                self.sessions.append(tracker.open(folder, about, after))

    @property
    def mark(self) -> str:
        """What stands for the lines of the metrics up to now."""
        return self.metrics.last

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
    """A file of JSON lines that is made when its first line comes; `last`: the sum of the last one."""

    def __init__(self, path: Path, last: str) -> None:
        self.path, self.last = path, last
        self.file: TextIO | None = None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        if self.file is None:
            self.file = self.path.open("a", encoding="utf-8")
        text, self.last = _summed(json.dumps({"step": step, **values}), self.last)
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _continued(path: Path, after: int | None, tell: Tell, mark: str | None) -> _Lines:
    """The file with the lines of steps up to `after` alone; what is wrong with it is told."""
    last = FIRST
    if path.is_file() or path.name == METRICS:
        found = _scan(path)
        kept = [] if after is None else [line.text for line in found.lines if line.values["step"] <= after]
        if after is not None:
            why = found.why or ("lines at its end are lost" if mark not in (None, FIRST, *found.sums) else "")
            if why:
                tell(f"{path}: damaged ({why}); {len(kept)} lines are kept, the others stay lost")
                kept.append(json.dumps({"step": after, "lost": why}))
        texts = list[str]()
        for line in kept:  # the same text as before, unless lines are lost
            text, last = _summed(line, last)
            texts.append(text)
        write_text(path, "".join(texts))
    return _Lines(path, last)


class NoLog:
    """What the other processes of a run write: nothing."""

    mark: str | None = None

    def write(self, step: int, **values: Any) -> None: ...

    def sample(self, step: int, prompt: str, text: str, **values: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Line:
    """A line without its sum, as text and as what it says."""

    text: str
    values: dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """The sound lines of a log, and why there are not more (empty: there are all, a torn last one aside)."""

    lines: tuple[_Line, ...]
    sums: tuple[str, ...]
    why: str


def _summed(text: str, before: str) -> tuple[str, str]:
    """A line with its sum, and that sum."""
    own = _sum_of(text, before)
    return f'{text[:-1]}, "sum": "{before} {own}"}}\n', own


def _sum_of(text: str, before: str) -> str:
    return f"{zlib.crc32(text.encode(), int(before, 16)):08x}"


def _scan(path: Path) -> _Found:
    """A log from before lines had sums is read as it is, where every line is one."""
    if not path.is_file():
        return _Found((), (), "")
    given = path.read_text(encoding="utf-8", errors="replace").split("\n")
    torn = given.pop()  # empty behind a line that was written whole
    matched = [_SUM.fullmatch(line) for line in given]
    old = not any(matched)
    lines, sums, before, wrong = list[_Line](), list[str](), FIRST, list[str]()
    for n, (line, parts) in enumerate(zip(given, matched, strict=True), 1):
        text = f"{parts[1]}}}" if parts else line
        values = _values(text)
        if values is None or (parts is None and not old) or (parts and parts[3] != _sum_of(text, parts[2])):
            wrong.append(f"line {n} is not what was written")
            continue
        if parts and parts[2] != before and not wrong:
            wrong.append(f"lines before line {n} are lost")
        before = parts[3] if parts else before
        lines.append(_Line(text, values))
        sums.append(before)
    why = wrong[0] if wrong else ""
    if old and torn and (values := _values(torn)) is not None:
        lines.append(_Line(torn, values))
    return _Found(tuple(lines), tuple(sums), why)


def _values(text: str) -> dict[str, Any] | None:
    """What a line says; None for one that is no line of a log."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, dict) and isinstance(found.get("step"), int)
    return found if good else None


def read(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` or ``samples.jsonl``; a last line that was cut off is left out.

    `until`: the step that it must reach. A log from before lines had sums is read as it is. Raises `UserError` for
    lines that are not what was written, or that are lost.
    """
    found = _scan(path)
    why = found.why
    if until is not None and not why and all(line.values["step"] < until for line in found.lines):
        why = f"it does not reach step {until}"
    if why:
        raise UserError(f"{path}: damaged ({why}); valid: the file as training wrote it")
    return [line.values for line in found.lines]
