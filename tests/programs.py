"""How many programs the suite compiles, by test file: printed at the end, written to ``.cache/tests/durations.json``.

Seconds are noise on a shared machine, programs are not. A program read from the compilation cache counts as compiled
(jax reports both alike), so a warm cache does not hide what a test costs cold. Files run in the order of the seconds
they took last time, longest first: a long file that begins last leaves the other cores idle.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / ".cache" / "tests" / "durations.json"
COMPILED = "/jax/core/compile/backend_compile_duration"


class Programs:
    """Counts of one process: programs, seconds of their compilation, and seconds of tests, by file; and the names of
    the programs that a budget covers."""

    def __init__(self) -> None:
        self.file = ""
        self.names: list[str] = []
        self.covered = True
        self.counts: dict[str, dict[str, float]] = defaultdict(lambda: {"programs": 0, "compile_s": 0.0, "test_s": 0.0})
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            self.add(programs=1, compile_s=duration_secs)
            if self.covered:
                self.names.append(str(about.get("fun_name", "?")))

    def add(self, **values: float) -> None:
        for key, value in values.items():
            self.counts[self.file][key] += value


PROGRAMS: list[Programs] = []


def _here() -> Programs:
    if not PROGRAMS:
        PROGRAMS.append(Programs())
    return PROGRAMS[0]


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the programs that are compiled, or read from the cache, within; complete at the end."""
    here, names = _here(), []  # type: tuple[Programs, list[str]]
    before = len(here.names)
    try:
        yield names
    finally:
        names += here.names[before:]


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """What is compiled within counts for its file, but for no budget: random parameters, operations without jit."""
    here = _here()
    before, here.covered = here.covered, False
    try:
        yield
    finally:
        here.covered = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = {file: row["test_s"] for file, row in _kept().items()}
    items.sort(key=lambda item: -seconds.get(item.nodeid.split("::")[0], 0.0))  # a file keeps its order


def _kept() -> dict[str, dict[str, float]]:
    """What earlier runs wrote; nothing where that is no longer legible."""
    try:
        return dict(json.loads(FILE.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _here().file = item.nodeid.split("::")[0]
    yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if PROGRAMS and not hasattr(report, "node"):  # in the process that ran it
        PROGRAMS[0].add(test_s=report.duration)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The counts of an xdist worker, at the controller."""
    _merge(getattr(node, "workeroutput", {}).get("programs", {}))


TOTAL: dict[str, dict[str, float]] = {}


def _merge(counts: dict[str, dict[str, float]]) -> None:
    for file, row in counts.items():
        into = TOTAL.setdefault(file, {"programs": 0, "compile_s": 0.0, "test_s": 0.0})
        for key, value in row.items():
            into[key] += value


def pytest_sessionfinish(session: pytest.Session) -> None:
    own = dict(PROGRAMS[0].counts) if PROGRAMS else {}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["programs"] = own
    else:
        _merge(own)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TOTAL:
        return
    rows = sorted(TOTAL.items(), key=lambda item: -item[1]["test_s"])
    n = int(sum(row["programs"] for _, row in rows))
    terminalreporter.section(f"{n} programs compiled in {len(rows)} files")
    for file, row in rows[:20]:
        terminalreporter.write_line(
            f"{int(row['programs']):5} programs  {row['compile_s']:6.1f} s compiling  {row['test_s']:6.1f} s  {file}"
        )
    FILE.parent.mkdir(parents=True, exist_ok=True)
    rounded = {f: {k: round(v, 2) for k, v in row.items()} for f, row in rows}
    FILE.write_text(json.dumps({**_kept(), **rounded}, indent=1, sort_keys=True) + "\n")
