"""Sweeps of a config file: combinators to write them with, the checked points they come to, and the points' states.

A sweep is a function ``sweep_NAME()`` in a config file that gives dicts from dotted keys to values, the keys being
those of ``--config.KEY`` of `experiments.run`::

    from experiments.sweeps import grid, product

    def sweep_windows():
        yield {}  # the config as it is
        yield from product(grid({"arms.window.model.pattern.window": (64, 256)}), grid(seeds=[(0,), (1,)]))

The combinators take any iterables of such dicts and give lists. They raise `UserError` where a key would be set twice
in one point, or where the same point would come twice.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import math
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import results_file
from experiments.cache import key, write_json
from experiments.plan import Plan, Workdir, prepare
from experiments.progress import duration
from experiments.registry import Source
from experiments.settings import Text, names_first
from lm.errors import UserError, unknown

LIMIT = 10_000  # points; a generator that never ends is refused here
STALE = 120.0  # seconds without a heartbeat after which a process on another host counts as dead
Changes = dict[str, Any]


def grid(values: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> list[Changes]:
    """Every combination of the values of each key, the last key changing fastest."""
    columns = _columns("grid", values, more)
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def zip_(values: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> list[Changes]:
    """The first values of all keys, then the second ones, and so on; all keys need as many values."""
    columns = _columns("zip_", values, more, repeats=True)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{n} for {name}" for name, n in lengths.items())
        raise UserError(f"zip_: found {found}; valid: the same number of values for every key")
    return _distinct("zip_", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> list[Changes]:
    """The points of one sweep after those of the other."""
    return _distinct("chain", [dict(p) for sweep in sweeps for p in sweep])


def product(*sweeps: Iterable[Mapping[str, Any]]) -> list[Changes]:
    """Every point of one sweep with every point of the others, the last sweep changing fastest."""
    return _distinct("product", [_union("product", row) for row in itertools.product(*sweeps)])


def prefix(points: Iterable[Mapping[str, Any]], head: str) -> list[Changes]:
    """The points with ``head.`` before every key, for example ``arms.window``."""
    return [{f"{head}.{name}": value for name, value in p.items()} for p in points]


def subsample(points: Iterable[Mapping[str, Any]], n: int, seed: int = 0) -> list[Changes]:
    """`n` of the points, drawn without replacement and kept in their order; the seed determines which."""
    every = _distinct("subsample", [dict(p) for p in points])
    if not 1 <= n <= len(every):
        raise UserError(f"subsample: n: found {n}; valid: 1 to {len(every)}, the number of points")
    return [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), n))]


def _columns(
    what: str, values: Mapping[str, Iterable[Any]] | None, more: Mapping[str, Iterable[Any]], repeats: bool = False
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name, column in _union(what, [values or {}, more]).items():
        if isinstance(column, (str, Mapping)) or not isinstance(column, Iterable):
            raise UserError(f"{what}: {name}: found {column!r}; valid: a tuple or list of values")
        out[name] = list(column)
        if not out[name]:
            raise UserError(f"{what}: {name}: has no values; valid: at least one")
        texts = [literal(v, f"{what}: {name}") for v in out[name]]
        twice = next((t for i, t in enumerate(texts) if t in texts[:i]), None)
        if twice is not None and not repeats:
            raise UserError(f"{what}: {name}: found {twice} twice; valid: different values")
    if not out:
        raise UserError(f"{what}: has no keys; valid: at least one")
    return out


def _union(what: str, parts: Iterable[Mapping[str, Any]]) -> Changes:
    out: Changes = {}
    for part in parts:
        for name, value in part.items():
            if any(_plug(name) == _plug(other) for other in out):
                raise UserError(f"{what}: {name}: is set twice in one point; valid: every key once")
            out[name] = value
    return out


def _plug(name: str) -> str:
    """``model.pattern`` and ``model.pattern.name`` are one key."""
    return str(name).removesuffix(".name")


def _distinct(what: str, points: list[Changes]) -> list[Changes]:
    seen: dict[frozenset[tuple[str, str]], int] = {}
    for i, point in enumerate(points, 1):
        at = frozenset((_plug(name), literal(value, f"{what}: {name}")) for name, value in point.items())
        if seen.setdefault(at, i) != i:
            raise UserError(f"{what}: point {i} is point {seen[at]} again ({shown(point)}); valid: different points")
    return points


def literal(value: Any, place: str) -> str:
    """`value` as a Python literal that the command line reads back as the same value; raises `UserError` when there is
    none. Strings are quoted, so that ``'5'`` and ``'None'`` stay strings; scalars of NumPy become Python's."""
    text = _literal(value)
    if text is None:
        raise UserError(
            f"{place}: found {value!r} of type {type(value).__name__}; valid: None, True, False, finite or infinite "
            "numbers, strings, and tuples, lists and dicts of these"
        )
    return text


def _literal(value: Any) -> str | None:
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Mapping) or hasattr(value, "items"):
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

    def bare(self) -> Point:
        """Without the plan: what another process needs."""
        return dataclasses.replace(self, run=None)


def choose(source: Source, name: str | None) -> tuple[str, Callable[[], Any]]:
    """The sweep called `name`, or the only one; raises `UserError` that lists them."""
    found = {n.removeprefix("sweep_"): f for n, f in vars(source.module).items() if n.startswith("sweep_")}
    found = {n: f for n, f in found.items() if callable(f)}
    if not found:
        raise UserError(f"{source.path}: has no sweep; valid: a function sweep_NAME() that yields dicts of dotted keys")
    if name is None:
        if len(found) > 1:
            raise UserError(f"--sweep: missing, {source.path.name} has several; valid: {', '.join(sorted(found))}")
        name = next(iter(found))
    if name not in found:
        raise unknown("--sweep", name, found)
    return name, found[name]


def expand(name: str, sweep: Callable[[], Any]) -> list[Changes]:
    """The dicts that the sweep gives, keys in the order they are to be set; raises `UserError` that names the point."""
    out: list[Changes] = []
    try:
        for changes in sweep():
            place = f"sweep {name}: point {len(out) + 1}"
            if len(out) == LIMIT:
                raise UserError(f"sweep {name}: more than {LIMIT} points; valid: a generator that ends")
            if not isinstance(changes, Mapping) or not all(isinstance(k, str) for k in changes):
                raise UserError(f"{place}: expected a dict from dotted keys to values, found {changes!r}")
            _union(place, [{k: v} for k, v in changes.items()])
            # What is checked here is what the point's own process will read.
            out.append({k: ast.literal_eval(literal(v, f"{place}: {k}")) for k, v in names_first(changes)})
    except UserError as e:
        raise e if str(e).startswith("sweep ") else UserError(f"sweep {name}: {e}") from None
    except Exception as e:
        raise UserError(f"sweep {name}: sweep_{name}() failed: {type(e).__name__}: {e}") from e
    if not out:
        raise UserError(f"sweep {name}: gives no points; valid: at least one")
    return out


def points(
    source: Source,
    settings: Mapping[str, Any],
    config: str,
    name: str,
    every: Sequence[Changes],
    overrides: Sequence[tuple[str, Text]],
    arms: str | None,
    workdir: Path,
    absent_is_fine: bool = False,
) -> list[Point]:
    """All points of sweep `name` (`every` from `expand`), checked; nothing is written.

    `config` is the text after ``--config=``; `overrides` hold for every point. Raises `UserError` for the first
    mistake, which names the sweep, the point and the key.
    """
    out: list[Point] = []
    seen: dict[str, int] = {}
    for number, changes in enumerate(every, 1):
        place = f"sweep {name}: point {number}"
        _refuse_clash(place, changes, overrides)
        plan = _plan(place, settings, overrides, changes, arms, absent_is_fine)
        at = key({"file": source.place, "config": plan.exp.to_dict()})
        if seen.setdefault(at, number) != number:
            raise UserError(
                f"{place}: comes to the same settings as point {seen[at]} ({shown(changes)}); valid: different points"
            )
        folder = workdir / f"{at[:8]}-{slug(changes)}"
        args = [f"--config={config}", f"--workdir={folder}", *([] if arms is None else [f"--arms={arms}"])]
        args += [f"--config.{k}={v}" for k, v in overrides]
        args += [f"--config.{k}={literal(v, k)}" for k, v in changes.items()]
        run = Workdir(folder, source.place, plan)
        run.check()
        chosen = tuple(plan.chosen)
        out.append(Point(number, dict(changes), folder, tuple(args), chosen, len(chosen) == len(plan.arms), run))
    return out


def _plan(
    place: str,
    settings: Mapping[str, Any],
    overrides: Sequence[tuple[str, Any]],
    changes: Changes,
    arms: str | None,
    absent_is_fine: bool,
) -> Plan:
    try:
        plan = prepare(settings, [*overrides, *changes.items()], arms, absent_is_fine)
    except UserError as e:
        prepare(settings, overrides, arms, absent_is_fine)  # the mistake may be in what all points share
        raise UserError(f"{place}: {e}") from None
    return dataclasses.replace(plan, base=None)  # a tokenizer for each of a thousand points would be too much


def _refuse_clash(place: str, changes: Changes, overrides: Sequence[tuple[str, Any]]) -> None:
    """Neither the command line nor the sweep may silently undo what the other sets."""
    for name, _ in overrides:
        for other in changes:
            if _plug(name) == _plug(other) or name.startswith(_plug(other) + "."):
                raise UserError(f"--config.{name}: {place} sets {other}; valid: keys that the sweep leaves alone")


def slug(changes: Mapping[str, Any], width: int = 48) -> str:
    """The changed keys' last parts with their values, in letters that every file system takes."""
    words = [f"{_plug(k).rpartition('.')[2]}{v if isinstance(v, str) else literal(v, k)}" for k, v in changes.items()]
    safe = [re.sub(r"[^A-Za-z0-9_.+-]+", "_", w).strip("_.") for w in words]
    return "-".join(w for w in safe if w)[:width].rstrip("-_.") or "base"


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
    return {"pid": pid, "host": socket.gethostname(), "born": _born(pid), "began": now, "heartbeat": now}


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
    """Whether the process of a RUNNING file is at work: by its heartbeat on another host, for certain on this one."""
    try:
        fresh = time.time() - record["heartbeat"] < STALE
        if record["host"] != socket.gethostname():
            return fresh
        born = _born(record["pid"])
        return born is not None and (born == record["born"] if born and record["born"] else fresh)
    except (KeyError, TypeError):
        return False


def fail(point: Point, code: int, last: str, seconds: float, lines: Sequence[str]) -> None:
    """Writes FAILED: the exit code, the last line or what went wrong, and the lines before."""
    what = {"code": code, "last": last, "seconds": seconds, "lines": list(lines)}
    write_json(point.folder / "FAILED", what)
