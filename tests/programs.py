"""How many programs the suite compiles, by test file: printed at the end, written to ``.cache/tests/durations.json``.

Seconds are noise on a shared machine, programs are not. A program read from the compilation cache counts as compiled,
so a warm cache does not hide what a test costs cold.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / ".cache" / "tests" / "durations.json"
COMPILED = "/jax/core/compile/backend_compile_duration"
READ = "/jax/compilation_cache/cache_hits"


class Programs:
    """Counts of one process: programs, seconds of their compilation, and seconds of tests, by file."""

    def __init__(self) -> None:
        self.file = ""
        self.total = 0
        self.counts: dict[str, dict[str, float]] = defaultdict(lambda: {"programs": 0, "compile_s": 0.0, "test_s": 0.0})
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        jax.monitoring.register_event_listener(self._read)

    def _compiled(self, name: str, seconds: float, **_: Any) -> None:
        if name == COMPILED:
            self.add(programs=1, compile_s=seconds)

    def _read(self, name: str, **_: Any) -> None:
        if name == READ:
            self.add(programs=1)

    def add(self, **values: float) -> None:
        self.total += int(values.get("programs", 0))
        for key, value in values.items():
            self.counts[self.file][key] += value


PROGRAMS: list[Programs] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not PROGRAMS:
        PROGRAMS.append(Programs())
    PROGRAMS[0].file = item.nodeid.split("::")[0]
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
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    rounded = {f: {k: round(v, 2) for k, v in row.items()} for f, row in rows}
    FILE.write_text(json.dumps({**kept, **rounded}, indent=1, sort_keys=True) + "\n")
