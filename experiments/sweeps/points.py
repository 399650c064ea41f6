"""Points of sweeps and searches: one checked setting each, and the state that the files in its folder tell.

Light on purpose: a job on a cluster reads states without loading JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from experiments.reports import results_file
from experiments.running.cache import write_json
from experiments.running.progress import duration
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.running.plan import Workdir

STALE = 120.0  # seconds without a heartbeat after which a process on another host counts as dead
Changes = dict[str, Any]


def literal(value: object, place: str) -> str:
    """`value` as a Python literal that the command line reads back as the same value; raises `UserError` when there is
    none. Strings are quoted, so that ``'5'`` and ``'None'`` stay strings; scalars of NumPy become Python's."""
    text = _literal(value)
    if text is None:
        raise UserError(
            f"{place}: found {value!r} of type {type(value).__name__}; valid: None, True, False, finite or infinite "
            "numbers, strings, and tuples, lists and dicts of these"
        )
    return text


def _literal(value: object) -> str | None:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, (Mapping, ConfigDict)):
        pairs = [(_literal(k), _literal(v)) for k, v in value.items()]
        parts = [None if k is None or v is None else f"{k}: {v}" for k, v in pairs]
        return None if None in parts else "{" + ", ".join(map(str, parts)) + "}"
    if isinstance(value, (tuple, list)):
        parts = [_literal(v) for v in value]
        if None in parts:
            return None
        inner = ", ".join(map(str, parts))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(parts) == 1 else f"({inner})"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # there is no literal for infinity, but this reads as it
    if value is None or type(value) in (bool, int, str) or (isinstance(value, float) and not math.isnan(value)):
        return repr(value)
    return None


def shown(changes: Mapping[str, Any], width: int = 100) -> str:
    """``key=value, …`` on one line of at most `width` characters."""
    text = ", ".join(f"{name}={value!r}" for name, value in changes.items()) or "no changes"
    return text if len(text) <= width else text[: width - 1] + "…"


@dataclass(frozen=True)
class Point:
    """One checked point. `number` counts from 1; `folder` is its run folder; `args` are those of `experiments.run`;
    `arms` the chosen ones, the baseline first where it is among them, and `whole` says that these are all."""

    number: int
    changes: Changes
    folder: Path
    args: tuple[str, ...]
    arms: tuple[str, ...]
    whole: bool
    run: Workdir | None = field(repr=False, compare=False)

    def begin(self) -> None:
        """Writes the folder's config.json: a folder without it would be foreign to `experiments.run`."""
        if self.run is not None and not (self.folder / "config.json").exists():
            self.run.start({})

    def bare(self) -> Point:
        """Without the plan: what another process needs."""
        return dataclasses.replace(self, run=None)


@dataclass(frozen=True)
class State:
    """`name`: done, running, failed, interrupted or new; `detail`: who runs it, or why it failed."""

    name: str
    seconds: float | None = None
    detail: str = ""


def look(point: Point) -> State:
    """The state that the files in the point's folder tell."""
    done, running, failed = (read_state(point.folder / n) for n in ("DONE", "RUNNING", "FAILED"))
    if done and set(point.arms) <= set(done.get("arms", ())) and results_of(point) is not None:
        return State("done", done.get("seconds"))
    if running and live(running):
        since = duration(max(time.time() - running.get("began", time.time()), 0))
        return State(
            "running", None, f"left alone, process {running['pid']} on {running['host']} has worked on it for {since}"
        )
    if failed:
        return State("failed", failed.get("seconds"), f"exit code {failed.get('code')}: {failed.get('last', '')}")
    return State("interrupted" if (point.folder / "log.txt").exists() else "new")


def read_state(path: Path) -> dict[str, Any]:
    """The record in a state file; empty when there is none, or none of ours."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def results_of(point: Point) -> dict[str, Any] | None:
    """The point's results.json; None when there is none that can be read."""
    try:
        return results_file.load(point.folder)[0]
    except UserError:
        return None


def new_record(pid: int) -> dict[str, Any]:
    """What RUNNING says of a process of this host that begins now."""
    now = time.time()
    return {"pid": pid, "host": socket.gethostname(), "born": _born(pid), "began": now, "heartbeat": now, **_job()}


def _job() -> dict[str, Any]:
    """This process's job of a Slurm cluster, as submitit and squeue call it, and how often it was started before."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ.get("SLURM_JOB_ID") if job is None else f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return {} if job is None else {"job": job, "starts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def _born(pid: int) -> str | None:
    """When the process began, as the system counts it: a later process with the same number differs. Empty where that
    cannot be known, None when there is no such process."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # somebody else's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] == "Z" else fields[19]


def live(record: Mapping[str, Any]) -> bool:
    """Whether the process of a RUNNING file is at work: by its heartbeat on another host, for certain on this one, and
    for certain not when it was of an earlier life of this very job."""
    try:
        this = _job()
        if this and record.get("job") == this["job"] and record["starts"] < this["starts"]:
            return False
        fresh = time.time() - record["heartbeat"] < STALE
        if record["host"] != socket.gethostname():
            return fresh
        born = _born(record["pid"])
        return born is not None and (born == record["born"] if born and record["born"] else fresh)
    except (KeyError, TypeError):
        return False


def release(point: Point, job: str) -> None:
    """Takes away what a job that is over has left of itself."""
    if read_state(point.folder / "RUNNING").get("job") == job:
        (point.folder / "RUNNING").unlink(missing_ok=True)


def fail(point: Point, code: int, last: str, seconds: float, lines: Sequence[str]) -> None:
    """Writes FAILED: the exit code, the last line or what went wrong, and the lines before."""
    what = {"code": code, "last": last, "seconds": seconds, "lines": list(lines)}
    write_json(point.folder / "FAILED", what)
