"""The sweeps of a config file by name, and the checked points they come to."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.running import dry
from experiments.running.cache import key
from experiments.running.plan import Plan, Workdir, prepare
from experiments.spec.registry import Source
from experiments.spec.settings import Text, names_first
from experiments.sweeps.combinators import same_plug, union
from experiments.sweeps.points import Changes, Point, literal, shown
from lm.errors import UserError, cut, told, unknown

LIMIT = 10_000  # points; a generator that never ends is refused here


def check(settings: object) -> None:
    """Raises `UserError` for what is no config at all."""
    if not isinstance(settings, Mapping):
        raise UserError(f"get_config: expected a ConfigDict, found {type(settings).__name__}")


def choose(source: Source, name: str | None, kind: str = "sweep") -> tuple[str, Callable[..., Any]]:
    """The sweep (or, by `kind`, the search) called `name`, or the only one; raises `UserError` that lists them."""
    found = {n.removeprefix(f"{kind}_"): f for n, f in vars(source.module).items() if n.startswith(f"{kind}_")}
    found = {n: f for n, f in found.items() if callable(f)}
    if not found:
        valid = {"sweep": "sweep_NAME() that yields dicts", "search": "search_NAME(trial) that returns a dict"}[kind]
        raise UserError(f"{source.path}: has no {kind}; valid: a function {valid} of dotted keys")
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
            if len(out) == LIMIT:
                raise UserError(f"sweep {name}: more than {LIMIT} points; valid: a generator that ends")
            out.append(readable(f"sweep {name}: point {len(out) + 1}", changes))
    except UserError as e:
        raise e if str(e).startswith("sweep ") else UserError(f"sweep {name}: {e}") from None
    except (Exception, SystemExit) as e:
        raise UserError(f"sweep {name}: sweep_{name}() failed: {type(e).__name__}: {told(e)}") from e
    if not out:
        raise UserError(f"sweep {name}: gives no points; valid: at least one")
    return out


def readable(place: str, changes: object) -> Changes:
    """The changes as the point's own process will read them; raises `UserError` that begins with `place`."""
    if not isinstance(changes, Mapping) or not all(isinstance(k, str) for k in changes):
        raise UserError(f"{place}: expected a dict from dotted keys to values, found {cut(repr(changes))}")
    union(place, [{k: v} for k, v in changes.items()])
    return {k: ast.literal_eval(literal(v, f"{place}: {k}")) for k, v in names_first(changes)}


@dataclass(frozen=True)
class Shared:
    """What all points of one sweep or search have in common. `config` is the text after ``--config=``; `overrides` hold
    for every point; `absent_is_fine`: of checkpoints, where nothing is to be run; `file`: what ``--file=`` named."""

    source: Source
    settings: Mapping[str, Any]
    config: str
    overrides: Sequence[tuple[str, Text]]
    arms: str | None
    workdir: Path
    absent_is_fine: bool = False
    file: Path | None = None

    def point(self, place: str, number: int, changes: Changes) -> tuple[Point, str]:
        """The checked point and the hash of its settings; nothing is written. Raises `UserError` for the first mistake,
        which names the key and begins with `place`, unless it is in what all points share."""
        _refuse_clash(place, changes, self.overrides)
        plan = self._plan(place, changes)
        at = key({"file": self.source.place, "config": plan.exp.to_dict()})
        folder = self.workdir / f"{at[:8]}-{slug(changes)}"
        args = [f"--config={self.config}", f"--workdir={folder}"]
        args += [] if self.file is None else [f"--file={self.file}"]
        args += [] if self.arms is None else [f"--arms={self.arms}"]
        args += [f"--config.{k}={v}" for k, v in self.overrides]
        args += [f"--config.{k}={literal(v, k)}" for k, v in changes.items()]
        light = dataclasses.replace(plan, base=None)  # a tokenizer for each of a thousand points would be too much
        run = Workdir(folder, self.source.place, light)
        run.check()
        if self.absent_is_fine:  # a dry run
            try:
                dry.check(plan, self.source, run)
            except UserError as e:
                raise UserError(f"{place}: {e}") from None
        chosen = tuple(plan.chosen)
        return Point(number, dict(changes), folder, tuple(args), chosen, len(chosen) == len(plan.arms), run), at

    def base(self) -> Plan:
        """The plan without any point's changes."""
        return prepare(self.settings, self.overrides, self.arms, self.absent_is_fine)

    def _plan(self, place: str, changes: Changes) -> Plan:
        try:
            plan = prepare(self.settings, [*self.overrides, *changes.items()], self.arms, self.absent_is_fine)
        except UserError as e:
            self.base()  # the mistake may be in what all points share
            raise UserError(f"{place}: {e}") from None
        return plan


def points(shared: Shared, name: str, every: Sequence[Changes]) -> list[Point]:
    """All points of sweep `name` (`every` from `expand`), checked; raises `UserError`, also where two are the same."""
    out: list[Point] = []
    seen: dict[str, int] = {}
    for number, changes in enumerate(every, 1):
        place = f"sweep {name}: point {number}"
        point, at = shared.point(place, number, changes)
        if seen.setdefault(at, number) != number:
            raise UserError(
                f"{place}: comes to the same settings as point {seen[at]} ({shown(changes)}); valid: different points"
            )
        out.append(point)
    return out


def _refuse_clash(place: str, changes: Changes, overrides: Sequence[tuple[str, Any]]) -> None:
    """Neither the command line nor the sweep may silently undo what the other sets."""
    for name, _ in overrides:
        for other in changes:
            if same_plug(name) == same_plug(other) or name.startswith(same_plug(other) + "."):
                raise UserError(f"--config.{name}: {place} sets {other}; valid: keys that the sweep leaves alone")


def slug(changes: Mapping[str, Any], width: int = 48) -> str:
    """The changed keys' last parts with their values, in letters that every file system takes."""
    words = [
        f"{same_plug(k).rpartition('.')[2]}{v if isinstance(v, str) else literal(v, k)}" for k, v in changes.items()
    ]
    safe = [re.sub(r"[^A-Za-z0-9_.+-]+", "_", w).strip("_.") for w in words]
    return "-".join(w for w in safe if w)[:width].rstrip("-_.") or "base"
